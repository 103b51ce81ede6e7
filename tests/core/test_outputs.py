"""Logits and Embeddings: views without a copy, and what is refused while one is alive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llama_crab import _core


@pytest.fixture
def decoded(tiny_context: _core.Context) -> _core.Context:
    """Return a context with 4 output rows."""
    with _core.Batch(4) as batch:
        batch.extend([1, 300, 301, 302], 0, 0, "all")
        tiny_context.decode(batch)
    return tiny_context


def step(context: _core.Context) -> None:
    with _core.Batch(1) as batch:
        batch.extend([5], context.memory.seq_pos_max(0) + 1, 0, "last")
        context.decode(batch)


def test_arrays_share_the_contexts_memory(decoded: _core.Context) -> None:
    first, second = np.asarray(decoded.logits(0)), np.asarray(decoded.logits(0))
    address = first.__array_interface__["data"][0]
    assert address == second.__array_interface__["data"][0]
    # The rows of one decode lie one after the other.
    n_vocab = decoded.model.vocab.n_tokens
    for i in range(4):
        row = np.asarray(decoded.logits(i))
        assert row.__array_interface__["data"][0] == address + i * n_vocab * 4
    assert first.dtype == np.float32
    assert (first.shape, first.flags.writeable) == ((n_vocab,), False)


def test_negative_indices_count_from_the_end(decoded: _core.Context) -> None:
    for i in range(4):
        np.testing.assert_array_equal(np.asarray(decoded.logits(i - 4)), decoded.logits(i))


def test_copies_equal_the_views_and_stand_alone(decoded: _core.Context) -> None:
    n_vocab = decoded.model.vocab.n_tokens
    out = np.empty(n_vocab, np.float32)
    assert decoded.copy_logits(out, 2) is out
    with decoded.logits(2) as row:
        np.testing.assert_array_equal(out, row)
    before = out.copy()
    step(decoded)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize(
    "out",
    [np.empty(3, np.float32), np.empty(759, np.float64), np.empty(759, np.int32), bytearray(4)],
)
def test_copies_into_unfit_buffers_are_refused(decoded: _core.Context, out: Any) -> None:
    with pytest.raises(ValueError, match="float32 buffer of 759"):
        decoded.copy_logits(out)
    locked = np.empty(759, np.float32)
    locked.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        decoded.copy_logits(locked)


def test_rows_that_were_not_asked_for_are_index_errors(tiny_context: _core.Context) -> None:
    with pytest.raises(IndexError):
        tiny_context.logits()
    with _core.Batch(4) as batch:
        batch.extend([1, 2, 3, 4], 0, 0, "last")
        tiny_context.decode(batch)
    assert len(tiny_context.logits(3)) == 759
    for i in (0, 4, 1 << 30, -2, -(1 << 31)):
        with pytest.raises(IndexError):
            tiny_context.logits(i)


CHANGES: list[Callable[[_core.Context], object]] = [
    step,
    lambda context: context.close(),
    lambda context: context.state_set(context.state_get()),
    lambda context: context.set_adapters({}),
    lambda context: context.set_control_vector(None),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_refused_while_a_buffer_is_alive(
    tiny: _core.Model, change: Callable[[_core.Context], object]
) -> None:
    with _core.Context(tiny, n_ctx=64, n_threads=1, n_threads_batch=1) as context:
        step(context)
        row = np.asarray(context.logits())
        expected = row.copy()
        with pytest.raises(BufferError, match=r"1 buffer.*with ctx\.logits.*copy_logits.*in C"):
            change(context)
        np.testing.assert_array_equal(row, expected)
        del row
        change(context)


def test_a_view_without_a_buffer_hinders_nothing(decoded: _core.Context) -> None:
    view = decoded.logits()
    step(decoded)
    with pytest.raises(BufferError, match="stale"):
        bytes(view)
    with pytest.raises(BufferError, match="stale"):
        memoryview(view)
    with pytest.raises(BufferError, match="stale"), view:
        pass


def test_with_gives_the_buffer_for_a_block(decoded: _core.Context) -> None:
    view = decoded.logits()
    with view as outer, view as inner:
        assert (outer.format, outer.nbytes, outer.readonly) == ("f", 759 * 4, True)
        assert outer[5] == inner[5]
        with pytest.raises(BufferError):
            step(decoded)
    step(decoded)


def test_slices_of_a_buffer_keep_it_alive(decoded: _core.Context) -> None:
    part = np.asarray(decoded.logits())[10:20]
    gc.collect()
    with pytest.raises(BufferError):
        step(decoded)
    del part
    step(decoded)


def test_a_buffer_outlives_every_other_reference(tiny: _core.Model) -> None:
    context = _core.Context(tiny, n_ctx=64, n_threads=1, n_threads_batch=1)
    step(context)
    row = np.asarray(context.logits())
    expected = row.copy()
    before = _core.live_handles()["contexts"]
    del context
    gc.collect()
    assert _core.live_handles()["contexts"] == before
    np.testing.assert_array_equal(row, expected)
    del row
    gc.collect()
    assert _core.live_handles()["contexts"] == before - 1


def test_views_cannot_be_made_by_hand(decoded: _core.Context) -> None:
    for kind in (_core.Logits, _core.Embeddings):
        with pytest.raises(TypeError, match=r"Context\.logits"):
            kind()
        with pytest.raises(BufferError):
            memoryview(kind.__new__(kind))
    view = decoded.logits()
    assert (len(view), view.shape) == (759, (759,))
    assert repr(view) == "<Logits shape=(759,) float32>"


def test_token_embeddings_explain_the_logits(tiny: _core.Model, tiny_path: object) -> None:
    """With pooling none an embedding is the final hidden state: the output matrix times it."""
    import gguf

    output = {t.name: t.data for t in gguf.GGUFReader(str(tiny_path)).tensors}["output.weight"]
    with (
        _core.Context(
            tiny, n_ctx=64, embeddings=True, pooling_type="none", n_threads=1, n_threads_batch=1
        ) as context,
        _core.Batch(4) as batch,
    ):
        assert context.embeddings_enabled
        batch.extend([1, 300, 301], 0, 0, "all")
        context.decode(batch)
        for i in range(3):
            hidden = context.copy_embeddings(np.empty(64, np.float32), i)
            with context.embeddings(i) as row:
                np.testing.assert_array_equal(hidden, row)
            np.testing.assert_allclose(output @ hidden, np.array(context.logits(i)), atol=1e-3)
        context.embeddings_enabled = False
        assert not context.embeddings_enabled


def test_pooled_embeddings_are_the_mean_and_the_last(tiny: _core.Model) -> None:
    rows: dict[str, np.ndarray] = {}
    for pooling in ("none", "mean", "last", "cls"):
        anything: Any = {"pooling_type": pooling}
        with (
            _core.Context(
                tiny, n_ctx=64, embeddings=True, n_threads=1, n_threads_batch=1, **anything
            ) as context,
            _core.Batch(4) as batch,
        ):
            batch.extend([1, 300, 301], 0, 0, "all")
            context.decode(batch)
            if pooling == "none":
                rows["each"] = np.array([np.array(context.embeddings(i)) for i in range(3)])
                with pytest.raises(IndexError):
                    context.embeddings_seq(0)
            else:
                rows[pooling] = np.array(context.embeddings_seq(0))
                with pytest.raises(IndexError, match=pooling):
                    context.embeddings(0)
    np.testing.assert_allclose(rows["mean"], rows["each"].mean(0), atol=1e-4)
    np.testing.assert_allclose(rows["last"], rows["each"][2], atol=1e-4)
    np.testing.assert_allclose(rows["cls"], rows["each"][0], atol=1e-4)
