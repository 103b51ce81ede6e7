"""Who is served first, who has to give way, and who is told to stop: nothing of it changes text."""

from __future__ import annotations

from typing import Any

import pytest
from engine_requests import answers, ask, finish, prompt_of, slot_of
from fresh_runs import Bench, check, check_at_rest, check_beginning

from llama_crab import _core
from llama_crab.engine import Request, Scheduler
from llama_crab.errors import RequestTimeoutError
from llama_crab.sampling import SamplerChain

SECOND = 1_000_000
SPLIT = {"n_ctx": 1024, "n_seq_max": 2}
UNIFIED = {"n_ctx": 1024, "n_seq_max": 2, "kv_unified": True}
SHAPES = pytest.mark.parametrize("shape", [SPLIT, UNIFIED], ids=["split", "unified"])

# Few candidates: the more there are, the more often a draw falls between two of them.
WORDS = SamplerChain().grammar('root ::= ([a-z]+ " ")+').top_k(10).temp(0.9)
DRAWN = SamplerChain().penalties(32, 1.3, 0.2, 0.1).top_k(10).temp(1.1)


def finishing_order(scheduler: Scheduler, *requests: Request) -> list[Request]:
    """Step until all have ended; return them in the order in which they did."""
    ended: dict[Request, None] = {}
    for _ in range(5000):
        ended.update({request: None for request in requests if request.done})
        if len(ended) == len(requests):
            return list(ended)
        scheduler.step()
    raise AssertionError("not done after 5000 steps")


def step_until_generated(scheduler: Scheduler, request: Request, n: int) -> None:
    for _ in range(500):
        if scheduler.stepper.progress(slot_of(request))[3] >= n:
            return
        scheduler.step()
    raise AssertionError("it does not get there")


def test_the_queue_goes_by_priority_then_deadline_then_arrival(bench: Bench) -> None:
    now = _core.time_us()
    fields: list[dict[str, Any]] = [
        {"submit_us": now},
        {"submit_us": now + 1},
        {"submit_us": now + 2, "priority": 1},
        # Within 5 s it is 5 s more urgent than what has just come.
        {"submit_us": now + 3, "deadline_us": now + 5 * SECOND},
        {"submit_us": now - 1, "priority": -1},
        {"submit_us": now + 4, "priority": 2},
        # A deadline far away changes nothing.
        {"submit_us": now + 5, "deadline_us": now + 3600 * SECOND},
    ]
    requests = [ask(20, 2, seed=seed, **some) for seed, some in enumerate(fields)]
    scheduler = bench.scheduler()
    for request in requests:
        scheduler.submit(request)
    order = finishing_order(scheduler, *requests)
    assert [requests.index(request) for request in order] == [5, 2, 3, 0, 1, 6, 4]
    assert scheduler.n_suspended == 0
    check(bench, *requests)


@pytest.mark.parametrize(("waited", "first"), [(9, "high"), (11, "low")])
def test_ten_seconds_of_waiting_weigh_as_much_as_a_unit_of_priority(
    bench: Bench, waited: int, first: str
) -> None:
    scheduler = bench.scheduler()
    now = _core.time_us()
    low = ask(20, 4, submit_us=now - waited * SECOND)
    high = ask(20, 4, seed=1, submit_us=now, priority=1)
    scheduler.submit(high)
    scheduler.submit(low)
    names = {low: "low", high: "high"}
    order = [names[request] for request in finishing_order(scheduler, low, high)]
    assert order[0] == first
    check(bench, low, high)


def test_a_stream_of_urgent_requests_makes_a_low_one_late_and_not_last(bench: Bench) -> None:
    """Whenever one urgent request ends, two more have come; the low one has waited an hour."""
    scheduler = bench.scheduler()
    low = ask(40, 12, submit_us=_core.time_us() - 3600 * SECOND)
    urgent = [ask(20, 3, seed=n, priority=1) for n in range(1, 20)]
    scheduler.submit(low)
    for request in urgent:
        scheduler.submit(request)
    order = finishing_order(scheduler, low, *urgent)
    n_before = order.index(low)
    assert n_before < len(urgent)
    check(bench, low, *urgent)


def stop_string(bench: Bench, prompt: list[int]) -> str:
    """Return what an answer says across the border of two tokens, some way into it."""
    whole = bench.alone(ask(prompt=prompt, n_tokens=16))
    vocab = bench.model.vocab
    ends: list[int] = []
    text = b""
    for token in whole.tokens:
        text += vocab.piece(token, False)
        ends.append(len(text))
    for at in range(10, 15):
        stop = text[ends[at] - 1 : ends[at] + 1]
        if len(stop) == 2 and stop.isascii() and text.find(stop) == ends[at] - 1:
            return stop.decode()
    raise AssertionError("no stop string in this answer")


