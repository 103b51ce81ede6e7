"""Requests with different LoRA adapters in one context: each as if it had the context alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from engine_requests import GREEDY, answer, answers, ask, finish, prompt_of, run, slot_of
from fresh_runs import EXACT, SHAPE, Bench

from llama_crab import _core
from llama_crab.engine import Engine, Request, Scheduler
from llama_crab.errors import AdapterError
from llama_crab.lora import LoraSets
from llama_crab.params import ParameterError
from llama_crab.sampling import SamplerChain

Scales = Mapping[_core.LoraAdapter, float]
DRAWN = SamplerChain().penalties(32, 1.3).top_k(10).temp(1.0)
UNIFIED = pytest.mark.parametrize("unified", [False, True], ids=["split", "unified"])


@pytest.fixture(scope="module")
def adapters(
    tiny: _core.Model, tiny_gguf: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[_core.LoraAdapter]]:
    """Return two adapters of different weights."""
    folder = tmp_path_factory.mktemp("lora")
    paths: list[Path] = [
        tiny_gguf.write_lora(folder / f"{seed}.gguf", seed=seed, rank=rank)
        for seed, rank in ((11, 4), (12, 2))
    ]
    found = [_core.LoraAdapter(tiny, path) for path in paths]
    yield found
    for adapter in found:
        adapter.close()


@pytest.fixture(scope="module")
def choices(adapters: list[_core.LoraAdapter]) -> list[Scales]:
    """Return sets of adapters that all answer differently; the first is the model alone."""
    one, two = adapters
    return [{}, {one: 1.0}, {two: 1.0}, {one: 1.0, two: 1.0}, {one: 0.5}, {one: -1.0, two: 0.25}]


class WithSets:
    """A scheduler, and the numbers that it knows sets of adapters by."""

    def __init__(self, bench: Bench, budget: int | None = None, **fields: Any) -> None:
        self.scheduler: Scheduler = bench.scheduler(budget, **fields)
        self._sets = LoraSets(bench.model, Engine(self.scheduler))

    def ask(self, choice: Scales, *args: Any, **fields: Any) -> Request:
        return ask(*args, adapters=self._sets.index(choice), **fields)

    def index(self, choice: Any) -> int:
        return self._sets.index(choice)


def alone(bench: Bench, choice: Scales, request: Request) -> list[list[int]]:
    """Run it on a context of its own that has these adapters and never others."""
    found = []
    for index in range(request.best_of):
        with _core.Context(bench.model, **SHAPE, **EXACT) as context:
            context.set_adapters(choice)
            single = ask(
                prompt=request.prompt, n_tokens=request.max_tokens, sampler=request.sampler
            )
            single.seed = request.seed + index
            run(Scheduler(context), single)
            found.append(answer(single))
    return found


def by_hand(bench: Bench, choice: Scales, prompt: list[int], n: int) -> list[int]:
    """Decode token by token through the core and take numpy's argmax of each row."""
    tokens = list(prompt)
    banned = bench.model.vocab.eos
    with _core.Context(bench.model, **SHAPE, **EXACT) as context:
        context.set_adapters(choice)
        for pos in range(len(prompt) + n - 1):
            batch = _core.Batch(1)
            batch.add(tokens[pos], pos, [0], True)
            context.decode(batch)
            if pos + 1 >= len(prompt):
                with context.logits() as view:
                    row = np.array(view)
                row[banned] = -np.inf
                tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]


@UNIFIED
def test_each_request_of_a_mixture_answers_as_with_its_adapters_alone(
    bench: Bench, choices: list[Scales], unified: bool
) -> None:
    kit = WithSets(bench, n_ctx=2048, n_seq_max=6, kv_unified=unified)
    requests: list[tuple[Scales, Request]] = []
    for turn in range(3):
        # One prompt for all: taking another set's cells would show.
        prompt = prompt_of(50 + turn, turn)
        for choice in choices:
            n = 1 + turn % 2
            sampler = DRAWN if turn == 1 else GREEDY
            fields: dict[str, Any] = {"n": n, "best_of": n, "sampler": sampler}
            requests.append((choice, kit.ask(choice, prompt=prompt, n_tokens=9, **fields)))
    run(kit.scheduler, *(request for _, request in requests))
    for choice, request in requests:
        assert request.error is None
        assert answers(request) == alone(bench, choice, request)
    first = [answer(request) for _, request in requests[: len(choices)]]
    assert len({tuple(tokens) for tokens in first}) == len(choices)
    expected = [by_hand(bench, choice, requests[0][1].prompt, 9) for choice in choices]
    assert first == expected


