"""The one loop on a tiny random model: what is decoded, when, and for whom."""

from __future__ import annotations

import numpy as np
import pytest
from engine_requests import (
    MakeScheduler,
    answer,
    ask,
    finish,
    run,
    slot_of,
)

from llama_crab import _core
from llama_crab.engine import Request
from llama_crab.errors import (
    GrammarError,
    InvalidTokenError,
    SamplerError,
)
from llama_crab.sampling import SamplerChain

# Once "yes" is complete the grammar allows only the end, which the request forbids.
DEAD_END = SamplerChain().grammar('root ::= "yes"').greedy()


def greedy_by_hand(model: _core.Model, prompt: list[int], n: int, banned: int) -> list[int]:
    """Decode token by token through the core and take numpy's argmax of each row."""
    tokens = list(prompt)
    with _core.Context(model, n_ctx=512, n_threads=1, n_threads_batch=1) as context:
        for pos in range(len(prompt) + n - 1):
            batch = _core.Batch(1)
            batch.add(tokens[pos], pos, [0], True)
            context.decode(batch)
            if pos + 1 >= len(prompt):
                with context.logits() as view:
                    row = np.array(view, dtype=np.float64)
                row[banned] = -np.inf
                tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]


def test_one_sequence_is_plain_greedy_decoding(make: MakeScheduler, tiny: _core.Model) -> None:
    request = ask(40, 12)
    run(make(), request)
    eos = tiny.vocab.eos
    assert eos is not None
    assert tiny.vocab.eog_tokens == (eos,)
    assert answer(request) == greedy_by_hand(tiny, request.prompt, 12, eos)
    piece = b"".join(tiny.vocab.piece(token, False) for token in answer(request))
    assert request.sequences[0].text == piece.decode("utf-8", "replace")


def test_four_sequences_in_one_context_equal_four_alone(make: MakeScheduler) -> None:
    shapes = [(5, 12), (70, 9), (33, 20), (1, 16)]
    alone = []
    for seed, (n_prompt, n_tokens) in enumerate(shapes):
        request = ask(n_prompt, n_tokens, seed=seed)
        run(make(), request)
        alone.append(answer(request))
    for kv_unified in (False, True):
        together = [ask(n, m, seed=seed) for seed, (n, m) in enumerate(shapes)]
        run(make(n_seq_max=4, kv_unified=kv_unified), *together)
        assert [answer(request) for request in together] == alone


