"""Batch: filling from every kind of sequence, limits, reuse."""

from __future__ import annotations

import array
import pickle

import numpy as np
import pytest

from llama_crab import _core, errors


def test_capacity_is_kept_and_clear_makes_room() -> None:
    with _core.Batch(3) as batch:
        batch.extend([5, 6, 7], 0, 0, "none")
        assert (len(batch), batch.capacity, batch.n_outputs) == (3, 3, 0)
        with pytest.raises(errors.InvalidBatchError, match=r"3 \+ 1 tokens"):
            batch.add(8, 3, [0], False)
        with pytest.raises(errors.InvalidBatchError, match=r"3 \+ 2 tokens"):
            batch.extend([8, 9], 3, 0, "none")
        assert len(batch) == 3
        batch.clear()
        assert len(batch) == 0
        batch.extend([1, 2], 0, 0, "all")
        assert batch.n_outputs == 2


@pytest.mark.parametrize(("logits", "n"), [("last", 1), ("all", 4), ("none", 0)])
def test_extend_asks_for_the_rows_named(logits: str, n: int) -> None:
    anything: object = logits
    with _core.Batch(8) as batch:
        batch.extend([1, 2, 3, 4], 0, 0, anything)  # type: ignore[arg-type]
        assert batch.n_outputs == n


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        lambda ids: array.array("i", ids),
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, np.int64),
        lambda ids: memoryview(array.array("i", ids)),
        lambda ids: np.repeat(np.array(ids, np.int32), 3)[::3],
    ],
)
def test_tokens_of_every_kind_give_the_same_logits(
    tiny_context: _core.Context, make: object
) -> None:
    ids = [1, 300, 301, 302]
    with _core.Batch(8) as batch:
        batch.extend(ids, 0, 0, "last")
        tiny_context.decode(batch)
        expected = np.array(tiny_context.logits())
        tiny_context.memory.clear()
        batch.clear()
        batch.extend(make(ids), 0, 0, "last")  # type: ignore[operator]
        tiny_context.decode(batch)
        np.testing.assert_array_equal(np.array(tiny_context.logits()), expected)


def test_add_and_extend_are_the_same(tiny_context: _core.Context) -> None:
    with _core.Batch(8) as one, _core.Batch(8) as other:
        one.extend([1, 2, 3], 0, 0, "last")
        for pos, token in enumerate([1, 2, 3]):
            other.add(token, pos, [0], pos == 2)
        tiny_context.decode(one)
        expected = np.array(tiny_context.logits())
        tiny_context.memory.clear()
        tiny_context.decode(other)
        np.testing.assert_array_equal(np.array(tiny_context.logits()), expected)


def test_a_token_shared_by_sequences_is_in_each(tiny: _core.Model) -> None:
    with (
        _core.Context(
            tiny, n_ctx=64, n_seq_max=4, kv_unified=True, n_threads=1, n_threads_batch=1
        ) as context,
        _core.Batch(8, 4) as batch,
    ):
        for pos in range(3):
            batch.add(5 + pos, pos, [0, 2, 3], pos == 2)
        context.decode(batch)
        found = [context.memory.seq_pos_max(seq) for seq in range(4)]
        assert found == [2, -1, 2, 2]


def test_embedding_rows_give_what_their_tokens_give(
    tiny: _core.Model, tiny_path: object, tiny_context: _core.Context
) -> None:
    import gguf

    tensors = {t.name: t.data for t in gguf.GGUFReader(str(tiny_path)).tensors}
    rows = np.array(tensors["token_embd.weight"])[[1, 300, 301]]
    with _core.Batch(8) as tokens, _core.Batch(8, 1, tiny.n_embd) as embeddings:
        tokens.extend([1, 300, 301], 0, 0, "last")
        tiny_context.decode(tokens)
        expected = np.array(tiny_context.logits())
        tiny_context.memory.clear()
        embeddings.extend_embeddings(rows[:2], 0, 0, "none")
        embeddings.extend_embeddings(rows[2], 2, 0, "last")
        tiny_context.decode(embeddings)
        np.testing.assert_allclose(np.array(tiny_context.logits()), expected, atol=1e-5)


def test_embedding_batches_are_checked(tiny_context: _core.Context) -> None:
    with _core.Batch(4, 1, 64) as batch:
        with pytest.raises(errors.InvalidBatchError, match="float32"):
            batch.extend_embeddings(np.zeros((1, 64), np.float64), 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="columns"):
            batch.extend_embeddings(np.zeros((2, 32), np.float32), 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="do not fit"):
            batch.extend_embeddings(np.zeros((5, 64), np.float32), 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="use extend_embeddings"):
            batch.extend([1], 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="use extend_embeddings"):
            batch.add(1, 0, [0], True)
    with _core.Batch(4) as batch, pytest.raises(errors.InvalidBatchError, match="use extend"):
        batch.extend_embeddings(np.zeros((1, 64), np.float32), 0, 0, "last")
    with _core.Batch(4, 1, 32) as narrow:
        narrow.extend_embeddings(np.zeros((1, 32), np.float32), 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="the model takes 64"):
            tiny_context.decode(narrow)


def test_values_outside_their_range_are_refused() -> None:
    for bad in (0, -1, 1 << 30):
        with pytest.raises(ValueError, match="capacity"):
            _core.Batch(bad)
    with pytest.raises(ValueError, match="n_seq_max"):
        _core.Batch(1, 1 << 20)
    with pytest.raises(TypeError):
        _core.Batch("3")  # type: ignore[arg-type]
    with _core.Batch(4, 2) as batch:
        with pytest.raises(ValueError, match="token"):
            batch.add(-1, 0, [0], False)
        with pytest.raises(ValueError, match="pos"):
            batch.add(1, -1, [0], False)
        with pytest.raises(ValueError, match="seq_id"):
            batch.add(1, 0, [-1], False)
        with pytest.raises(errors.InvalidBatchError, match="2 sequences"):
            batch.add(1, 0, [0, 1, 2], False)
        with pytest.raises(errors.InvalidBatchError, match="empty"):
            batch.add(1, 0, [], False)
        with pytest.raises(ValueError, match="'last', 'all', 'none'"):
            batch.extend([1], 0, 0, "some")  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidTokenError):
            batch.extend([1 << 40], 0, 0, "last")
        with pytest.raises(TypeError):
            batch.extend([1.5], 0, 0, "last")  # type: ignore[list-item]
        with pytest.raises(ValueError, match="pos"):
            batch.extend([1, 2], (1 << 31) - 2, 0, "last")
        assert len(batch) == 0


def test_batches_are_not_pickled() -> None:
    with _core.Batch(1) as batch, pytest.raises(TypeError, match="pickled"):
        pickle.dumps(batch)
