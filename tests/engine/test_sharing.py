"""What sequences share: memory, a prefill, the beginning of a prompt."""

from __future__ import annotations

from typing import Any

import pytest
from engine_requests import (
    MakeScheduler,
    answer,
    answers,
    ask,
    prompt_of,
    run,
)

from llama_crab.engine import Scheduler
from llama_crab.sampling import SamplerChain


def unified(make: MakeScheduler, **fields: Any) -> Scheduler:
    return make(n_ctx=256, n_seq_max=4, kv_unified=True, **fields)


def test_full_unified_memory_evicts_the_longest_unused_slot_first(make: MakeScheduler) -> None:
    scheduler = unified(make)
    old, kept = ask(99, 2), ask(59, 2, seed=1)
    run(scheduler, old)
    run(scheduler, kept)
    run(scheduler, ask(119, 2, seed=2))  # 100 + 60 + 120 > 256: one has to go
    again = ask(59, 1, seed=1)
    run(scheduler, again)
    assert again.sequences[0].n_cached == 58
    gone = ask(99, 1)
    run(scheduler, gone)
    assert gone.error is None
    assert gone.sequences[0].n_cached == 0


def test_full_unified_memory_suspends_the_youngest_and_loses_nothing(make: MakeScheduler) -> None:
    scheduler = unified(make)
    old, young = ask(100, None), ask(100, None, seed=1)
    run(scheduler, old, young)
    assert scheduler.n_suspended > 0
    for request, seed in ((old, 0), (young, 1)):
        alone = ask(100, None, seed=seed)
        run(unified(make), alone)
        assert len(answer(request)) == 157
        assert answer(request) == answer(alone)
        assert request.sequences[0].text == alone.sequences[0].text
        assert request.sequences[0].finish_reason == "length"


def test_a_prompt_that_finds_no_memory_waits_and_others_go_on(make: MakeScheduler) -> None:
    scheduler = unified(make)
    first, second, late = ask(100, 20), ask(100, 20, seed=1), ask(100, 20, seed=2)
    run(scheduler, first, second, late)
    assert [len(answer(request)) for request in (first, second, late)] == [20, 20, 20]


@pytest.mark.parametrize("kv_unified", [False, True])
def test_several_answers_share_one_prefill(make: MakeScheduler, kv_unified: bool) -> None:
    scheduler = make(n_ctx=1024, n_seq_max=4, kv_unified=kv_unified)
    chain = SamplerChain().temp(1.0)
    request = ask(90, 10, sampler=chain, n=3, best_of=3)
    run(scheduler, request)
    assert scheduler.stepper.n_decoded == 90 + 3 * 9
    assert [sequence.n_cached for sequence in request.sequences] == [0, 90, 90]
    once = ask(90, 1, n=3, best_of=3, seed=5)
    before = scheduler.stepper.n_decoded
    run(scheduler, once)
    assert scheduler.stepper.n_decoded - before == 90
    # Choice i is what the seed i higher gives alone.
    alone = []
    for i in range(3):
        single = ask(90, 10, sampler=chain)
        single.seed = request.seed + i
        run(make(), single)
        alone.append(answer(single))
    assert answers(request) == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


@pytest.mark.parametrize("n_seq_max", [1, 2])
def test_more_answers_than_slots_still_prefill_once_a_slot(
    make: MakeScheduler, n_seq_max: int
) -> None:
    scheduler = make(n_seq_max=n_seq_max)
    request = ask(90, 4, n=5, best_of=5)
    run(scheduler, request)
    assert len({tuple(tokens) for tokens in answers(request)}) == 1
    # Those of later rounds keep the prompt in memory, but for its last token.
    n_later_rounds = -(-5 // n_seq_max) - 1
    assert scheduler.stepper.n_decoded == 90 + 5 * 3 + n_later_rounds


def test_a_follower_goes_on_alone_when_its_leader_fails_first(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=2)
    request = ask(90, 6, n=2, best_of=2)
    scheduler.submit(request)
    scheduler.step()
    leader, follower = request.sequences
    assert (leader.slot, follower.slot) != (None, None)
    assert leader.slot is not None
    scheduler.stepper.release(leader.slot)
    for _ in range(20):
        if follower.finish_reason is None:
            scheduler.step()
    assert len(follower.tokens) == 6
    alone = ask(90, 6)
    run(make(), alone)
    assert follower.tokens == answer(alone)


def test_only_what_differs_is_prefilled(make: MakeScheduler) -> None:
    scheduler = make()
    first = ask(100, 10)
    run(scheduler, first)
    history = [*first.prompt, *answer(first)]
    cases = [
        (first.prompt, 99),  # the same prompt: its last token gives the logits
        ([*history, *prompt_of(5, 7)], 109),  # a conversation goes on; token 110 was never decoded
        (history[:60], 59),  # shorter
        ([*history[:50], *prompt_of(30, 8)], 50),  # branches off
        (prompt_of(40, 9), 0),  # nothing in common
    ]
    for prompt, n_cached in cases:
        # Each case begins from the same memory.
        run(scheduler, ask(prompt=first.prompt, n_tokens=10))
        before = scheduler.stepper.n_decoded
        request = ask(prompt=prompt, n_tokens=6)
        run(scheduler, request)
        assert request.sequences[0].n_cached == n_cached
        assert scheduler.stepper.n_decoded - before == len(prompt) - n_cached + 5
        fresh = ask(prompt=prompt, n_tokens=6)
        run(make(), fresh)
        assert answer(request) == answer(fresh)


def test_a_prompt_goes_to_the_slot_that_knows_most_of_it(make: MakeScheduler) -> None:
    scheduler = make(n_ctx=1024, n_seq_max=4)
    chats = [ask(50, 3, seed=n) for n in range(3)]
    for chat in chats:
        run(scheduler, chat)
    for chat in chats:
        again = ask(prompt=[*chat.prompt, *answer(chat), 300], n_tokens=1)
        run(scheduler, again)
        assert again.sequences[0].n_cached == 52


def test_cache_prompt_false_decodes_everything_again(make: MakeScheduler) -> None:
    scheduler = make()
    first, second = ask(60, 4), ask(60, 4, cache_prompt=False)
    run(scheduler, first)
    run(scheduler, second)
    assert second.sequences[0].n_cached == 0
    assert scheduler.stepper.n_decoded == 2 * 63
    assert answer(first) == answer(second)
