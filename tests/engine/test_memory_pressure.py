"""A unified KV cache far too small for its load: all get their turn, and nothing is lost."""

from __future__ import annotations

import random

import pytest
from engine_requests import ask, finish, prompt_of, run, slot_of
from fresh_runs import Bench, check, check_at_rest, check_beginning, count_free_cells

from llama_crab import _core
from llama_crab.engine import Request, Scheduler
from llama_crab.sampling import SamplerChain

SMALL = {"n_ctx": 256, "n_seq_max": 6, "kv_unified": True}
SWAPS = pytest.mark.parametrize("swap", [True, False], ids=["swapped", "computed again"])


def small(
    bench: Bench, *, swap: bool = True, budget: int | None = None, **fields: int
) -> Scheduler:
    scheduler = bench.scheduler(budget, **{**SMALL, **fields})
    if not swap:
        scheduler._swap.n_bytes_left = 0
    return scheduler


class CellModel:
    """Counts cells as a set of (which computation, position), beside the scheduler.

    Every token that is decoded makes one; a sequence that starts with another's cells has the same
    ones. What a sequence has is told by the tokens in memory of its slot.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._stepper = scheduler.stepper
        self._cells: list[list[object]] = [[] for _ in range(self._stepper.n_slots)]
        self._wrap(scheduler)

    def _wrap(self, scheduler: Scheduler) -> None:
        model, stepper = self, self._stepper

        class Watched:
            """The stepper, with each change of memory told to the model."""

            def __getattr__(self, name: str) -> object:
                return getattr(stepper, name)

            def assign(
                self, i: int, *args: object, source: int, n_keep: int, **rest: object
            ) -> int:
                model._take(i, source, 0 if rest["leader"] != -1 else n_keep)
                kept: int = stepper.assign(i, *args, source=source, n_keep=n_keep, **rest)  # type: ignore[arg-type]
                return kept

            def resume(self, i: int, slot: _core.SuspendedSlot, source: int, n_keep: int) -> int:
                model._take(i, source, n_keep)
                return stepper.resume(i, slot, source, n_keep)

            def suspend(self, i: int) -> _core.SuspendedSlot:
                model._cells[i] = []
                return stepper.suspend(i)

            def clear(self, i: int) -> None:
                model._cells[i] = []
                stepper.clear(i)

            def restore(self, i: int, *args: object) -> bool:
                done = stepper.restore(i, *args)  # type: ignore[arg-type]
                model._cells[i] = []
                model.follow()
                return done

        scheduler.stepper = Watched()  # type: ignore[assignment]
        scheduler.cache._stepper = scheduler._swap._stepper = scheduler.stepper

    def _take(self, i: int, source: int, n_keep: int) -> None:
        self._cells[i] = self._cells[i if source < 0 else source][:n_keep]

    def follow(self) -> None:
        """Take in what a step has decoded. Without leaders, that is all a step does to memory."""
        for i, cells in enumerate(self._cells):
            n = self._stepper.progress(i)[2]
            del cells[n:]
            cells += [object() for _ in range(n - len(cells))]

    @property
    def n_used(self) -> int:
        return len({id(cell) for cells in self._cells for cell in cells})


def load(rng: random.Random, n: int) -> list[Request]:
    """Return requests of random lengths, several of which begin alike."""
    stems = [prompt_of(rng.randrange(30, 120), 100 + k) for k in range(4)]
    drawn = SamplerChain().penalties(16, 1.2).top_k(10).temp(1.0)
    requests = []
    for k in range(n):
        prompt = prompt_of(rng.randrange(1, 150), 200 + k)
        if rng.random() < 0.5:
            stem = rng.choice(stems)
            prompt = stem[: rng.randrange(1, len(stem) + 1)] + prompt[: rng.randrange(0, 30)]
        n_answers = rng.choice([1, 1, 1, 2, 3])
        request = ask(
            prompt=prompt, n_tokens=rng.randrange(1, 60), n=n_answers, best_of=n_answers,
            priority=rng.choice([0, 0, 0, 1]), stream=rng.random() < 0.3,
            logprobs=rng.choice([None, None, 2]), cache_prompt=rng.random() < 0.8,
        )  # fmt: skip
        request.seed = k
        if rng.random() < 0.4:
            request.sampler = drawn
        requests.append(request)
    return requests


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [None, 200_000], ids=["no snapshots", "snapshots"])
@SWAPS
def test_all_of_a_load_ten_times_too_large_end_as_if_alone(
    bench: Bench, swap: bool, budget: int | None, seed: int
) -> None:
    rng = random.Random(seed)
    scheduler = small(bench, swap=swap, budget=budget)
    swap_bytes = scheduler._swap.n_bytes_left
    requests = load(rng, 24)
    wanted = sum(len(r.prompt) + r.best_of * (r.max_tokens or 0) for r in requests)
    assert wanted > 10 * 256
    waiting = list(requests)
    for _ in range(3000):
        while waiting and rng.random() < 0.4:
            scheduler.submit(waiting.pop(0))
        if all(request.done for request in requests):
            break
        scheduler.step()
        assert scheduler.stepper.n_cells_used <= 256
    check(bench, *requests)
    check_at_rest(scheduler, swap_bytes)
    assert scheduler.n_suspended > 0
    assert scheduler.stepper.n_cells_used == 256 - count_free_cells(scheduler)


def test_none_is_admitted_only_to_be_suspended(bench: Bench) -> None:
    """Each fills most of the cache: those that wait must not take what others will need."""
    scheduler = small(bench)
    requests = [ask(200, 4, seed=seed) for seed in range(6)]
    run(scheduler, *requests)
    check(bench, *requests)
    assert scheduler.n_suspended == 0


def test_no_state_is_put_back_where_it_has_no_room(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers that share a prompt give way, and come back while others have most of the cells."""
    scheduler = bench.scheduler(n_ctx=256, n_seq_max=3, kv_unified=True)
    swap_bytes = scheduler._swap.n_bytes_left
    request = ask(124, 30, n=3, best_of=3)
    scheduler.submit(request)
    while not all(
        s.slot is not None and scheduler.stepper.progress(s.slot)[3] >= 9 for s in request.sequences
    ):
        scheduler.step()
    urgent = [ask(60, 3, seed=seed, priority=1) for seed in (4, 5)]
    for other in urgent:
        scheduler.submit(other)
    finish(scheduler, request, *urgent)
    check(bench, request, *urgent)
    check_at_rest(scheduler, swap_bytes)
    assert scheduler.n_suspended >= 2
    assert not [record.message for record in caplog.records if record.levelname == "ERROR"]


