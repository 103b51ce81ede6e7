"""Memory: every operation on sequences, compared with what a fresh context would hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llama_crab import _core, errors

ONE: Any = {"n_threads": 1, "n_threads_batch": 1}
TOKENS = [1, 300, 301, 302, 303, 304, 305, 306]


def feed(context: _core.Context, tokens: Sequence[int], pos: int = 0, seq: int = 0) -> np.ndarray:
    """Decode `tokens` of one sequence; return the last one's logits."""
    with _core.Batch(64) as batch:
        batch.extend(tokens, pos, seq, "last")
        context.decode(batch)
    return np.array(context.logits())


def expected(model: _core.Model, tokens: Sequence[int]) -> np.ndarray:
    with _core.Context(model, n_ctx=64, **ONE) as context:
        return feed(context, tokens)


def test_positions_follow_the_tokens(tiny_context: _core.Context) -> None:
    memory = tiny_context.memory
    assert (memory.seq_pos_min(0), memory.seq_pos_max(0)) == (-1, -1)
    feed(tiny_context, TOKENS[:5], seq=2)
    assert (memory.seq_pos_min(2), memory.seq_pos_max(2)) == (0, 4)
    assert memory.seq_pos_max(0) == -1
    assert tiny_context.memory is memory


def test_a_removed_tail_is_forgotten(tiny: _core.Model, tiny_context: _core.Context) -> None:
    feed(tiny_context, [*TOKENS[:4], 9, 10, 11])
    assert tiny_context.memory.seq_rm(0, 4, -1)
    assert tiny_context.memory.seq_pos_max(0) == 3
    found = feed(tiny_context, TOKENS[4:], pos=4)
    np.testing.assert_allclose(found, expected(tiny, TOKENS), atol=5e-3)


def test_remove_from_one_and_from_all(tiny_context: _core.Context) -> None:
    memory = tiny_context.memory
    for seq in range(3):
        feed(tiny_context, TOKENS, seq=seq)
    assert memory.seq_rm(1)
    assert [memory.seq_pos_max(seq) for seq in range(3)] == [7, -1, 7]
    assert memory.seq_rm(-1, 4, -1)
    assert [memory.seq_pos_max(seq) for seq in range(3)] == [3, -1, 3]


@pytest.mark.parametrize("unified", [False, True])
def test_a_copied_sequence_continues_like_its_source(tiny: _core.Model, unified: bool) -> None:
    with _core.Context(tiny, n_ctx=64, n_seq_max=3, kv_unified=unified, **ONE) as context:
        feed(context, TOKENS[:5])
        context.memory.seq_cp(0, 2)
        assert context.memory.seq_pos_max(2) == 4
        found = feed(context, TOKENS[5:], pos=5, seq=2)
        np.testing.assert_allclose(found, expected(tiny, TOKENS), atol=5e-3)
        assert context.memory.seq_pos_max(0) == 4


def test_part_of_a_sequence_is_copied_only_in_a_unified_memory(tiny: _core.Model) -> None:
    with _core.Context(tiny, n_ctx=64, n_seq_max=2, kv_unified=True, **ONE) as context:
        feed(context, TOKENS)
        context.memory.seq_cp(0, 1, 0, 5)
        assert context.memory.seq_pos_max(1) == 4
        found = feed(context, TOKENS[5:], pos=5, seq=1)
        np.testing.assert_allclose(found, expected(tiny, TOKENS), atol=5e-3)
    with _core.Context(tiny, n_ctx=64, n_seq_max=2, **ONE) as context:
        feed(context, TOKENS)
        with pytest.raises(errors.StateError, match="kv_unified"):
            context.memory.seq_cp(0, 1, 0, 5)
        assert context.memory.seq_pos_max(1) == -1


def test_keep_forgets_the_others(tiny_context: _core.Context) -> None:
    for seq in range(4):
        feed(tiny_context, TOKENS, seq=seq)
    tiny_context.memory.seq_keep(2)
    found = [tiny_context.memory.seq_pos_max(seq) for seq in range(4)]
    assert found == [-1, -1, 7, -1]


def test_shifted_positions_move_and_still_attend(
    tiny: _core.Model, tiny_context: _core.Context
) -> None:
    """RoPE is relative: with all positions moved together the next logits stay the same."""
    memory = tiny_context.memory
    assert memory.can_shift
    feed(tiny_context, TOKENS[:5])
    memory.seq_add(0, 0, -1, 10)
    assert (memory.seq_pos_min(0), memory.seq_pos_max(0)) == (10, 14)
    found = feed(tiny_context, TOKENS[5:], pos=15)
    np.testing.assert_allclose(found, expected(tiny, TOKENS), atol=2e-2)


def test_divided_positions(tiny_context: _core.Context) -> None:
    feed(tiny_context, TOKENS)
    tiny_context.memory.seq_div(0, 4, -1, 2)
    assert tiny_context.memory.seq_pos_max(0) == 3
    with pytest.raises(ValueError, match="at least 1"):
        tiny_context.memory.seq_div(0, 0, -1, 0)


@pytest.mark.parametrize("data", [True, False])
def test_clear_forgets_everything(
    tiny: _core.Model, tiny_context: _core.Context, data: bool
) -> None:
    feed(tiny_context, [7, 8, 9])
    tiny_context.memory.clear(data)
    assert tiny_context.memory.seq_pos_max(0) == -1
    np.testing.assert_allclose(feed(tiny_context, TOKENS), expected(tiny, TOKENS), atol=5e-3)


def test_a_small_window_memory_tells_by_pos_min_what_it_has_lost(tiny_swa_path: object) -> None:
    with (
        _core.Model(str(tiny_swa_path)) as model,
        _core.Context(model, n_ctx=512, n_batch=64, swa_full=False, **ONE) as small,
        _core.Context(model, n_ctx=512, n_batch=64, swa_full=True, **ONE) as full,
    ):
        for context in (small, full):
            for start in range(0, 512, 64):
                feed(context, range(20 + start // 8, 84 + start // 8), pos=start)
        assert full.memory.seq_pos_min(0) == 0
        # It keeps the window and what fits beside it, and says so.
        assert 0 < small.memory.seq_pos_min(0) < 512 - model.n_swa
        assert small.memory.seq_pos_max(0) == 511


def test_sequences_outside_the_context_are_refused(tiny_context: _core.Context) -> None:
    memory = tiny_context.memory
    for bad in (4, -2, 1 << 40):
        for call in (memory.seq_rm, memory.seq_keep, memory.seq_pos_min, memory.seq_pos_max):
            with pytest.raises(errors.InvalidBatchError, match="n_seq_max"):
                call(bad)
        with pytest.raises(errors.InvalidBatchError):
            memory.seq_cp(0, bad)
        with pytest.raises(errors.InvalidBatchError):
            memory.seq_cp(bad, 0)
        with pytest.raises(errors.InvalidBatchError):
            memory.seq_add(bad, 0, -1, 1)
        with pytest.raises(errors.InvalidBatchError):
            memory.seq_div(bad, 0, -1, 2)


def test_memory_is_made_by_its_context_only() -> None:
    with pytest.raises(TypeError, match=r"context\.memory"):
        _core.Memory()
    empty = _core.Memory.__new__(_core.Memory)
    with pytest.raises(errors.ClosedError):
        empty.clear()
    with pytest.raises(errors.ClosedError):
        empty.seq_pos_max(0)
