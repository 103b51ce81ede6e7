"""The beginning of a prompt comes from wherever it is, and the answer is that of a fresh context.

On models whose memory can be cut anywhere, only within a window, or nowhere.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_requests import GREEDY, answer, answers, ask, finish, run, slot_of
from fresh_runs import Bench, check, check_at_rest, check_beginning, count_free_cells

from llama_crab import _core
from llama_crab.engine import Request, Scheduler
from llama_crab.sampling import SamplerChain

KINDS = ["llama", "window", "window in a full cache", "recurrent", "hybrid"]
UNIFIED = [False, True]
DRAWN = SamplerChain().penalties(32, 1.3).top_k(10).temp(1.0)
DEAD_END = SamplerChain().grammar('root ::= "yes"').greedy()


@pytest.fixture(scope="module")
def benches(
    tiny_path: Path, tiny_swa_path: Path, tiny_recurrent_path: Path, tiny_hybrid_path: Path
) -> Iterator[dict[str, Bench]]:
    paths = [tiny_path, tiny_swa_path, tiny_swa_path, tiny_recurrent_path, tiny_hybrid_path]
    found = {
        kind: Bench(_core.Model(path), swa_full=kind != "window")
        for kind, path in zip(KINDS, paths, strict=True)
    }
    yield found
    for bench in found.values():
        bench.close()
        bench.model.close()


Make = Callable[..., Scheduler]


@pytest.fixture(params=KINDS)
def kind_bench(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Iterator[Bench]:
    bench = benches[request.param]
    yield bench
    bench.close()


@pytest.fixture
def llama_bench(benches: dict[str, Bench]) -> Iterator[Bench]:
    yield benches["llama"]
    benches["llama"].close()


def words(n: int, seed: int = 0) -> list[int]:
    """Return `n` ordinary tokens that all of the vocabularies have."""
    return [int(token) for token in np.random.default_rng(1000 + seed).integers(260, 550, n)]


def slots(n: int, unified: bool) -> dict[str, Any]:
    """Return the shape of a context with room for `n` sequences of 256."""
    return {"n_ctx": 256 * n, "n_seq_max": n, "kv_unified": unified}


def n_cached(request: Request) -> int:
    return request.sequences[0].n_cached


def generating(scheduler: Scheduler, request: Request, n: int = 1) -> None:
    """Submit a request and step until it has generated `n` tokens."""
    scheduler.submit(request)
    scheduler.step()
    while scheduler.stepper.progress(slot_of(request))[3] < n:
        scheduler.step()


def n_in_trie(prompts: list[list[int]]) -> int:
    """Return how many different beginnings the prompts have: what must be computed at least."""
    return len({tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)})


@pytest.mark.parametrize("unified", UNIFIED)
def test_a_conversation_goes_on_where_it_is(kind_bench: Bench, unified: bool) -> None:
    scheduler = kind_bench.scheduler(**slots(3, unified))
    chats = [words(40 + 20 * n, n) for n in range(3)]
    for turn in range(4):
        for n, prompt in enumerate(chats):
            before = scheduler.stepper.n_decoded
            request = ask(prompt=prompt, n_tokens=5)
            run(scheduler, request)
            check(kind_bench, request)
            # All but the new words and the last answer's last token.
            assert n_cached(request) == (len(prompt) - 4 if turn else 0)
            assert scheduler.stepper.n_decoded - before == len(prompt) - n_cached(request) + 4
            chats[n] = [*prompt, *answer(request), *words(3, 10 * turn + n)]


@pytest.mark.parametrize("unified", UNIFIED)
def test_a_branch_shares_what_can_be_cut_off(kind_bench: Bench, unified: bool) -> None:
    """From an idle slot, in it and out of it, and from one that is generating."""
    scheduler = kind_bench.scheduler(**slots(4, unified))
    stem = words(120)
    run(scheduler, ask(prompt=stem, n_tokens=3))
    running = ask(prompt=[*words(100, 1)], n_tokens=120)
    generating(scheduler, running, 3)
    for seed, n_common in enumerate((119, 80, 50, 33)):
        for source in (stem, running.prompt):
            branch = ask(prompt=[*source[: min(n_common, len(source))], *words(6, 20 + seed)])
            before = scheduler.stepper.n_decoded
            n_beside = scheduler.stepper.progress(slot_of(running))[3]
            run(scheduler, branch)
            n_beside = scheduler.stepper.progress(slot_of(running))[3] - n_beside
            check(kind_bench, branch)
            n_decoded = scheduler.stepper.n_decoded - before - n_beside
            assert n_decoded == len(branch.prompt) - n_cached(branch) + 7
            if not kind_bench.model.n_swa and scheduler.stepper.can_cut:
                assert n_cached(branch) == min(n_common, len(source))
            elif not scheduler.stepper.can_cut:
                assert n_cached(branch) in (0, min(n_common, len(source)))
    finish(scheduler, running)
    check(kind_bench, running)


@pytest.mark.parametrize("unified", UNIFIED)
def test_sixteen_that_arrive_at_once_compute_their_common_beginning_once(
    kind_bench: Bench, unified: bool
) -> None:
    shape = {**slots(16, unified), **({"n_ctx": 768} if unified else {})}
    scheduler = kind_bench.scheduler(**shape)
    stem = words(100)
    requests = [ask(prompt=[*stem, *words(5 + n, n + 1)], n_tokens=4) for n in range(16)]
    run(scheduler, *requests)
    n_tails = sum(5 + n for n in range(16))
    assert scheduler.stepper.n_decoded == 100 + n_tails + 16 * 3
    assert [n_cached(request) for request in requests] == [0] + [100] * 15
    check(kind_bench, *requests)
    if unified and scheduler.stepper.can_cut:
        assert scheduler.stepper.n_cells_used == 100 + n_tails + 16 * 3
        used = scheduler.context.n_ctx - count_free_cells(scheduler)
        assert scheduler.stepper.n_cells_used == used


@pytest.mark.parametrize("unified", UNIFIED)
def test_what_is_computed_is_the_tree_of_the_prompts(kind_bench: Bench, unified: bool) -> None:
    """Beginnings of beginnings, some of which part from those that wait themselves."""
    for seed in range(3):
        rng = random.Random(seed)
        prompts = [words(40, 100 * seed)]
        for n in range(11):
            branch = rng.choice(prompts)
            at = rng.randrange(1, len(branch) // 32 + 1) * 32
            prompts.append([*branch[:at], *words(rng.randrange(33, 60), 100 * seed + n + 1)][:180])
        requests = [ask(prompt=prompt, n_tokens=3) for prompt in prompts]
        scheduler = kind_bench.scheduler(**slots(12, unified))
        run(scheduler, *requests)
        check(kind_bench, *requests)
        assert scheduler.stepper.n_decoded == n_in_trie(prompts) + 12 * 2


def test_more_requests_than_slots_share_as_well(llama_bench: Bench) -> None:
    stem = words(100)
    requests = [ask(prompt=[*stem, *words(5, n + 1)], n_tokens=4) for n in range(20)]
    for unified in UNIFIED:
        scheduler = llama_bench.scheduler(**slots(4, unified))
        copies = [ask(prompt=request.prompt, n_tokens=4) for request in requests]
        run(scheduler, *copies)
        assert scheduler.stepper.n_decoded == 100 + 20 * (5 + 3)
        check(llama_bench, *copies)


@pytest.mark.parametrize("unified", UNIFIED)
@pytest.mark.parametrize("how", ["cancelled", "timed out", "gives way"])
def test_when_a_leader_leaves_in_the_middle_an_heir_takes_over(
    kind_bench: Bench, how: str, unified: bool
) -> None:
    stem = words(130)
    for n_steps in (0, 1, 2, 3, 4):
        scheduler = kind_bench.scheduler(**slots(4, unified))
        requests = [
            ask(prompt=[*stem, *words(5, n + 1)], n_tokens=4 + n, priority=int(n > 0))
            for n in range(4)
        ]
        leader = requests[0]
        leader.submit_us = 1  # first all the same
        for request in requests:
            scheduler.submit(request)
        for _ in range(n_steps):
            scheduler.step()
        if how == "cancelled":
            scheduler.cancel(leader)
        elif how == "timed out":
            scheduler._fail(leader, TimeoutError())
        else:
            leader.submit_us = _core.time_us()
            urgent = ask(prompt=words(20, 9), n_tokens=3, priority=5)
            scheduler.submit(urgent)
            requests.append(urgent)
        finish(scheduler, *requests)
        if how != "gives way":
            requests.remove(leader)
            assert check_beginning(kind_bench, leader) == [0]
        check(kind_bench, *requests)
        # The stem was computed again once at most, not by each of those that had waited.
        n_needed = sum(len(r.prompt) + len(answer(r)) - 1 for r in requests)
        n_shared = 130 * (len([r for r in requests if r.prompt[:130] == stem]) - 1)
        assert scheduler.stepper.n_decoded <= n_needed - n_shared + 130 + 32


@pytest.mark.parametrize("unified", UNIFIED)
def test_answers_whose_leader_gives_way_take_nothing_from_a_longer_prompt(
    llama_bench: Bench, unified: bool
) -> None:
    """Both wait for one leader: its second answer, and a request that says more than it does."""
    scheduler = llama_bench.scheduler(**slots(3, unified))
    stem = words(100)
    short = ask(prompt=words(8, 1), n_tokens=2)
    both = ask(prompt=stem, n_tokens=6, n=2, best_of=2)
    scheduler.submit(short)
    scheduler.submit(both)
    finish(scheduler, short)
    longer = ask(prompt=[*stem, *words(60, 2)], n_tokens=6, priority=1)
    scheduler.submit(longer)
    scheduler.step()
    # The one with more to say has the lower slot, so it becomes the heir.
    assert slot_of(longer) < min(s.slot for s in both.sequences if s.slot is not None)
    assert scheduler.stepper.progress(slot_of(both))[2] < 100
    urgent = ask(prompt=words(30, 3), n_tokens=3, priority=2)
    scheduler.submit(urgent)
    scheduler.step()
    assert both.sequences[0].slot is None
    finish(scheduler, both, longer, urgent)
    check(llama_bench, both, longer, urgent)


@pytest.mark.parametrize("unified", UNIFIED)
def test_a_leader_that_ends_at_once_still_leads(kind_bench: Bench, unified: bool) -> None:
    stem = words(90)
    ends: list[dict[str, Any]] = [
        {"n_tokens": 0},
        {"n_tokens": 1},
        {"n_tokens": 5, "sampler": DEAD_END},
        {"n_tokens": 4, "prompt": stem},
        {"n_tokens": 4, "n": 2, "best_of": 2, "sampler": DRAWN},
        {"n_tokens": 3, "cache_prompt": False},
        {"n_tokens": 3, "prompt_logprobs": True, "logprobs": 0},
    ]
    for fields in ends:
        scheduler = kind_bench.scheduler(**slots(5, unified))
        leader = ask(**{"prompt": [*stem, *words(7, 1)], **fields})
        followers = [ask(prompt=[*stem, *words(9, 2 + n)], n_tokens=4) for n in range(2)]
        same = ask(prompt=[*stem, *words(7, 1)], n_tokens=4)
        run(scheduler, leader, *followers, same)
        check(kind_bench, *followers, same)
        assert [n_cached(request) for request in followers] == [90, 90]
        if fields.get("sampler") is not DEAD_END:
            check(kind_bench, leader)


@pytest.mark.parametrize("unified", UNIFIED)
def test_nothing_is_shared_with_who_does_not_want_it(kind_bench: Bench, unified: bool) -> None:
    scheduler = kind_bench.scheduler(1 << 20, **slots(3, unified))
    stem = words(80)
    first = ask(prompt=stem, n_tokens=60)
    generating(scheduler, first)
    refusals = [
        ask(prompt=[*stem, *words(4, 1)], n_tokens=3, cache_prompt=False),
        ask(prompt=[*stem, *words(4, 1)], n_tokens=3, cache_prompt=False),
    ]
    before = scheduler.stepper.n_decoded
    n_beside = scheduler.stepper.progress(slot_of(first))[3]
    run(scheduler, *refusals)
    n_beside = scheduler.stepper.progress(slot_of(first))[3] - n_beside
    assert [n_cached(request) for request in refusals] == [0, 0]
    assert scheduler.stepper.n_decoded - before - n_beside == 2 * (84 + 2)
    finish(scheduler, first)
    run(scheduler, idle := ask(prompt=stem, n_tokens=3, cache_prompt=False))
    assert n_cached(idle) == 0
    assert scheduler.cache.n_restored == 0
    check(kind_bench, first, idle, *refusals)


def test_what_cannot_be_cut_is_kept_as_it_was_at_the_end_of_the_prompt(
    benches: dict[str, Bench],
) -> None:
    for kind in ("recurrent", "hybrid"):
        for unified in UNIFIED:
            bench = benches[kind]
            scheduler = bench.scheduler(1 << 22, **slots(2, unified))
            system = words(90)
            chats = [[*system, *words(8, n)] for n in range(1, 4)]
            run(scheduler, ask(prompt=system, n_tokens=6))
            # Its answer is in memory, so nothing there is the prompt alone; a snapshot is.
            for prompt in chats:
                branch = ask(prompt=prompt, n_tokens=6)
                run(scheduler, branch)
                assert n_cached(branch) == len(system) - 1
                check(bench, branch)
            # Only whole beginnings: 60 of the 89 tokens are of no use.
            part = ask(prompt=[*system[:60], *words(8, 7)], n_tokens=4)
            run(scheduler, part)
            assert n_cached(part) == 0
            check(bench, part)
            # The same prompts again, while others generate.
            beside = ask(prompt=words(40, 9), n_tokens=60)
            generating(scheduler, beside)
            for prompt in chats:
                again = ask(prompt=prompt, n_tokens=6)
                run(scheduler, again)
                assert n_cached(again) == len(prompt) - 1
                check(bench, again)
            finish(scheduler, beside)
            check(bench, beside)
        benches[kind].close()


@pytest.mark.parametrize("unified", UNIFIED)
def test_conversations_that_had_to_leave_come_back_from_host_memory(
    kind_bench: Bench, unified: bool
) -> None:
    scheduler = kind_bench.scheduler(1 << 22, **slots(2, unified))
    chats = [words(50 + 9 * n, n) for n in range(6)]
    for turn in range(3):
        for n, prompt in enumerate(chats):
            request = ask(prompt=prompt, n_tokens=5, sampler=DRAWN)
            run(scheduler, request)
            check(kind_bench, request)
            assert n_cached(request) == (len(prompt) - 4 if turn else 0)
            chats[n] = [*prompt, *answer(request), *words(3, 10 * turn + n)]
    assert scheduler.cache.n_restored >= 10


def state_size(bench: Bench, n: int) -> int:
    """Return the bytes of the state of `n` tokens."""
    scheduler = bench.scheduler()
    run(scheduler, ask(prompt=words(n), n_tokens=0))
    state = scheduler.stepper.save(0)
    assert state is not None
    return len(state)


def test_the_least_recently_used_snapshot_goes_first(llama_bench: Bench) -> None:
    budget = int(3.5 * state_size(llama_bench, 90))
    scheduler = llama_bench.scheduler(budget)
    prompts = {name: words(90, n) for n, name in enumerate("ABCDEF")}

    def cached(name: str) -> int:
        request = ask(prompt=prompts[name], n_tokens=1)
        run(scheduler, request)
        check(llama_bench, request)
        assert scheduler.stats()["ram_bytes"] <= budget
        return n_cached(request)

    for name, expected, outside in [
        *(("A", 0, ""), ("B", 0, "A"), ("C", 0, "AB"), ("D", 0, "ABC"), ("E", 0, "BCD")),
        ("C", 89, "BDE"),  # it changes places with E
        ("B", 89, "CDE"),
        ("F", 0, "BCE"),  # D was used before the others
        ("C", 89, "BEF"),
        ("D", 0, "BCF"),
    ]:
        assert cached(name) == expected, name
        found = scheduler.cache._store
        assert found is not None
        held = {snapshot.tokens for snapshot in found._ram.held}
        assert held == {array("i", prompts[other]).tobytes() for other in outside}


def test_what_is_wanted_is_not_thrown_out_for_what_it_replaces(llama_bench: Bench) -> None:
    """Three conversations in turn have room in one slot and two snapshots."""
    scheduler = llama_bench.scheduler(int(2.5 * state_size(llama_bench, 90)))
    cached = []
    for _ in range(4):
        for n in range(3):
            request = ask(prompt=words(90, n), n_tokens=1)
            run(scheduler, request)
            check(llama_bench, request)
            cached.append(n_cached(request))
    assert set(cached[3:]) == {89}


def test_small_and_useless_budgets_change_no_answer(kind_bench: Bench) -> None:
    one = state_size(kind_bench, 90)
    for budget in (0, 1, one // 2, one + one // 4, 3 * one):
        for unified in UNIFIED:
            scheduler = kind_bench.scheduler(budget, **slots(2, unified))
            rng = random.Random(budget)
            stems = [words(rng.randrange(40, 90), n) for n in range(4)]
            for turn in range(12):
                stem = rng.choice(stems)
                prompt = [*stem[: rng.randrange(30, len(stem))], *words(rng.randrange(1, 9), turn)]
                pair = [ask(prompt=prompt, n_tokens=4), ask(prompt=stem, n_tokens=3)]
                run(scheduler, *pair)
                check(kind_bench, *pair)
                assert scheduler.stats()["ram_bytes"] <= budget


def test_cached_tokens_are_tokens_that_were_not_computed(llama_bench: Bench) -> None:
    """A snapshot that turns out to be damaged took the place of what was there."""
    scheduler = llama_bench.scheduler(1 << 20)
    prompt = words(200)
    run(scheduler, ask(prompt=[*prompt[:60], *words(10, 1)], n_tokens=2))
    store = scheduler.cache._store
    assert store is not None
    store.put(array("i", prompt[:150]).tobytes(), b"no state at all" * 99)
    before = scheduler.stepper.n_decoded
    request = ask(prompt=prompt, n_tokens=1)
    run(scheduler, request)
    check(llama_bench, request)
    assert scheduler.stepper.n_decoded - before == 200 - n_cached(request)
    assert store.n_ram == 1  # the damaged one is gone, the first request's was saved


def test_a_source_that_has_to_leave_first_is_not_counted_as_cached(llama_bench: Bench) -> None:
    """The cells that a request would share are those of a held one, which must make room."""
    scheduler = llama_bench.scheduler(n_ctx=256, n_seq_max=3, kv_unified=True)
    stem = words(150)
    held = ask(prompt=stem, n_tokens=60, stream=True, n_news_max=4)
    scheduler.submit(held)
    while not scheduler._held:
        scheduler.step()
    beside = ask(prompt=words(40, 1), n_tokens=60)
    generating(scheduler, beside)
    request = ask(prompt=[*stem, *words(60, 2)], n_tokens=1)
    run(scheduler, request)
    scheduler.cancel(held)
    finish(scheduler, beside)
    check(llama_bench, request, beside)
    n_others = 150 + 3 + 40 + 59
    assert scheduler.stepper.n_decoded - n_others == 210 - n_cached(request)


@pytest.mark.parametrize("unified", UNIFIED)
def test_the_same_questions_find_their_slots_however_long_the_answers_were(
    llama_bench: Bench, unified: bool
) -> None:
    """An old answer gives way to a new one, not another question's slot."""
    scheduler = llama_bench.scheduler(**slots(4, unified))
    for n_tokens in (1, 90, 90, 90):
        requests = [ask(prompt=words(60, seed), n_tokens=n_tokens) for seed in range(4)]
        before = scheduler.stepper.n_decoded
        run(scheduler, *requests)
        if n_tokens > 1:
            check(llama_bench, *requests)
            assert [n_cached(request) for request in requests] == [59] * 4
            assert scheduler.stepper.n_decoded - before == 4 * n_tokens


