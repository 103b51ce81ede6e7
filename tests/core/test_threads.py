"""Thread counts: what is asked is what runs, at creation and later."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from llama_crab import _core


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def logits(context: _core.Context) -> np.ndarray:
    context.memory.clear()
    with _core.Batch(8) as batch:
        batch.extend([1, 300, 301], 0, 0, "last")
        context.decode(batch)
        batch.clear()
        batch.extend([302], 3, 0, "last")
        context.decode(batch)
    return np.array(context.logits())


@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (1, 3), (3, 1)])
def test_counts_are_reported_and_do_not_change_results(
    tiny: _core.Model, counts: tuple[int, int]
) -> None:
    with (
        _core.Context(tiny, n_ctx=64, n_threads=counts[0], n_threads_batch=counts[1]) as context,
        _core.Context(tiny, n_ctx=64, n_threads=1, n_threads_batch=1) as single,
    ):
        assert (context.n_threads, context.n_threads_batch) == counts
        np.testing.assert_allclose(logits(context), logits(single), atol=1e-4)


def test_counts_can_change_between_decodes(tiny: _core.Model) -> None:
    with _core.Context(tiny, n_ctx=64, n_threads=1, n_threads_batch=1) as context:
        expected = logits(context)
        for counts in ((2, 2), (1, 2), (2, 1), (1, 1)):
            context.set_n_threads(*counts)
            assert (context.n_threads, context.n_threads_batch) == counts
            np.testing.assert_allclose(logits(context), expected, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the tasks of /proc")
@pytest.mark.parametrize(("counts", "n_new"), [((1, 1), 0), ((3, 3), 2), ((2, 4), 4)])
def test_one_pool_for_equal_counts_two_for_different_ones(
    tiny: _core.Model, counts: tuple[int, int], n_new: int
) -> None:
    before = threads_of_this_process()
    with _core.Context(tiny, n_ctx=64, n_threads=counts[0], n_threads_batch=counts[1]) as context:
        # The calling thread is one of each pool; decoding must start no more.
        assert threads_of_this_process() == before + n_new
        logits(context)
        assert threads_of_this_process() == before + n_new
    assert threads_of_this_process() == before


@pytest.mark.parametrize("bad", [0, -1, 1 << 20])
def test_counts_outside_ggmls_range_are_refused(tiny_context: _core.Context, bad: int) -> None:
    with pytest.raises(ValueError, match="n_threads="):
        tiny_context.set_n_threads(bad, 1)
    with pytest.raises(ValueError, match="n_threads_batch="):
        tiny_context.set_n_threads(1, bad)
    assert (tiny_context.n_threads, tiny_context.n_threads_batch) == (1, 1)
