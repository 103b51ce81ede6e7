"""Users' logits processors: what they see, what they change, and what their exceptions touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_requests import GREEDY, MakeScheduler, answer, answers, ask, finish, prompt_of, run

from llama_crab import Llama, ParameterError, SamplerChain
from llama_crab.errors import SamplerError


def ban(*tokens: int) -> Any:
    def processor(_: Any, logits: Any) -> None:
        logits[list(tokens)] = -np.inf

    return processor


def test_a_processor_sees_the_ids_so_far_and_the_models_row(make: MakeScheduler) -> None:
    scheduler = make()
    seen: list[tuple[list[int], Any]] = []

    def spy(tokens: Any, logits: Any) -> None:
        assert (tokens.dtype, logits.dtype) == (np.int32, np.float32)
        assert not tokens.flags.writeable
        assert logits.flags.writeable
        seen.append((tokens.tolist(), logits.copy()))

    request = ask(20, 6, logits_processors=(spy,))
    scheduler.submit(request)
    rows = []
    while not request.done:
        scheduler.step()
        rows.append(scheduler.context.copy_logits(np.empty(759, np.float32)))
    tokens = answer(request)
    assert [ids for ids, _ in seen] == [request.prompt + tokens[:n] for n in range(6)]
    for (_, row), expected in zip(seen, rows, strict=True):
        np.testing.assert_array_equal(row, expected)
    plain = ask(20, 6)
    run(make(), plain)
    assert tokens == answer(plain)


@pytest.mark.parametrize("executor", ["fused", "reference"])
def test_what_a_processor_writes_is_sampled_but_logprobs_are_the_models(
    make: MakeScheduler, executor: Any
) -> None:
    plain = ask(20, 5, logprobs=3)
    run(make(), plain)
    banned = answer(plain)
    request = ask(
        20, 5, logprobs=3, sampler=GREEDY.with_executor(executor),
        logits_processors=(ban(*banned), ban(0)),
    )  # fmt: skip
    run(make(), request)
    assert not {0, *banned} & set(answer(request))
    first, plain_first = (r.sequences[0].logprobs[0] for r in (request, plain))
    assert first[1] == plain_first[1]
    assert first[0] < plain_first[0]


def test_processors_run_in_order_and_one_call_serves_all_rows_of_a_step(
    make: MakeScheduler,
) -> None:
    calls: list[tuple[str, int]] = []

    class Together:
        def process_batch(self, tokens: list[Any], logits: Any) -> None:
            assert logits.shape == (len(tokens), 759)
            calls.append(("batch", len(tokens)))
            for ids, row in zip(tokens, logits, strict=True):
                row[:] = -np.inf
                row[300 + len(ids)] = 0.0

    def after(_: Any, logits: Any) -> None:
        calls.append(("plain", int(np.isfinite(logits).sum())))

    scheduler = make(n_seq_max=4)
    shared = Together()
    requests = [
        ask(20, 3, seed=1, logits_processors=(shared, after)),
        ask(20, 3, seed=2),  # its row lies between those of the others
        ask(20, 3, seed=3, logits_processors=(shared,)),
    ]
    run(scheduler, *requests)
    assert answer(requests[0]) == answer(requests[2]) == [320, 321, 322]
    assert ("batch", 2) in calls
    assert ("plain", 1) in calls
    alone = ask(20, 3, seed=2)
    run(make(), alone)
    assert answer(requests[1]) == answer(alone)


def test_every_choice_of_a_request_has_its_own_row(make: MakeScheduler) -> None:
    n_calls = 0

    def by_turns(tokens: Any, logits: Any) -> None:
        nonlocal n_calls
        logits[:] = -np.inf
        logits[300 + n_calls] = 0.0
        n_calls += 1

    request = ask(10, 2, n=3, best_of=3, logits_processors=(by_turns,))
    run(make(n_seq_max=4), request)
    assert request.error is None
    assert sorted(token for tokens in answers(request) for token in tokens) == [*range(300, 306)]


def test_an_exception_ends_its_request_and_nothing_else(make: MakeScheduler) -> None:
    scheduler = make(n_seq_max=2)

    def fails(tokens: Any, _: Any) -> None:
        if len(tokens) == 12:
            raise LookupError("not this one")

    broken, fine = ask(10, 8, logits_processors=(fails,)), ask(10, 8, seed=1)
    run(scheduler, broken, fine)
    assert isinstance(broken.error, LookupError)
    assert len(broken.sequences[0].tokens) == 2
    alone = ask(10, 8, seed=1)
    run(make(), alone)
    assert answer(fine) == answer(alone)
    again = ask(10, 8)
    run(scheduler, again)
    assert len(answer(again)) == 8


def test_a_signal_in_a_processor_loses_nothing(make: MakeScheduler) -> None:
    raised = False

    def interrupted(tokens: Any, _: Any) -> None:
        nonlocal raised
        if len(tokens) == 12 and not raised:
            raised = True
            raise KeyboardInterrupt

    scheduler = make()
    request = ask(10, 8, logits_processors=(interrupted,))
    scheduler.submit(request)
    with pytest.raises(KeyboardInterrupt):
        finish(scheduler, request)
    finish(scheduler, request)
    plain = ask(10, 8)
    run(make(), plain)
    assert answer(request) == answer(plain)


def test_a_kept_view_stays_valid_and_is_no_longer_sampled_from(make: MakeScheduler) -> None:
    kept: list[Any] = []
    scheduler = make()
    request = ask(10, 4, logits_processors=(lambda _, logits: kept.append(logits),))
    run(scheduler, request)
    assert len({row.ctypes.data for row in kept}) == 4
    scheduler.context.close()
    assert all(np.isfinite(row).all() for row in kept)


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_row_left_unusable_is_a_sampler_error(make: MakeScheduler, value: float) -> None:
    def spoil(_: Any, logits: Any) -> None:
        logits[:] = value

    request = ask(10, 4, logits_processors=(spoil,))
    run(make(), request)
    assert isinstance(request.error, SamplerError)


def test_a_returned_row_is_refused_instead_of_ignored(make: MakeScheduler) -> None:
    request = ask(10, 4, logits_processors=(lambda _, logits: logits * 2,))
    run(make(), request)
    assert isinstance(request.error, TypeError)


def test_through_the_facade(smol_path: Path) -> None:
    def shout(_: Any, logits: Any) -> None:
        logits[17] += 100.0

    with Llama(smol_path, n_ctx=256) as llama:
        result = llama.create_completion(
            "Hello", 4, sampler=SamplerChain.chat(), logits_processors=[shout], seed=1
        )
        assert result.choices[0].tokens == (17, 17, 17, 17)
        with pytest.raises(ZeroDivisionError):
            llama.create_completion("Hello", 4, logits_processors=[lambda *_: 1 / 0])
        for wrong in (3, [3], "no"):
            with pytest.raises(ParameterError, match="logits_processors"):
                llama.create_completion("Hello", 4, logits_processors=wrong)  # type: ignore[arg-type]
        assert llama.create_completion("Hello", 2).choices[0].tokens


def test_histories_grow_with_the_sequence(make: MakeScheduler) -> None:
    lengths: list[int] = []
    first: list[Any] = []

    def spy(tokens: Any, _: Any) -> None:
        lengths.append(len(tokens))
        first.append(tokens)

    prompt = prompt_of(3)
    request = ask(prompt=prompt, n_tokens=40, logits_processors=(spy,))
    run(make(), request)
    assert lengths == [*range(3, 43)]
    assert first[0].tolist() == prompt  # what was handed out does not change