def kinds(bench: Bench) -> dict[str, Request]:
    """Return requests whose samplers and readers remember something between two tokens."""
    for seed in range(100):
        try:
            stopped = prompt_of(70, 50 + seed)
            stop = stop_string(bench, stopped)
            break
        except AssertionError:
            continue
    return {
        "greedy": ask(70, 16),
        "drawn": ask(70, 16, seed=1, sampler=DRAWN, logprobs=3, stream=True),
        "grammar": ask(70, 16, seed=2, sampler=WORDS, ignore_eos=False, stream=True),
        "stopped": ask(prompt=stopped, n_tokens=16, stop=(stop, "no such"), stream=True),
        "prompt logprobs": ask(70, 16, seed=4, logprobs=2, prompt_logprobs=True),
        "min tokens": ask(70, 16, seed=5, min_tokens=9, ignore_eos=False, stop_tokens=(300, 400)),
    }


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "computed again"])
@SHAPES
@pytest.mark.parametrize(
    "kind", ["greedy", "drawn", "grammar", "stopped", "prompt logprobs", "min tokens"]
)
def test_a_request_that_gave_way_at_any_moment_goes_on_unchanged(
    bench: Bench, kind: str, shape: dict[str, Any], swap: bool
) -> None:
    expected_stop = {"stopped": "stop"}.get(kind)
    for n_steps in (1, 2, 4, 9):
        scheduler = bench.scheduler(**shape)
        if not swap:
            scheduler._swap.n_bytes_left = 0
        swap_bytes = scheduler._swap.n_bytes_left
        low, other = kinds(bench)[kind], ask(30, 40, seed=7, priority=1)
        scheduler.submit(other)
        scheduler.submit(low)
        for _ in range(n_steps):
            scheduler.step()
        assert not low.done
        high = ask(50, 6, seed=8, priority=1)
        scheduler.submit(high)
        scheduler.step()
        assert low.sequences[0].slot is None
        assert low.sequences[0].suspension is not None
        has_state = low.sequences[0].suspension.state is not None
        assert has_state == (swap and low.sequences[0].suspension.n_past >= 32)
        assert other.sequences[0].slot is not None
        assert scheduler.stepper.progress(slot_of(high))[2] > 0
        assert (scheduler.n_running, scheduler.n_waiting, scheduler.n_suspended) == (2, 1, 1)
        # Even so again while it goes on.
        finish(scheduler, high)
        again = ask(40, 3, seed=9, priority=1)
        scheduler.step()
        scheduler.submit(again)
        finish(scheduler, low, other, again)
        assert scheduler.n_suspended == 2
        check(bench, low, other, high, again)
        assert expected_stop in (None, low.sequences[0].finish_reason)
        check_at_rest(scheduler, swap_bytes)


def test_nothing_is_computed_again_where_the_state_was_kept(bench: Bench) -> None:
    decoded = {}
    for swap in (True, False):
        scheduler = bench.scheduler()
        if not swap:
            scheduler._swap.n_bytes_left = 0
        low, high = ask(100, 10), ask(60, 5, seed=1, priority=1)
        scheduler.submit(low)
        scheduler.step()
        step_until_generated(scheduler, low, 4)
        scheduler.submit(high)
        finish(scheduler, low, high)
        decoded[swap] = scheduler.stepper.n_decoded
        check(bench, low, high)
    needed = 100 + 9 + 60 + 4
    assert decoded[True] == needed
    # Prompt and three tokens; the fourth had not been decoded yet.
    assert decoded[False] == needed + 103


def test_the_latest_of_the_lowest_gives_way_and_no_more_than_are_needed(bench: Bench) -> None:
    scheduler = bench.scheduler(n_ctx=2048, n_seq_max=4)
    lows = [ask(10 + n, 40, seed=n) for n in range(3)]
    lowest = ask(10, 40, seed=4, priority=-1)
    for request in (lows[0], lowest, *lows[1:]):
        scheduler.submit(request)
        scheduler.step()
    first, second = ask(8, 20, seed=5, priority=3), ask(8, 20, seed=6, priority=3)

    def suspended() -> list[Request]:
        return [r for r in (*lows, lowest) if r.sequences[0].suspension is not None]

    scheduler.submit(first)
    scheduler.step()
    assert suspended() == [lowest]
    scheduler.submit(second)
    scheduler.step()
    assert suspended() == [lows[2], lowest]
    finish(scheduler, first, second, *lows, lowest)
    assert scheduler.n_suspended == 2
    check(bench, first, second, *lows, lowest)