@UNIFIED
def test_equal_sets_share_batches_however_they_are_given(
    bench: Bench, adapters: list[_core.LoraAdapter], unified: bool
) -> None:
    one, two = adapters
    steps = {}
    ways: dict[str, list[Any]] = {
        "base": [None, {}, {one: 0.0}, {two: 0}],
        "one": [one, {one: 1.0}, {one: 1}, {two: 0.0, one: 1.0}],
        "both": [
            {one: 1.0, two: 0.5},
            {two: 0.5, one: 1.0},
            {one: 1, two: 0.5},
            {two: 0.5, one: 1},
        ],
    }
    for name, given in ways.items():
        kit = WithSets(bench, n_ctx=2048, n_seq_max=4, kv_unified=unified)
        assert len({kit.index(choice) for choice in given}) == 1
        assert (kit.index(given[0]) == 0) == (name == "base")
        requests = [
            ask(6 + seed, 10, seed=seed, adapters=kit.index(choice))
            for seed, choice in enumerate(given)
        ]
        run(kit.scheduler, *requests)
        steps[name] = kit.scheduler.stepper.n_steps
    assert steps["base"] == steps["one"] == steps["both"]
    # Four sets cannot be in one batch.
    kit = WithSets(bench, n_ctx=2048, n_seq_max=4, kv_unified=unified)
    different = [
        kit.ask(choice, 6 + seed, 10, seed=seed)
        for seed, choice in enumerate(({}, {one: 1.0}, {two: 1.0}, {one: 2.0}))
    ]
    run(kit.scheduler, *different)
    assert kit.scheduler.stepper.n_steps == 4 * 10


def test_the_model_alone_is_itself_between_and_after_adapters(
    bench: Bench, adapters: list[_core.LoraAdapter]
) -> None:
    kit = WithSets(bench, n_ctx=2048, n_seq_max=4)
    for turn in range(3):
        plain = [ask(30, 12, seed=10 * turn + n, cache_prompt=False) for n in range(2)]
        tuned = [kit.ask({a: 2.0}, 30, 12, seed=10 * turn + n) for n, a in enumerate(adapters)]
        run(kit.scheduler, *plain, *tuned)
        after = ask(30, 12, seed=10 * turn, cache_prompt=False)
        run(kit.scheduler, after)
        for request in (*plain, after):
            assert answer(request) == bench.alone(request).tokens
        for request, expected in zip(tuned, plain, strict=True):
            assert answer(request) != answer(expected)


def test_a_set_that_generates_without_end_leaves_others_their_turn(
    bench: Bench, adapters: list[_core.LoraAdapter]
) -> None:
    one, two = adapters
    kit = WithSets(bench, n_ctx=2048, n_seq_max=4)
    endless = kit.ask({one: 1.0}, 10, None)
    kit.scheduler.submit(endless)
    kit.scheduler.step()
    late = [kit.ask({two: 1.0}, 10, 12, seed=1), ask(10, 12, seed=2)]
    run(kit.scheduler, *late)
    assert not endless.done
    kit.scheduler.cancel(endless)
    assert answers(late[0]) == alone(bench, {two: 1.0}, late[0])
    assert answers(late[1]) == alone(bench, {}, late[1])


@UNIFIED
def test_different_sets_share_no_cells_and_equal_ones_do(
    bench: Bench, adapters: list[_core.LoraAdapter], unified: bool
) -> None:
    choices: list[Scales] = [{}, {adapters[0]: 1.0}, {adapters[0]: 1.0, adapters[1]: 1.0}]
    kit = WithSets(bench, n_ctx=12 * 256, n_seq_max=12, kv_unified=unified)
    stem = prompt_of(90)
    requests = [
        (choice, kit.ask(choice, prompt=[*stem, *prompt_of(4, 1 + n)], n_tokens=3))
        for n in range(4)
        for choice in choices
    ]
    run(kit.scheduler, *(request for _, request in requests))
    # The stem once for each set, all at once.
    assert kit.scheduler.stepper.n_decoded == 3 * 90 + 12 * (4 + 2)
    for choice, request in requests:
        assert answers(request) == alone(bench, choice, request)
    # From idle slots.
    kit = WithSets(bench, n_ctx=12 * 256, n_seq_max=12, kv_unified=unified)
    for turn in range(2):
        for choice in choices:
            request = kit.ask(choice, prompt=[*stem, *prompt_of(4, 20 + turn)], n_tokens=3)
            run(kit.scheduler, request)
            assert request.sequences[0].n_cached == (90 if turn else 0)
            assert answers(request) == alone(bench, choice, request)


