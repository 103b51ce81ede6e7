"""`llama-crab bench` against llama-bench: the same tests, taking turns in one run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, Native, spread

from llama_crab import LlamaParams
from llama_crab.tuning.bed import Bed
from llama_crab.tuning.workloads import Generate, Prefill, Workload

ROUNDS = 7
TESTS: list[tuple[Workload, dict[str, int]]] = [
    (Prefill(512), {"n_prompt": 512}),
    (Generate(128), {"n_gen": 128}),
    (Prefill(128, 1024), {"n_prompt": 128, "depth": 1024}),
    (Generate(64, 1024), {"n_gen": 64, "depth": 1024}),
]


@pytest.mark.parametrize(("workload", "same"), TESTS, ids=[work.name for work, _ in TESTS])
@pytest.mark.benchmark(group="bench")
def test_bench(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    smollm2: Path,
    workload: Workload,
    same: dict[str, int],
) -> None:
    params = LlamaParams(
        smollm2,
        n_threads=N_THREADS,
        flash_attn_type=True,
        swa_full=False,
        n_gpu_layers=GPU_LAYERS or None,
    )
    ours: list[float] = []
    theirs: list[float] = []
    with Bed(workload.fit(params)) as bed:
        workload.warm_up(bed)

        def setup() -> None:
            theirs.append(native.bench(smollm2, **same))
            # llama-bench warms up and fills its context right before it measures; the bed has
            # waited for another process.
            workload.run(bed)

        benchmark.pedantic(
            lambda: ours.append(workload.n_tokens / workload.run(bed)), setup=setup, rounds=ROUNDS
        )
    pairs = [one / other for one, other in zip(ours, theirs, strict=True)]
    figure = {
        "ratio": round(statistics.median(pairs), 4),
        "ratios": spread(pairs),
        "ours_tok_s": spread(ours),
        "llama_bench_tok_s": spread(theirs),
    }
    benchmark.extra_info.update(figure)
    figures[f"bench/{workload.name}"] = figure
