"""What a request gives alone on a fresh context, in arithmetic that no batch changes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from llama_crab import _core
from llama_crab.engine import Request, Scheduler, Sequence
from llama_crab.engine.snapshots import SnapshotStore
from llama_crab.errors import KVCacheFullError

# With F32 in the cache and plain attention, sums of other batches differ by less than any two
# logits of a random model do.
EXACT: dict[str, Any] = {"flash_attn_type": "disabled", "type_k": "f32", "type_v": "f32"}
SHAPE: dict[str, Any] = {
    "n_ctx": 512,
    "n_batch": 64,
    "n_ubatch": 32,
    "n_threads": 1,
    "n_threads_batch": 1,
}


Known = dict[object, Sequence]


class Bench:
    """Schedulers over contexts of one model, and copies of requests run alone.

    `budget` is what a scheduler's snapshots may take, in bytes; None for no snapshots.
    """

    def __init__(self, model: _core.Model, known: Known | None = None, **fields: Any) -> None:
        self.model = model
        self._fields = {**SHAPE, **EXACT, **fields}
        self._contexts: list[_core.Context] = []
        self._known: Known = {} if known is None else known

    def scheduler(self, budget: int | None = None, **fields: Any) -> Scheduler:
        context = _core.Context(self.model, **{**self._fields, **fields})
        self._contexts.append(context)
        store = None if budget is None else SnapshotStore({}, budget)
        scheduler = Scheduler(context, store)
        # On so small a model it does not, and measuring it would make the tests depend on time.
        scheduler.cache._saving_pays = lambda: True  # type: ignore[method-assign]
        return scheduler

    def alone(self, request: Request, index: int = 0) -> Sequence:
        """Return answer `index` of a request as it is with nothing before or beside it."""
        key = (
            tuple(request.prompt), request.sampler, request.seed + index, request.max_tokens,
            request.stop, request.stop_tokens, request.logprobs, request.prompt_logprobs,
            request.ignore_eos, request.min_tokens,
        )  # fmt: skip
        if key not in self._known:
            single = replace(
                request, seed=request.seed + index, n=1, best_of=1, news=deque(), submit_us=0,
                end_us=0, deadline_us=0, priority=0, n_news_max=0, error=None, listener=None,
                on_end=None, adapters=0,
            )  # fmt: skip
            scheduler = self.scheduler()
            scheduler.submit(single)
            while not single.done:
                scheduler.step()
            assert single.error is None
            scheduler.context.close()
            (self._known[key],) = single.sequences
        return self._known[key]

    def close(self) -> None:
        for context in self._contexts:
            context.close()


def check(bench: Bench, *requests: Request) -> None:
    """Compare all that requests have given with what they give alone."""
    for request in requests:
        assert request.done
        assert request.error is None
        for sequence in request.sequences:
            _check_sequence(sequence, bench.alone(request, sequence.index))


def check_beginning(bench: Bench, request: Request) -> list[int]:
    """Compare a request that was ended early with the beginning of its whole answer."""
    assert request.done
    for sequence in request.sequences:
        whole = bench.alone(request, sequence.index)
        assert sequence.tokens == whole.tokens[: len(sequence.tokens)]
        assert whole.text.startswith(sequence.text.rstrip("\ufffd"))
        assert len(sequence.logprobs) == len(whole.logprobs[: len(sequence.tokens)])
        _check_news(sequence)
    return [len(sequence.tokens) for sequence in request.sequences]


def _check_sequence(found: Sequence, expected: Sequence) -> None:
    assert found.tokens == expected.tokens
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.stop_reason == expected.stop_reason
    pairs = [
        (found.logprobs, expected.logprobs),
        (found.prompt_logprobs, expected.prompt_logprobs),
    ]
    for raw, other in pairs:
        assert len(raw) == len(other)
        for (value, top), (same, same_top) in zip(raw, other, strict=True):
            assert abs(value - same) < 1e-3
            assert [token for token, _ in top] == [token for token, _ in same_top]
            values = [v for _, v in top], [v for _, v in same_top]
            np.testing.assert_allclose(*values, atol=1e-3)
    _check_news(found)


def _check_news(sequence: Sequence) -> None:
    """Compare what a streaming reader has got with the answer: all of it, once and in order."""
    request = sequence.request
    if request.stream:
        news = [news for news in request.news if news.sequence is sequence]
        assert "".join(item.text for item in news) == sequence.text
        assert [token for item in news for token in item.tokens] == sequence.tokens
        assert [item.last for item in news] == [False] * (len(news) - 1) + [True]
        if request.logprobs is not None:
            assert [entry for item in news for entry in item.logprobs] == sequence.logprobs


def check_at_rest(scheduler: Scheduler, swap_bytes: int) -> None:
    """Nothing runs or waits, and what was lent is back."""
    assert (scheduler.n_running, scheduler.n_waiting) == (0, 0)
    assert scheduler.any_request() is None
    assert scheduler._swap.n_bytes_left == swap_bytes
    assert not scheduler._held
    assert not scheduler._priorities
    assert not any(map(scheduler.stepper.is_active, range(scheduler.stepper.n_slots)))


def count_free_cells(scheduler: Scheduler) -> int:
    """Return how many tokens a unified cache takes until llama.cpp refuses; they stay in it."""
    context = scheduler.context
    first = context.memory.seq_pos_max(0) + 1
    batch = _core.Batch(1)
    for n in range(context.n_ctx + 1):
        batch.clear()
        batch.add(300, first + n, [0], True)
        try:
            context.decode(batch)
        except KVCacheFullError:
            return n
    raise AssertionError("the cache is larger than it says")