def test_cells_in_use_are_what_llama_cpp_has_in_use_at_any_moment(bench: Bench) -> None:
    for n_steps in range(5, 100, 10):
        scheduler = small(bench)
        for request in load(random.Random(n_steps), 12):
            scheduler.submit(request)
        for _ in range(n_steps):
            scheduler.step()
        assert scheduler.n_running
        assert scheduler.stepper.n_cells_used == 256 - count_free_cells(scheduler)


@SWAPS
def test_cells_in_use_are_those_of_a_model_that_counts_each_by_itself(
    bench: Bench, swap: bool
) -> None:
    scheduler = small(bench, swap=swap)
    model = CellModel(scheduler)
    rng = random.Random(5)
    requests = load(rng, 20)
    counts = []
    for request in requests:
        request.n = request.best_of = 1  # copies inside a step are not seen from here
        del request.sequences[1:]
        scheduler.submit(request)
        # Only what runs already is shared: a leader's cells would be copied inside a step.
        for _ in range(rng.randrange(6, 20)):
            scheduler.step()
            model.follow()
            counts.append(scheduler.stepper.n_cells_used)
            assert counts[-1] == model.n_used
    while scheduler.any_request():
        scheduler.step()
        model.follow()
        assert scheduler.stepper.n_cells_used == model.n_used
    assert max(counts) > 200
    check(bench, *requests)


def test_shared_cells_are_counted_once(bench: Bench) -> None:
    scheduler = small(bench)
    stem = prompt_of(100)
    first = ask(prompt=stem, n_tokens=2)
    run(scheduler, first)
    assert scheduler.stepper.n_cells_used == 101
    others = [ask(prompt=[*stem, *prompt_of(5, 1 + k)], n_tokens=20) for k in range(3)]
    for request in others:
        scheduler.submit(request)
    scheduler.step()
    # One goes on in the first's slot; the answer's one token in memory is replaced there.
    assert scheduler.stepper.n_cells_used == 100 + 3 * 5
    finish(scheduler, *others)
    assert scheduler.stepper.n_cells_used == 100 + 3 * (5 + 19)
    assert scheduler.stepper.n_cells_used == 256 - count_free_cells(scheduler)
    check(bench, *others)


def test_idle_content_goes_before_anybody_is_suspended(bench: Bench) -> None:
    scheduler = small(bench)
    for seed in range(4):
        run(scheduler, ask(59, 2, seed=seed))
    assert scheduler.stepper.n_cells_used == 240
    growing = ask(30, 200, seed=9)
    run(scheduler, growing)
    assert scheduler.n_suspended == 0
    check(bench, growing)
    # Even while others run; what is shared with them does not help by going.
    scheduler = small(bench)
    for seed in range(3):
        run(scheduler, ask(49, 2, seed=seed))
    pair = [ask(30, 90, seed=9), ask(30, 90, seed=10)]
    run(scheduler, *pair)
    assert scheduler.n_suspended == 0
    check(bench, *pair)


def test_idle_content_in_the_slot_that_a_request_takes_over_does_not_keep_it_waiting(
    bench: Bench,
) -> None:
    scheduler = bench.scheduler(**{**SMALL, "n_seq_max": 2})
    run(scheduler, ask(200, 2))
    running = ask(20, 100, seed=1)
    scheduler.submit(running)
    scheduler.step()
    # 201 idle cells and 20: the one slot that is left is that of the idle ones.
    late = ask(100, 5, seed=2)
    scheduler.submit(late)
    finish(scheduler, late)
    assert not running.done
    finish(scheduler, running)
    assert scheduler.n_suspended == 0
    check(bench, running, late)