@pytest.mark.parametrize("aborted", [False, True], ids=["before a step", "in an aborted step"])
def test_a_copy_that_is_put_off_and_then_not_wanted_harms_nobody(
    kind_bench: Bench, aborted: bool
) -> None:
    """A stream is copied when the next batch begins: until then its cells are not there."""
    if aborted and not kind_bench.scheduler().stepper.can_abort:
        aborted = False
    for copied, wanted in ((0, 1), (0, 2), (1, 0), (1, 2)):
        scheduler = kind_bench.scheduler(1 << 22, **slots(2, unified=False))
        prompts = [words(70 + n, n) for n in range(3)]
        # The first one leaves for host memory, the others are in the slots.
        for prompt in prompts:
            run(scheduler, ask(prompt=prompt, n_tokens=3))
        source = prompts[1 + copied]
        held = ask(prompt=source, n_tokens=0)
        run(scheduler, held)
        cancelled = ask(prompt=[*source[:69], *words(40, 5)], n_tokens=5)
        scheduler.submit(cancelled)
        if aborted:
            scheduler.context.abort()
            scheduler.step()
            scheduler.context.clear_abort()
        else:
            scheduler._admit()
        assert slot_of(cancelled) >= 0
        scheduler.cancel(cancelled)
        requests = [
            ask(prompt=[*prompts[wanted], *words(3, 6)], n_tokens=6),
            ask(prompt=[*source, *words(3, 7)], n_tokens=6),
            ask(prompt=[*prompts[0], *words(3, 8)], n_tokens=6),
        ]
        for request in requests:
            scheduler.submit(request)
            scheduler._admit()
        finish(scheduler, *requests)
        check(kind_bench, *requests)


