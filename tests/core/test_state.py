"""Saving and restoring: bytes and files, whole contexts and single sequences, damage."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_crab import _core, errors

WORKER = Path(__file__).with_name("damaged_state_worker.py")
TOKENS = [1, 300, 301, 302, 303, 304]
ONE: Any = {"n_ctx": 64, "n_batch": 16, "n_seq_max": 3, "n_threads": 1, "n_threads_batch": 1}


def feed(context: _core.Context, tokens: list[int], pos: int = 0, seq: int = 0) -> np.ndarray:
    with _core.Batch(16) as batch:
        batch.extend(tokens, pos, seq, "last")
        context.decode(batch)
    return np.array(context.logits())


@pytest.fixture
def prefilled(tiny: _core.Model) -> Any:
    """Return a context that holds TOKENS as sequence 0."""
    with _core.Context(tiny, **ONE) as context:
        feed(context, TOKENS)
        yield context


def test_a_restored_context_continues_identically(
    tiny: _core.Model, prefilled: _core.Context
) -> None:
    data = prefilled.state_get()
    expected = feed(prefilled, [400], 6)
    with _core.Context(tiny, **ONE) as other:
        for form in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
            other.memory.clear()
            other.state_set(form)
            assert other.memory.seq_pos_max(0) == 5
            np.testing.assert_array_equal(feed(other, [400], 6), expected)


def test_a_sequence_moves_to_another_slot_and_context(
    tiny: _core.Model, prefilled: _core.Context
) -> None:
    data = prefilled.state_get(0)
    expected = feed(prefilled, [400], 6)
    with _core.Context(tiny, **ONE) as other:
        feed(other, [7, 8], seq=0)
        other.state_set(data, 2)
        assert [other.memory.seq_pos_max(seq) for seq in range(3)] == [1, -1, 5]
        np.testing.assert_allclose(feed(other, [400], 6, seq=2), expected, atol=1e-5)


@pytest.mark.parametrize("seq_id", [None, 0])
def test_a_file_gives_back_tokens_and_state(
    tiny: _core.Model, prefilled: _core.Context, tmp_path: Path, seq_id: int | None
) -> None:
    prefilled.state_save(tmp_path / "état", np.array(TOKENS, np.int32), seq_id)
    expected = feed(prefilled, [400], 6)
    with _core.Context(tiny, **ONE) as other:
        assert other.state_load(tmp_path / "état", seq_id) == TOKENS
        np.testing.assert_allclose(feed(other, [400], 6), expected, atol=1e-5)


def test_a_file_without_tokens(tiny: _core.Model, prefilled: _core.Context, tmp_path: Path) -> None:
    prefilled.state_save(tmp_path / "empty", [])
    with _core.Context(tiny, **ONE) as other:
        assert other.state_load(tmp_path / "empty") == []
        assert other.memory.seq_pos_max(0) == 5


def test_real_models_continue_identically(
    smol: _core.Model, gemma: _core.Model, n_threads: int
) -> None:
    for model in (smol, gemma):
        fields: Any = {
            "n_ctx": 64,
            "n_batch": 32,
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "n_outputs_max": 1,
        }
        tokens = model.vocab.tokenize("The capital of France is", True, False)
        with _core.Context(model, **fields) as one, _core.Context(model, **fields) as other:
            with _core.Batch(32) as batch:
                batch.extend(tokens, 0, 0, "last")
                one.decode(batch)
            data = one.state_get(0)
            other.state_set(data, 0)
            n = len(tokens)
            np.testing.assert_array_equal(feed(one, [500], n), feed(other, [500], n))


def test_partial_states_hold_less_and_need_a_sequence(tiny_swa_path: Path) -> None:
    with (
        _core.Model(tiny_swa_path) as model,
        _core.Context(model, swa_full=False, **ONE) as context,
    ):
        feed(context, TOKENS)
        partial = context.state_get(0, partial_only=True)
        assert 0 < len(partial) <= len(context.state_get(0))
        context.state_set(partial, 0, partial_only=True)
        assert context.memory.seq_pos_max(0) == 5
        with pytest.raises(ValueError, match="seq_id"):
            context.state_get(partial_only=True)
        with pytest.raises(ValueError, match="seq_id"):
            context.state_set(partial, partial_only=True)


def test_the_state_of_another_model_is_refused(
    prefilled: _core.Context, tiny_swa_path: Path
) -> None:
    data = prefilled.state_get(0)
    with (
        _core.Model(tiny_swa_path) as model,
        _core.Context(model, **ONE) as other,
        pytest.raises(errors.StateError),
    ):
        other.state_set(data, 0)


def test_a_state_that_does_not_fit_is_refused(tiny: _core.Model, prefilled: _core.Context) -> None:
    anything: Any = {**ONE, "n_ctx": 512, "n_batch": 512, "n_seq_max": 1}
    with _core.Context(tiny, **anything) as large, _core.Batch(512) as batch:
        batch.extend([5] * 512, 0, 0, "last")
        large.decode(batch)
        data = large.state_get(0)
    anything = {**ONE, "n_seq_max": 1}
    with _core.Context(tiny, **anything) as small:
        assert small.n_ctx < 512
        with pytest.raises(errors.StateError):
            small.state_set(data, 0)
        feed(small, TOKENS)


def test_wrong_sequences_files_and_arguments(prefilled: _core.Context, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidBatchError):
        prefilled.state_get(3)
    with pytest.raises(ValueError, match="seq_id"):
        prefilled.state_get(-1)
    with pytest.raises(errors.StateError, match="absent"):
        prefilled.state_load(tmp_path / "absent")
    with pytest.raises(errors.StateError, match="no folder"):
        prefilled.state_save(tmp_path / "no folder" / "state", TOKENS)
    with pytest.raises(errors.StateError):
        prefilled.state_set(b"")
    with pytest.raises(TypeError):
        prefilled.state_set("text")  # type: ignore[arg-type]
    (tmp_path / "short").write_bytes(b"gg")
    with pytest.raises(errors.StateError, match="truncated"):
        prefilled.state_load(tmp_path / "short")
    assert prefilled.memory.seq_pos_max(0) == 5


def test_300_damaged_states_are_restored_or_refused_and_end_nothing(tiny_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tiny_path), "300"],
        check=False,
        capture_output=True,
        text=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1] if lines else ''}: {done.stderr[-2000:]}"
    outcomes = Counter(words[2] for words in lines if words[0] == "end")
    assert outcomes.total() == 300
    assert outcomes["refused"] > 60
    assert outcomes["restored"] > 30