@pytest.mark.parametrize(("n_prompt", "n_tokens"), [(1, 1), (32, 5), (33, 5), (64, 1), (200, 7)])
def test_a_prompt_is_prefilled_in_micro_batches_and_no_decode_is_wasted(
    make: MakeScheduler, n_prompt: int, n_tokens: int
) -> None:
    scheduler = make()
    request = ask(n_prompt, n_tokens)
    n_steps = run(scheduler, request)
    assert len(answer(request)) == n_tokens
    assert request.sequences[0].finish_reason == "length"
    # The last token needs no decode, and the first comes with the prompt's last piece.
    assert scheduler.stepper.n_decoded == n_prompt + n_tokens - 1
    assert scheduler.stepper.n_steps == n_steps == -(-n_prompt // 32) + n_tokens - 1


def test_max_tokens_0_evaluates_the_prompt_only(make: MakeScheduler) -> None:
    scheduler = make()
    request = ask(40, 0)
    run(scheduler, request)
    assert answer(request) == []
    assert request.sequences[0].finish_reason == "length"
    assert scheduler.stepper.n_decoded == 40


def test_a_stop_token_is_not_decoded(make: MakeScheduler) -> None:
    scheduler = make()
    whole = ask(20, 10)
    run(scheduler, whole)
    stop = answer(whole)[6]
    n = answer(whole).index(stop)
    before = scheduler.stepper.n_decoded
    request = ask(20, 10, stop_tokens=(stop, 5), cache_prompt=False)
    run(scheduler, request)
    assert answer(request) == answer(whole)[:n]
    assert request.sequences[0].finish_reason == "stop"
    assert request.sequences[0].stop_reason == stop
    assert scheduler.stepper.n_decoded - before == 20 + n


def test_the_context_full_ends_with_length_and_keeps_the_text(make: MakeScheduler) -> None:
    scheduler = make(n_ctx=256)
    request = ask(200, None)
    run(scheduler, request)
    # Position 255 is the last one; the token sampled there has none, and is kept.
    assert len(answer(request)) == 256 - 200 + 1
    assert request.sequences[0].finish_reason == "length"
    assert request.sequences[0].text
    exact = ask(256, None, seed=1)
    run(scheduler, exact)
    assert len(answer(exact)) == 1


def test_more_requests_than_slots_wait_their_turn(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=2)
    requests = [ask(10 + n, 3 + n % 4, seed=n) for n in range(9)]
    for request in requests:
        scheduler.submit(request)
    started: list[Request] = []
    while not all(request.done for request in requests):
        scheduler.step()
        assert scheduler.n_running <= 2
        started += [
            request
            for request in requests
            if request not in started
            and request.sequences[0].times[0] | (request.sequences[0].slot is not None)
        ]
    assert started == requests
    assert scheduler.n_waiting == scheduler.n_running == 0
    for n, request in enumerate(requests):
        alone = ask(10 + n, 3 + n % 4, seed=n)
        run(make(), alone)
        assert answer(request) == answer(alone)


def test_a_long_prompt_does_not_stall_those_that_generate(make: MakeScheduler) -> None:
    scheduler = make(n_ctx=2048, n_seq_max=4)
    quick = [ask(8, 40, seed=n) for n in range(3)]
    for request in quick:
        scheduler.submit(request)
    scheduler.step()
    late = ask(300, 4, seed=9)
    scheduler.submit(late)
    n_prefill = 0
    while n_prefill == 0 or scheduler.stepper.progress(slot_of(late))[3] == 0:
        before = [scheduler.stepper.progress(slot_of(request))[3] for request in quick]
        scheduler.step()
        after = [scheduler.stepper.progress(slot_of(request))[3] for request in quick]
        assert after == [n + 1 for n in before]
        n_prefill += 1
    # 32 tokens a step, three of which belong to the others.
    assert n_prefill == -(-300 // 29)
    finish(scheduler, late, *quick)


def test_equal_requests_end_in_the_same_step(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=4)
    requests = [ask(6, 10, seed=n) for n in range(4)]
    for request in requests:
        scheduler.submit(request)
    done: list[int] = []
    while sum(done) < 4:
        scheduler.step()
        done.append(sum(request.done for request in requests) - sum(done))
    assert done == [0] * 9 + [4]


def test_cancel_ends_one_request_and_keeps_what_it_has(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=2)
    running, other, waiting = ask(9, 30), ask(9, 12, seed=1), ask(9, 5, seed=2)
    for request in (running, other, waiting):
        scheduler.submit(request)
    for _ in range(5):
        scheduler.step()
    assert (scheduler.n_running, scheduler.n_waiting) == (2, 1)
    scheduler.cancel(running)
    assert running.done
    assert running.sequences[0].finish_reason == "cancelled"
    assert len(answer(running)) == 5
    assert scheduler.n_running == 1
    never = ask(9, 5, seed=3)
    scheduler.submit(never)
    scheduler.cancel(never)
    assert (never.done, answer(never), never.sequences[0].finish_reason) == (True, [], "cancelled")
    finish(scheduler, other, waiting)
    assert len(answer(other)) == 12
    assert len(answer(waiting)) == 5
    scheduler.cancel(other)
    assert other.sequences[0].finish_reason == "length"


def test_cancel_all_leaves_nothing(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=2)
    requests = [ask(9, 30, seed=n) for n in range(3)]
    for request in requests:
        scheduler.submit(request)
    scheduler.step()
    scheduler.cancel_all()
    assert all(request.done for request in requests)
    assert (scheduler.n_running, scheduler.n_waiting) == (0, 0)


def test_an_error_of_one_request_does_not_touch_another(make: MakeScheduler) -> None:
    alone = ask(30, 20)
    run(make(), alone)
    scheduler = make(n_seq_max=4)
    good = ask(30, 20)
    bad = ask(10, 20, seed=1, sampler=DEAD_END)
    wrong = ask(10, 20, seed=2, sampler=SamplerChain().grammar("root ::= ["))
    outside = ask(10, 20, seed=3, prompt=[1, 10**6])
    run(scheduler, bad, good, wrong, outside)
    assert answer(good) == answer(alone)
    assert type(bad.error) is SamplerError
    assert "grammar" in str(bad.error)
    assert bad.sequences[0].text == "yes"
    assert isinstance(wrong.error, GrammarError)
    assert isinstance(outside.error, InvalidTokenError)
    again = ask(30, 20, cache_prompt=False)
    run(scheduler, again)
    assert answer(again) == answer(alone)


def test_a_sampler_left_without_candidates_is_an_error(make: MakeScheduler) -> None:
    # Everything but one token is banned, and that one ends the generation, which is forbidden.
    banned = {token: -np.inf for token in range(759) if token != 2}
    for chain in (SamplerChain().top_k(5), SamplerChain().greedy(), SamplerChain().temp(0.7)):
        request = ask(10, 5, sampler=chain, logit_bias=banned)
        run(make(), request)
        assert type(request.error) is SamplerError
        assert "no candidate" in str(request.error)
        assert request.sequences[0].text == ""