def test_a_slot_in_a_copy_that_is_put_off_is_neither_saved_nor_overwritten(
    llama_bench: Bench,
) -> None:
    scheduler = llama_bench.scheduler(**slots(3, unified=False))
    stepper = scheduler.stepper
    stem = words(80)
    run(scheduler, ask(prompt=stem, n_tokens=0))
    state = stepper.save(0)
    assert state is not None
    copy = ask(prompt=[*stem, *words(5, 1)], n_tokens=40)
    beside = ask(prompt=[*stem, *words(5, 2)], n_tokens=40)
    scheduler.submit(copy)
    scheduler.submit(beside)
    scheduler._admit()
    assert sorted((slot_of(copy), slot_of(beside))) == [0, 1]
    scheduler.cancel(copy)
    scheduler.cancel(beside)
    for slot in (0, 1):
        assert stepper.save(slot) is None
        assert stepper.restore(slot, stem, state) is False
    assert stepper.restore(2, stem, state) is True
    run(scheduler, other := ask(prompt=words(20, 3), n_tokens=2))
    check(llama_bench, other)
    for slot in (0, 1):
        assert stepper.save(slot) is not None
    again = [ask(prompt=[*stem, *words(5, n)], n_tokens=4) for n in (4, 5, 6)]
    run(scheduler, *again)
    check(llama_bench, *again)