def test_nobody_gives_way_to_an_equal_or_where_a_slot_is_free(bench: Bench) -> None:
    scheduler = bench.scheduler(**SPLIT)
    one = ask(10, 30, priority=1)
    scheduler.submit(one)
    scheduler.step()
    beside = ask(10, 10, seed=1, priority=5)
    scheduler.submit(beside)
    scheduler.step()
    assert one.sequences[0].slot is not None
    assert beside.sequences[0].slot is not None
    equal, lower = ask(10, 3, seed=2, priority=1), ask(10, 3, seed=3)
    scheduler.submit(equal)
    scheduler.submit(lower)
    finish(scheduler, one, beside, equal, lower)
    assert scheduler.n_suspended == 0
    check(bench, one, beside, equal, lower)


@SHAPES
def test_answers_of_one_request_give_way_one_by_one(bench: Bench, shape: dict[str, Any]) -> None:
    for n_steps in (1, 2, 4, 8):
        scheduler = bench.scheduler(**{**shape, "n_ctx": 1536, "n_seq_max": 3})
        swap_bytes = scheduler._swap.n_bytes_left
        low = ask(90, 12, sampler=DRAWN, n=3, best_of=3)
        scheduler.submit(low)
        for _ in range(n_steps):
            scheduler.step()
        high = ask(40, 4, seed=1, priority=1)
        scheduler.submit(high)
        scheduler.step()
        assert [s.slot is None for s in low.sequences].count(True) == 1
        finish(scheduler, high, low)
        check(bench, high, low)
        check_at_rest(scheduler, swap_bytes)
        assert len({tuple(tokens) for tokens in answers(low)}) == 3


def test_an_urgent_request_gets_the_cells_of_those_that_can_wait(bench: Bench) -> None:
    """A slot is free, but the cells are not."""
    scheduler = bench.scheduler(n_ctx=256, n_seq_max=3, kv_unified=True)
    low = ask(180, 60)
    scheduler.submit(low)
    scheduler.step()
    step_until_generated(scheduler, low, 1)
    high = ask(100, 3, seed=1, priority=100)
    scheduler.submit(high)
    finish(scheduler, high)
    assert not low.done
    finish(scheduler, low)
    check(bench, low, high)


def late(request: Request) -> Request:
    """Let a request's time be over now."""
    assert request.deadline_us
    request.deadline_us = _core.time_us() - 1
    return request


def timed(n_prompt: int, n_tokens: int, **fields: Any) -> Request:
    return ask(n_prompt, n_tokens, deadline_us=_core.time_us() + 3600 * SECOND, **fields)


def assert_timed_out(bench: Bench, request: Request) -> list[int]:
    error = request.error
    assert isinstance(error, RequestTimeoutError)
    assert isinstance(error, TimeoutError)
    assert [s.finish_reason for s in request.sequences] == ["cancelled"] * request.best_of
    assert request.end_us
    return check_beginning(bench, request)


@SHAPES
def test_a_deadline_ends_a_running_request_within_a_step(
    bench: Bench, shape: dict[str, Any]
) -> None:
    scheduler = bench.scheduler(**shape)
    request, other = timed(50, 40, stream=True), ask(20, 20, seed=1)
    scheduler.submit(request)
    scheduler.submit(other)
    scheduler.step()
    step_until_generated(scheduler, request, 6)
    late(request)
    scheduler.step()
    assert assert_timed_out(bench, request) == [6]
    finish(scheduler, other)
    check(bench, other)


