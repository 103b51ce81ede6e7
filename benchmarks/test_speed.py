"""Prefill and decode against llama-bench, interleaved A/B in one run."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, Native, spread

from llama_crab import Llama, SamplerChain

ROUNDS = 7
N_GEN = 128


def load(path: Path, n_ctx: int, flash_attn: bool) -> Llama:
    # As llama-bench: the context just large enough, so that both pad the cache alike.
    return Llama(
        path,
        n_ctx=n_ctx,
        flash_attn_type=flash_attn,
        n_threads=N_THREADS,
        n_gpu_layers=GPU_LAYERS or None,
    )


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.benchmark(group="decode")
def test_decode(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    model_path: Path,
    flash_attn: bool,
) -> None:
    """Greedy end-to-end decode, 128 tokens after a 16-token prompt, against tg128 -d 16."""
    prompt = list(range(1000, 1016))
    ours: list[float] = []
    theirs: list[float] = []
    overhead: list[float] = []
    with load(model_path, len(prompt) + N_GEN + 1, flash_attn) as llama:
        stepper = llama._engine.scheduler.stepper

        def before() -> None:
            theirs.append(
                native.bench(model_path, n_gen=N_GEN, depth=len(prompt), flash_attn=flash_attn)
            )

        def run() -> None:
            decoded = stepper.decode_us
            result = llama.create_completion(
                prompt,
                N_GEN + 1,
                sampler=SamplerChain.benchmark(),
                ignore_eos=True,
                cache_prompt=False,
            )
            timings = result.timings
            ours.append(N_GEN / timings.predicted_sec)
            native_sec = (stepper.decode_us - decoded) / 1e6 + timings.sample_sec
            overhead.append((timings.total_sec - native_sec) / timings.predicted_n * 1e6)

        run()
        ours.clear()
        overhead.clear()
        benchmark.pedantic(run, setup=before, rounds=ROUNDS)
    ratio = statistics.median(ours) / statistics.median(theirs)
    figure = {
        "ratio": round(ratio, 4),
        "ours_tok_s": spread(ours),
        "llama_bench_tok_s": spread(theirs),
        "overhead_us_per_token": spread(overhead),
    }
    benchmark.extra_info.update(figure)
    figures[f"decode/{model_path.stem}/{'fa' if flash_attn else 'nofa'}"] = figure


@pytest.mark.benchmark(group="prefill")
def test_prefill(
    benchmark: BenchmarkFixture, native: Native, figures: dict[str, Any], model_path: Path
) -> None:
    """Prefill of 512 tokens against pp512."""
    prompt = list(range(1000, 1512))
    ours: list[float] = []
    theirs: list[float] = []
    with load(model_path, len(prompt) + 1, True) as llama:

        def run() -> None:
            result = llama.create_completion(
                prompt, 1, sampler=SamplerChain.benchmark(), ignore_eos=True, cache_prompt=False
            )
            ours.append(len(prompt) / result.timings.prompt_sec)

        run()
        ours.clear()
        benchmark.pedantic(
            run,
            setup=lambda: theirs.append(native.bench(model_path, n_prompt=512)),
            rounds=ROUNDS,
        )
    ratio = statistics.median(ours) / statistics.median(theirs)
    figure = {
        "ratio": round(ratio, 4),
        "ours_tok_s": spread(ours),
        "llama_bench_tok_s": spread(theirs),
    }
    benchmark.extra_info.update(figure)
    figures[f"prefill/{model_path.stem}"] = figure


OPTIONS: dict[str, Any] = {
    "sampler": SamplerChain.benchmark(),
    "ignore_eos": True,
    "cache_prompt": False,
}


@pytest.mark.benchmark(group="overhead")
def test_overhead_of_a_whole_answer(
    benchmark: BenchmarkFixture, figures: dict[str, Any], smollm2: Path
) -> None:
    """What a token costs beyond llama_decode and sampling, in a short and in a long answer."""
    found: dict[str, float] = {}
    with load(smollm2, 2304, True) as llama:
        stepper = llama._engine.scheduler.stepper

        def run() -> None:
            for n in (100, 200, 1900, 2000):
                before = stepper.decode_us + stepper.sample_us
                start = time.perf_counter()
                llama.create_completion([1000], n, **OPTIONS)
                spent = (time.perf_counter() - start) * 1e6
                overhead = spent - (stepper.decode_us + stepper.sample_us - before)
                found[f"answer_of_{n}_us_per_token"] = round(overhead / n, 2)

        benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(found)
    figures["overhead/whole"] = found


@pytest.mark.benchmark(group="overhead")
def test_overhead_of_a_stream(
    benchmark: BenchmarkFixture, figures: dict[str, Any], smollm2: Path
) -> None:
    """The same while every token is handed out, with a stop string, early and late."""
    marks: list[tuple[float, int]] = []
    with load(smollm2, 2304, True) as llama:
        stepper = llama._engine.scheduler.stepper

        def run() -> None:
            marks.clear()
            chunks = llama.create_completion([1000], 2001, stream=True, stop="\0", **OPTIONS)
            marks.extend(
                (time.perf_counter() * 1e6, stepper.decode_us + stepper.sample_us) for _ in chunks
            )

        benchmark.pedantic(run, rounds=1)

    def overhead(begin: int, end: int) -> float:
        spent = [
            (marks[i + 1][0] - marks[i][0]) - (marks[i + 1][1] - marks[i][1])
            for i in range(begin, end)
        ]
        return round(statistics.median(spent), 2)

    figure = {"tokens_100_200_us": overhead(100, 200), "tokens_1900_2000_us": overhead(1900, 2000)}
    benchmark.extra_info.update(figure)
    figures["overhead/stream"] = figure