@pytest.mark.parametrize("unified", UNIFIED)
@pytest.mark.parametrize("budget", [None, 250_000], ids=["no snapshots", "snapshots"])
def test_random_requests_that_share_come_and_go_as_if_alone(
    kind_bench: Bench, budget: int | None, unified: bool
) -> None:
    """With priorities, cancels, readers that fall behind, aborts: on a cache that is too small."""
    rng = random.Random(7)
    shape = slots(4, unified)
    if unified:
        shape["n_ctx"] = 512
    scheduler = kind_bench.scheduler(budget, **shape)
    swap_bytes = scheduler._swap.n_bytes_left
    stems = [words(rng.choice([40, 70, 100, 130]), n) for n in range(5)]
    live: list[Request] = []
    ended: list[tuple[Request, list[Any]]] = []
    n_sent = 0
    for turn in range(6000):
        if n_sent == 50 and not live:
            break
        if n_sent < 50 and len(live) < 8 and rng.random() < 0.3:
            n_sent += 1
            stem = rng.choice(stems)
            prompt = [
                *stem[: rng.choice([len(stem), rng.randrange(1, len(stem))])],
                *words(rng.choice([0, 1, 5, 40]), turn),
            ]
            n = rng.choice([1, 1, 1, 2, 3])
            request = ask(
                prompt=prompt, n_tokens=rng.choice([0, 1, 3, 10, 25]), n=n, best_of=n,
                priority=rng.choice([0, 0, 1, 2]), stream=rng.random() < 0.4,
                cache_prompt=rng.random() < 0.85, sampler=rng.choice([GREEDY, DRAWN]),
            )  # fmt: skip
            request.n_news_max = 4 if request.stream and rng.random() < 0.5 else 0
            request.seed = turn
            scheduler.submit(request)
            live.append(request)
            ended.append((request, []))
        if live and rng.random() < 0.03:
            scheduler.cancel(rng.choice(live))
        if scheduler.stepper.can_abort and rng.random() < 0.05:
            scheduler.context.abort()
        for request, read in ended:
            if request.news and rng.random() < 0.3:
                read += [request.news.popleft() for _ in range(len(request.news))]
                scheduler.unhold(request)
        scheduler.step()
        scheduler.context.clear_abort()
        live = [request for request in live if not request.done]
    assert not live
    check_at_rest(scheduler, swap_bytes)
    assert scheduler.n_suspended > 0
    for request, read in ended:
        request.news.extendleft(reversed(read))
        if any(s.finish_reason == "cancelled" for s in request.sequences):
            check_beginning(kind_bench, request)
        else:
            check(kind_bench, request)
    assert sum(len(tokens) for request, _ in ended for tokens in answers(request)) > 200
