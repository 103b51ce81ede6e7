"""`Llama.perf` and `Llama.measure` against the results of the requests themselves."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llama_crab import AsyncLlama, Completion, Llama, LlamaParams, ParameterError, Perf
from llama_crab.errors import RequestTimeoutError
from llama_crab.perf import PerfMeter, Reading

FIELDS: dict[str, Any] = {
    "n_ctx": 2048, "n_seq_max": 4, "n_ubatch": 32, "n_batch": 64, "n_threads": 1,
}  # fmt: skip
PROMPTS = [[300 + i] * (10 + i) for i in range(12)]


@pytest.fixture
def llama(tiny_path: Path) -> Iterator[Llama]:
    with Llama(tiny_path, **FIELDS) as found:
        yield found


def check_balance(perf: Perf, results: list[Completion]) -> None:
    """Compare with the sums over what the requests reported."""
    usages = [result.usage for result in results]
    assert perf.prompt_n == sum(usage.prompt_tokens for usage in usages)
    assert perf.cached_n == sum(usage.cached_tokens for usage in usages)
    assert perf.predicted_n == sum(usage.completion_tokens for usage in usages)
    reasons = Counter(result.finish_reason for result in results)
    assert {reason: n for reason, n in perf.requests.items() if n} == reasons
    assert perf.n_requests == len(results)
    assert perf.first_token.n == sum(result.timings.first_token_sec > 0 for result in results)


def test_counts_balance_with_the_results_over_concurrent_requests(llama: Llama) -> None:
    def one(i: int) -> Completion:
        stop = ["e", "a"] if i % 3 == 0 else ()
        return llama.create_completion(PROMPTS[i], 20 + i, seed=i, n=1 + i % 2, stop=stop)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(one, range(12)))
    results += [llama.create_completion(PROMPTS[0], 5, seed=1) for _ in range(2)]
    assert results[-1].usage.cached_tokens > 0
    perf = llama.perf
    check_balance(perf, results)
    assert perf.prefilled_n >= perf.prompt_n - perf.cached_n
    assert perf.n_steps == llama.stats()["n_steps"]
    assert 0 < perf.prefill_sec + perf.decode_sec + perf.sample_sec < perf.wall_sec


def test_first_token_and_gaps_are_those_of_the_timings(llama: Llama) -> None:
    timings = llama.create_completion(PROMPTS[0], 30, ignore_eos=True).timings
    perf = llama.perf
    assert perf.first_token.p50 == pytest.approx(timings.first_token_sec, rel=1 / 64)
    total = perf.inter_token.mean * perf.inter_token.n
    assert total == pytest.approx(timings.predicted_sec, rel=1 / 64)
    assert perf.inter_token.n == 29


def test_cancels_and_errors_are_counted_with_what_they_had_given(llama: Llama) -> None:
    handle = llama.submit(PROMPTS[0], 900, ignore_eos=True, stream=True)
    for _ in range(3):
        next(handle)
    handle.cancel()
    cancelled = handle.result()
    assert cancelled.finish_reason == "cancelled"
    check_balance(llama.perf, [cancelled])

    def fail(tokens: Any, logits: Any) -> None:
        if len(tokens) == len(PROMPTS[1]) + 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        llama.create_completion(PROMPTS[1], 20, ignore_eos=True, logits_processors=[fail])
    with pytest.raises(RequestTimeoutError):
        llama.create_completion(PROMPTS[2], 900, ignore_eos=True, timeout=1e-5)
    perf = llama.perf
    assert dict(perf.requests) == {"stop": 0, "length": 0, "cancelled": 1, "error": 2}
    assert perf.prompt_n == sum(map(len, PROMPTS[:3]))
    assert perf.predicted_n == cancelled.usage.completion_tokens + 2


def test_a_best_of_counts_all_answers_and_one_request(llama: Llama) -> None:
    result = llama.create_completion(PROMPTS[0], 8, n=1, best_of=4, seed=3, ignore_eos=True)
    perf = llama.perf
    check_balance(perf, [result])
    assert perf.predicted_n == 32
    assert perf.inter_token.n == 4 * 7


def test_reset_starts_again_and_leaves_measurements_alone(llama: Llama) -> None:
    with llama.measure() as m:
        llama.create_completion(PROMPTS[0], 5, ignore_eos=True)
        llama.reset_perf()
        assert llama.perf.n_requests == llama.perf.predicted_n == llama.perf.inter_token.n == 0
        llama.create_completion(PROMPTS[1], 6, ignore_eos=True)
    assert llama.perf.predicted_n == 6
    assert m.perf.predicted_n == 11


def test_a_block_counts_what_happens_in_it_whoever_asked(llama: Llama) -> None:
    llama.create_completion(PROMPTS[0], 7)
    results: list[Completion] = []

    def ask(i: int) -> None:
        results.append(llama.create_completion(PROMPTS[i], 12, ignore_eos=True))

    with llama.measure() as outer:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with llama.measure() as inner:
            ask(7)
        assert outer.perf.n_requests == 7  # readable within, too
    ask(8)
    check_balance(outer.perf, results[:7])
    check_balance(inner.perf, results[6:7])
    assert inner.perf.inter_token.n == 11
    assert 0 < inner.perf.wall_sec < outer.perf.wall_sec
    assert inner.perf.tokens_per_sec == 12 / inner.perf.wall_sec
    assert inner.perf == inner.perf


def test_a_request_across_a_border_counts_with_what_it_does_on_each_side(llama: Llama) -> None:
    with llama.create_completion(PROMPTS[0], 20, ignore_eos=True, stream=True) as stream:
        for _ in range(5):
            next(stream)
        with llama.measure() as m:
            for _ in range(6):
                next(stream)
            n_within = m.perf.predicted_n
        stream.result()
    perf = m.perf
    assert perf.predicted_n == n_within == perf.inter_token.n == 6
    assert perf.n_requests == perf.prompt_n == perf.prefilled_n == perf.first_token.n == 0
    assert llama.perf.predicted_n == 20


def test_a_block_that_fails_or_closes_the_model_stays_readable(tiny_path: Path) -> None:
    llama = Llama(tiny_path, **FIELDS)
    m = llama.measure()

    def block() -> None:
        with m:
            llama.create_completion(PROMPTS[0], 4, ignore_eos=True)
            llama.close()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert m.perf.predicted_n == 4
    assert m.perf == m.perf
    assert llama.perf.predicted_n == 4
    assert "4 tokens" in str(m)
    assert m.peak_rss_growth is None or m.peak_rss_growth >= 0


def test_the_async_facade_measures_tasks(tiny_path: Path) -> None:
    async def main() -> None:
        async with AsyncLlama.load(LlamaParams(tiny_path, **FIELDS)) as llama:
            with llama.measure() as m:
                asked = [llama.create_completion(prompt, 9) for prompt in PROMPTS]
                results = await asyncio.gather(*asked)
            check_balance(m.perf, results)
            check_balance(llama.perf, results)
            llama.reset_perf()
            assert llama.perf.n_requests == 0

    asyncio.run(main())


def test_a_snapshot_is_immutable_and_plain_as_a_dict(llama: Llama) -> None:
    import json

    llama.create_completion(PROMPTS[0], 4, ignore_eos=True)
    perf = llama.perf
    with pytest.raises(AttributeError):
        perf.n_steps = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        perf.requests["stop"] = 0  # type: ignore[index]
    values = json.loads(json.dumps(perf.to_dict()))
    assert values["requests"]["length"] == values["n_requests"] == 1
    assert values["inter_token"]["n"] == 3
    assert values["tokens_per_sec"] == pytest.approx(4 / perf.wall_sec)


def test_a_model_that_embeds_has_none(tiny_embedder_path: Path) -> None:
    with Llama(tiny_embedder_path) as llama, pytest.raises(ParameterError, match="embed"):
        _ = llama.perf


def test_the_page_runs(run_page: Callable[..., list[str]], tiny_path: Path) -> None:
    lines = run_page("measuring-requests.md", 3, '"model.gguf"', repr(str(tiny_path)))
    assert lines[2].startswith("requests       1 (")
    assert " tokens/s, p99 " in lines[-1]


def test_a_reset_while_perf_is_read_gives_no_negative_counts(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread does it between the reading and the subtraction."""
    llama.create_completion(PROMPTS[0], 5, ignore_eos=True)
    read = PerfMeter.read

    def read_then_reset(meter: PerfMeter) -> Reading:
        found = read(meter)
        monkeypatch.setattr(PerfMeter, "read", read)
        llama.create_completion(PROMPTS[1], 5, ignore_eos=True)
        meter.reset()
        return found

    monkeypatch.setattr(PerfMeter, "read", read_then_reset)
    perf = llama.perf
    assert (perf.predicted_n, perf.n_requests, perf.first_token.n) == (5, 1, 1)
    assert perf.wall_sec > 0.0