def test_a_reader_that_falls_behind_does_not_keep_the_cells_from_who_waits_for_them(
    bench: Bench,
) -> None:
    scheduler = bench.scheduler(**{**SMALL, "n_seq_max": 2})
    slow = ask(150, 40, stream=True, n_news_max=8)
    scheduler.submit(slow)
    while not slow.news:
        scheduler.step()
    late = ask(100, 5, seed=1)
    scheduler.submit(late)
    scheduler.step()
    assert late.sequences[0].slot is None  # there are no cells for it yet
    finish(scheduler, late, limit=200)
    assert not slow.done
    read = []
    while not slow.done:
        read += [slow.news.popleft() for _ in range(len(slow.news))]
        scheduler.unhold(slow)
        scheduler.step()
    slow.news.extendleft(reversed(read))
    check(bench, slow, late)


def test_those_that_are_held_go_before_those_that_work(bench: Bench) -> None:
    scheduler = small(bench)
    held = ask(60, 40, stream=True, n_news_max=4)
    scheduler.submit(held)
    while held.sequences[0] not in scheduler._held:
        scheduler.step()
    young = ask(60, 120, seed=1)
    scheduler.submit(young)
    scheduler.step()
    late = ask(60, 60, seed=2)
    scheduler.submit(late)
    while not young.done:
        scheduler.step()
        assert young.done or young.sequences[0].slot is not None
    assert held.sequences[0] in scheduler._parked
    finish(scheduler, late)
    check(bench, young, late)
    scheduler.cancel(held)
    assert check_beginning(bench, held) == [4]


def test_a_prompt_as_long_as_the_cache_waits_and_then_has_it_alone(bench: Bench) -> None:
    scheduler = small(bench)
    others = [ask(40, 30, seed=n) for n in range(4)]
    for request in others:
        scheduler.submit(request)
    scheduler.step()
    whole = ask(256, None, seed=9)
    after = ask(30, 4, seed=10)
    scheduler.submit(whole)
    scheduler.submit(after)
    finish(scheduler, *others, whole, after)
    assert len(whole.sequences[0].tokens) == 1
    assert whole.sequences[0].finish_reason == "length"
    check(bench, *others, after)


def test_host_memory_for_states_is_used_up_to_its_bound_and_given_back(bench: Bench) -> None:
    scheduler = small(bench)
    probe = ask(100, 40)
    scheduler.submit(probe)
    scheduler.step()
    while scheduler.stepper.progress(slot_of(probe))[2] < 100:
        scheduler.step()
    state = scheduler.stepper.save(slot_of(probe))
    assert state is not None
    one = len(state)
    finish(scheduler, probe)

    scheduler = small(bench, n_ctx=1024)
    scheduler._swap.n_bytes_left = budget = int(2.5 * one)
    lows = [ask(100, 60, seed=n) for n in range(6)]
    for request in lows:
        scheduler.submit(request)
    scheduler.step()
    while not all(scheduler.stepper.progress(slot_of(r))[2] >= 100 for r in lows):
        scheduler.step()
    highs = [ask(20, 3, seed=10 + n, priority=1) for n in range(4)]
    for request in highs:
        scheduler.submit(request)
    scheduler.step()
    suspensions = [r.sequences[0].suspension for r in lows]
    kept = [s.state for s in suspensions if s is not None]
    assert [state is not None for state in kept].count(True) == 2
    assert len(kept) == 4
    assert scheduler._swap.n_bytes_left == budget - sum(len(state or b"") for state in kept)
    # One that is cancelled and one that fails give theirs back as well.
    gone = [r for r in lows if r.sequences[0].suspension and r.sequences[0].suspension.state]
    scheduler.cancel(gone[0])
    scheduler._fail(gone[1], RuntimeError("told so"))
    assert scheduler._swap.n_bytes_left == budget
    finish(scheduler, *lows, *highs)
    check(bench, *(r for r in (*lows, *highs) if r not in gone))
    assert check_beginning(bench, gone[0])[0] > 0
    assert str(gone[1].error) == "told so"
    check_at_rest(scheduler, budget)


def test_a_state_that_cannot_be_put_back_is_computed_again(bench: Bench) -> None:
    scheduler = bench.scheduler()
    swap_bytes = scheduler._swap.n_bytes_left
    low, high = ask(80, 20), ask(40, 3, seed=1, priority=1)
    scheduler.submit(low)
    for _ in range(8):
        scheduler.step()
    scheduler.submit(high)
    scheduler.step()
    suspension = low.sequences[0].suspension
    assert suspension is not None
    assert suspension.state is not None
    suspension.state = b"\0" * len(suspension.state)
    finish(scheduler, low, high)
    check(bench, low, high)
    check_at_rest(scheduler, swap_bytes)
    assert scheduler.stepper.n_cells_used == 512 - count_free_cells(scheduler)
