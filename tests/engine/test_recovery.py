"""Signals, aborts and misuse between two steps lose nothing."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from engine_requests import (
    GREEDY,
    MakeScheduler,
    answer,
    answers,
    ask,
    finish,
    prompt_of,
    run,
)

from llama_crab import _core
from llama_crab.engine import Request
from llama_crab.errors import (
    ContextBusyError,
    DecodeAborted,
)


class Faulty:
    """A stepper whose n-th call of one method raises after (or before) it has worked."""

    def __init__(
        self, stepper: _core.Stepper, method: str, n: int, before: bool, error: BaseException
    ) -> None:
        self._stepper, self._method, self._left = stepper, method, n
        self._before, self._error = before, error

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stepper, name)
        if name != self._method:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0 and self._before:
                raise self._error
            result = found(*args, **kwargs)
            if self._left == 0:
                raise self._error
            return result

        return call


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    ("method", "n"), [("step", n) for n in range(1, 13)] + [("assign", n) for n in range(1, 6)]
)
def test_a_signal_inside_a_step_loses_nothing(
    make: MakeScheduler, method: str, n: int, before: bool
) -> None:
    def requests() -> list[Request]:
        return [
            ask(40, 6, stream=True), ask(10, 3, seed=1), ask(33, 5, seed=2, logprobs=1),
            ask(20, 4, seed=3, n=2, best_of=2),
        ]  # fmt: skip

    expected = requests()
    run(make(n_seq_max=2), *expected)
    scheduler = make(n_seq_max=2)
    scheduler.stepper = Faulty(  # type: ignore[assignment]
        scheduler.stepper, method, n, before, KeyboardInterrupt()
    )
    found = requests()
    for request in found:
        scheduler.submit(request)
    with pytest.raises(KeyboardInterrupt):
        finish(scheduler, *found)
    finish(scheduler, *found)
    for request, same in zip(found, expected, strict=True):
        assert request.error is None
        assert answers(request) == answers(same)
        assert [s.text for s in request.sequences] == [s.text for s in same.sequences]
        assert [s.finish_reason for s in request.sequences] == ["length"] * request.n
        assert len(request.sequences[0].logprobs) == len(same.sequences[0].logprobs)
    assert "".join(news.text for news in found[0].news) == found[0].sequences[0].text
    assert [t for news in found[0].news for t in news.tokens] == answers(found[0])[0]


def test_an_aborted_step_is_taken_again(make: MakeScheduler) -> None:
    expected = ask(100, 8)
    run(make(), expected)
    scheduler = make()
    request = ask(100, 8)
    scheduler.submit(request)
    n_aborted = 0
    while not request.done:
        if n_aborted < 5:
            scheduler.context.abort()
            scheduler.step()
            n_aborted += 1
            assert scheduler.stepper.n_steps == n_aborted - 1
        scheduler.step()
    assert answer(request) == answer(expected)
    assert scheduler.stepper.n_decoded == 107


def test_aborts_at_any_moment_change_no_answer(make: MakeScheduler) -> None:
    """Several micro-batches a step: some of an aborted step have run, and must not count."""

    def requests() -> list[Request]:
        return [
            ask(100 + 17 * n, 12, seed=n, logprobs=0, prompt_logprobs=n % 3 == 1) for n in range(16)
        ]

    shape = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": 4, "n_seq_max": 4, "n_outputs_max": 64,
             "flash_attn_type": "disabled", "type_k": "f32", "type_v": "f32"}  # fmt: skip
    expected, found = requests(), requests()
    run(make(**shape), *expected)
    scheduler = make(**shape)
    scheduler._budget = 64
    enough = threading.Event()
    n_aborts = 0

    def disturb() -> None:
        nonlocal n_aborts
        while not enough.wait(0.0004 * (1 + n_aborts % 7)) and n_aborts < 300:
            scheduler.context.abort()
            n_aborts += 1

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        run(scheduler, *found, limit=10000)
    finally:
        enough.set()
        thread.join()
    assert n_aborts > 3
    for request, same in zip(found, expected, strict=True):
        assert answer(request) == answer(same)
        (a,), (b,) = request.sequences, same.sequences
        for raw, other in [(a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)]:
            assert len(raw) == len(other)
            np.testing.assert_allclose(
                [entry[0] for entry in raw], [entry[0] for entry in other], atol=1e-4
            )
    assert len(found[1].sequences[0].prompt_logprobs) == 116


def test_a_context_in_use_elsewhere_is_refused_and_nothing_is_lost(make: MakeScheduler) -> None:
    scheduler = make()
    request = ask(20, 6)
    scheduler.submit(request)
    scheduler.step()
    with scheduler.context.logits(), pytest.raises(BufferError, match="alive"):
        scheduler.step()
    finish(scheduler, request)
    alone = ask(20, 6)
    run(make(), alone)
    assert answer(request) == answer(alone)


def test_a_running_slot_takes_no_second_request(make: MakeScheduler) -> None:
    scheduler = make()
    scheduler.submit(ask(20, 6))
    scheduler.step()
    options: dict[str, Any] = {
        "sampler": GREEDY.compile(scheduler.context.model, 1), "n_keep": 0, "leader": -1,
        "max_tokens": 1, "min_tokens": 0,
        "stop_tokens": (), "n_logprobs": -1, "prompt_logprobs": False, "ignore_eos": False,
        "special": False, "emit": False,
    }  # fmt: skip
    with pytest.raises(ContextBusyError, match="slot 0"):
        scheduler.stepper.assign(0, [1], **options)
    with pytest.raises(IndexError):
        scheduler.stepper.assign(1, [1], **options)


def test_decode_aborted_is_not_an_error_of_the_request(make: MakeScheduler) -> None:
    scheduler = make()
    scheduler.context.abort()
    scheduler.stepper.assign(
        0, prompt_of(10), sampler=GREEDY.compile(scheduler.context.model, 1), n_keep=0,
        leader=-1, max_tokens=2, min_tokens=0,
        stop_tokens=(), n_logprobs=-1, prompt_logprobs=False, ignore_eos=True, special=False,
        emit=False,
    )  # fmt: skip
    with pytest.raises(DecodeAborted):
        scheduler.stepper.step(32)
    assert scheduler.stepper.is_active(0)
    assert scheduler.stepper.progress(0)[2] == 0