@UNIFIED
def test_states_in_host_memory_keep_their_set(
    bench: Bench, adapters: list[_core.LoraAdapter], unified: bool
) -> None:
    choices: list[Scales] = [{}, {adapters[0]: 1.0}, {adapters[0]: 0.5}, {adapters[1]: 1.0}]
    kit = WithSets(bench, 1 << 22, n_ctx=512, n_seq_max=2, kv_unified=unified)
    prompt = prompt_of(80)
    for turn in range(3):
        for choice in choices:
            request = kit.ask(choice, prompt=prompt, n_tokens=4)
            run(kit.scheduler, request)
            assert request.sequences[0].n_cached == (79 if turn else 0)
            assert answers(request) == alone(bench, choice, request)
    assert kit.scheduler.cache.n_restored >= 4


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "computed again"])
def test_a_suspended_request_goes_on_with_its_adapters(
    bench: Bench, adapters: list[_core.LoraAdapter], swap: bool
) -> None:
    one, two = adapters
    for n_steps in (1, 2, 5, 9):
        kit = WithSets(bench)
        if not swap:
            kit.scheduler._swap.n_bytes_left = 0
        low = kit.ask({one: 1.0}, 60, 20)
        high = kit.ask({two: 1.0}, prompt=low.prompt, n_tokens=5, priority=1)
        kit.scheduler.submit(low)
        for _ in range(n_steps):
            kit.scheduler.step()
        kit.scheduler.submit(high)
        kit.scheduler.step()
        assert low.sequences[0].slot is None
        finish(kit.scheduler, low, high)
        assert answers(low) == alone(bench, {one: 1.0}, low)
        assert answers(high) == alone(bench, {two: 1.0}, high)


def test_an_adapter_that_is_dropped_or_closed_serves_those_that_run(
    tiny: _core.Model, bench: Bench, adapters: list[_core.LoraAdapter]
) -> None:
    path = adapters[0].path
    kit = WithSets(bench, n_ctx=512, n_seq_max=2)
    closed, dropped = _core.LoraAdapter(tiny, path), _core.LoraAdapter(tiny, path)
    requests = [
        kit.ask({adapter: 1.0}, 20, 10, seed=seed) for seed, adapter in enumerate((closed, dropped))
    ]
    for request in requests:
        kit.scheduler.submit(request)
    kit.scheduler.step()
    assert slot_of(requests[0]) != slot_of(requests[1])
    closed.close()
    del dropped
    gc.collect()
    finish(kit.scheduler, *requests)
    for request in requests:
        assert answers(request) == alone(bench, {adapters[0]: 1.0}, request)
    with pytest.raises(AdapterError, match="closed"):
        kit.index({closed: 1.0})


def test_a_wrong_choice_is_refused_and_takes_no_number(
    tiny_path: Path, tiny_lora_path: Path, bench: Bench, adapters: list[_core.LoraAdapter]
) -> None:
    kit = WithSets(bench)
    one = adapters[0]
    with _core.Model(tiny_path) as other:
        stranger = _core.LoraAdapter(other, tiny_lora_path)
        for choice, error in [
            ("adapter.gguf", ParameterError),
            ([one], ParameterError),
            ({one: "1"}, ParameterError),
            ({one: True}, ParameterError),
            ({tiny_lora_path: 1.0}, ParameterError),
            ({one: float("nan")}, ParameterError),
            ({one: float("inf")}, ParameterError),
            (stranger, AdapterError),
        ]:
            with pytest.raises(error):
                kit.index(choice)
        stranger.close()
    assert kit.index({one: 1.0}) == 1
    assert kit.index({one: 2.0}) == 2
    request = ask(10, 2)
    run(kit.scheduler, request)
    assert answer(request) == bench.alone(request).tokens