def test_a_deadline_ends_waiting_suspended_and_parked_requests(bench: Bench) -> None:
    scheduler = bench.scheduler(n_ctx=512, n_seq_max=1)
    swap_bytes = scheduler._swap.n_bytes_left
    suspended = timed(60, 30, stream=True)
    scheduler.submit(suspended)
    scheduler.step()
    step_until_generated(scheduler, suspended, 3)
    parked = timed(50, 30, seed=1, stream=True, n_news_max=4, priority=1)
    scheduler.submit(parked)
    while parked.sequences[0] not in scheduler._held:
        scheduler.step()
    running, waiting = ask(20, 60, seed=2, priority=2), timed(10, 5, seed=3)
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.step()
    assert [r.sequences[0].slot for r in (suspended, parked, waiting)] == [None] * 3
    assert parked.sequences[0] in scheduler._parked
    assert scheduler._swap.n_bytes_left < swap_bytes
    for request in (suspended, parked, waiting):
        late(request)
    scheduler.step()
    assert [
        assert_timed_out(bench, request) for request in (suspended, parked, waiting)
    ] == [[3], [4], [0]]  # fmt: skip
    assert waiting.sequences[0].text == ""
    assert scheduler.n_waiting == 0
    finish(scheduler, running)
    check(bench, running)
    check_at_rest(scheduler, swap_bytes)
    assert not scheduler._deadlines


def test_many_batches_in_one_call_end_at_the_deadline(bench: Bench) -> None:
    scheduler = bench.scheduler(n_ctx=4096)
    request = ask(20, None, deadline_us=_core.time_us() + 20_000)
    scheduler.submit(request)
    # Without it the call would go on to the end of the context.
    scheduler.step(1_000_000)
    scheduler.step()
    assert isinstance(request.error, RequestTimeoutError)
    assert len(request.sequences[0].tokens) < 4000


def test_a_request_that_was_done_in_time_is_left_alone(bench: Bench) -> None:
    scheduler = bench.scheduler()
    request = timed(20, 3)
    scheduler.submit(request)
    finish(scheduler, request)
    late(request)
    other = ask(20, 3, seed=1)
    scheduler.submit(other)
    finish(scheduler, other)
    check(bench, request, other)
    assert not scheduler._deadlines


@SHAPES
def test_cancel_keeps_what_was_generated_wherever_the_request_is(
    bench: Bench, shape: dict[str, Any]
) -> None:
    scheduler = bench.scheduler(**shape)
    swap_bytes = scheduler._swap.n_bytes_left
    suspended = ask(60, 40, sampler=DRAWN, logprobs=1, stream=True)
    held = ask(50, 40, seed=1, stream=True, n_news_max=5, priority=1)
    scheduler.submit(suspended)
    scheduler.submit(held)
    while held.sequences[0] not in scheduler._held:
        scheduler.step()
    n_suspended = scheduler.stepper.progress(slot_of(suspended))[3]
    scheduler.cancel(held)  # in its slot, out of the batches
    assert check_beginning(bench, held) == [5]
    parked = ask(50, 40, seed=2, stream=True, n_news_max=5, priority=1)
    scheduler.submit(parked)
    while parked.sequences[0] not in scheduler._held:
        scheduler.step()
    n_suspended = scheduler.stepper.progress(slot_of(suspended))[3]
    # First the one that is held has to go, then the one of low priority.
    urgent = [ask(20, 30, seed=seed, priority=2) for seed in (3, 4)]
    for request in urgent:
        scheduler.submit(request)
    scheduler.step()
    assert parked.sequences[0] in scheduler._parked
    assert suspended.sequences[0].suspension is not None
    waiting = ask(20, 5, seed=5, n=2, best_of=2)
    scheduler.submit(waiting)
    scheduler.step()
    for request in (parked, suspended, waiting, urgent[0]):
        scheduler.cancel(request)
        assert [s.finish_reason for s in request.sequences] == ["cancelled"] * request.best_of
    assert check_beginning(bench, parked) == [5]
    assert check_beginning(bench, suspended) == [n_suspended]
    assert check_beginning(bench, waiting) == [0, 0]
    assert 0 < check_beginning(bench, urgent[0])[0] < 30
    finish(scheduler, urgent[1])
    check(bench, urgent[1])
    check_at_rest(scheduler, swap_bytes)


def test_a_held_request_goes_on_when_its_reader_does_in_its_slot_or_out_of_it(
    bench: Bench,
) -> None:
    scheduler = bench.scheduler()
    slow = ask(50, 20, stream=True, n_news_max=6)
    scheduler.submit(slow)
    read = []
    for turn in range(40):
        for _ in range(8):
            scheduler.step()
        if slow.done:
            break
        assert len(slow.news) <= 6
        if turn % 2:  # somebody else wants the slot
            other = ask(20, 2, seed=turn)
            scheduler.submit(other)
            finish(scheduler, other)
            check(bench, other)
        read += [slow.news.popleft() for _ in range(len(slow.news))]
        scheduler.unhold(slow)
    assert slow.done
    assert scheduler.n_suspended > 0
    slow.news.extendleft(reversed(read))
    check(bench, slow)
