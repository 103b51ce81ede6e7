"""Speculative decoding against plain decoding, fixed draft lengths, and llama.cpp's own programs.

Answers end where the model ends them. The environment chooses models and sizes (README.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fetch_models
import pytest
from draft_replay import bounds, drafts
from native_lookup import NativeLookup, NativeSetting
from pytest_benchmark.fixture import BenchmarkFixture
from requantised import requantised
from side_by_side import Native
from speculation_turns import (
    N_CTX_SEQ,
    Bench,
    Prompt,
    acceptance,
    margins,
    numbers,
    ratio,
    setting,
    speed,
    take_turns,
)
from speculation_workloads import WORKLOADS, is_greedy, prompts
from step_cost import DEPTH, interpolated, step_cost

from llama_crab import speculative

ROUNDS = int(setting("ROUNDS", "3"))
SEQUENCES = numbers("SEQUENCES", "1,4,16")
N_PROMPTS = int(setting("PROMPTS", "16"))
N_TOKENS = int(setting("TOKENS", "128"))
NGRAMS = numbers("NGRAMS", "2,3,4")
LENGTHS = numbers("DRAFTS", "1,2,3,4,6,8,12,16,24")
N_FINALISTS = int(setting("FINALISTS", "3"))
NATIVE_GRID = [
    *(NativeSetting("llama-lookup", n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24)),
    *(NativeSetting("llama-speculative-simple", n, m) for m in (2, 3) for n in (2, 4, 8, 16)),
]
AUTO = speculative.AUTO
MODELS = ["given"] if os.environ.get("LLAMA_CRAB_BENCH_MODEL") else ["q4_1", "q8_0", "gemma"]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, native: Native) -> Path:
    """Return SmolLM2 as it is and in Q8_0, and Gemma; or what the environment names."""
    if request.param == "given":
        return Path(os.environ["LLAMA_CRAB_BENCH_MODEL"])
    if request.param == "gemma":
        return fetch_models.fetch(fetch_models.GEMMA)
    original = fetch_models.fetch(fetch_models.DEMO_MODEL)
    return requantised(native, original, "Q8_0") if request.param == "q8_0" else original


@pytest.fixture(scope="module")
def cost_curve() -> Callable[[Path, int], dict[int, float]]:
    """Return a function that measures what steps cost, once a model and number of sequences."""
    known: dict[tuple[Path, int], dict[int, float]] = {}

    def curve(path: Path, n_seq: int) -> dict[int, float]:
        if (path, n_seq) not in known:
            known[path, n_seq] = step_cost(path, n_seq)
        return known[path, n_seq]

    return curve


def asked_of(bench: Bench, workload: str) -> list[Prompt]:
    texts = list(prompts(workload).values())[:N_PROMPTS]
    return [Prompt(text, bench.plain.tokenize(text), seed) for seed, text in enumerate(texts)]


@pytest.mark.parametrize("n_seq", SEQUENCES)
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.benchmark(group="speculation")
def test_speculation(
    benchmark: BenchmarkFixture,
    figures: dict[str, Any],
    cost_curve: Callable[[Path, int], dict[int, float]],
    model: Path,
    workload: str,
    n_seq: int,
) -> None:
    """`speculative="auto"` against plain decoding, and against the best of all fixed lengths.

    The grid runs once, over a quarter of the prompts; the best of it run in all rounds.
    """
    curve = cost_curve(model, n_seq)
    with ExitStack() as stack:
        bench = Bench(stack, model, workload, n_seq, N_TOKENS)
        asked = asked_of(bench, workload)
        quarter = asked[: max(n_seq, len(asked) // 4)]
        modes = bench.modes()
        first = take_turns(modes, quarter[:n_seq], n_seq, 1)
        grid = {f"{m}:{k}": bench.fixed(m, k) for m in NGRAMS for k in LENGTHS}
        heat = take_turns({"plain": modes["plain"], **grid}, quarter, n_seq, 1)
        finalists = sorted(grid, key=lambda name: -heat[name][0].tokens_per_sec)[:N_FINALISTS]
        modes |= {name: grid[name] for name in finalists}
        sums = take_turns(modes, asked, n_seq, ROUNDS, benchmark)
        plain, auto = sums["plain"], sums["auto"]
        plain_texts, auto_texts = plain[0].answers, auto[0].answers
        margin = margins(bench.plain, asked, plain_texts, auto_texts) if is_greedy(workload) else []
        stats = bench.auto.stats()["speculation"]
    tables = [
        drafts(p.tokens, answer, AUTO.min_ngram, AUTO.max_ngram)
        for p, answer in zip(asked, plain_texts, strict=True)
    ]
    bound = bounds(tables, n_seq, interpolated(curve))
    gain = ratio(auto, plain)
    figure = {
        "paired_ratio": gain,
        "first_turn_ratio": ratio(first["auto"], first["plain"])["median"],
        "plain_tok_s": speed(plain),
        "auto_tok_s": speed(auto),
        **acceptance(auto),
        "grid_ratio": {name: ratio(heat[name], heat["plain"])["median"] for name in grid},
        "fixed_ratio": {name: ratio(sums[name], plain) for name in finalists},
        "to_best_fixed": min(
            (ratio(auto, sums[name]) for name in finalists), key=lambda found: found["median"]
        ),
        "bound": bound,
        "of_bound": round(gain["median"] / bound["by_agreement"], 4),
        "differing_answers": sum(a != b for a, b in zip(plain_texts, auto_texts, strict=True)),
        "margins": margin,
        "step_cost": {"depth": DEPTH, "us": curve},
        "stats": stats,
    }
    benchmark.extra_info.update(figure)
    figures[f"speculation/{workload}/{n_seq}/{model.stem}"] = figure


@pytest.mark.parametrize("workload", [name for name in WORKLOADS if is_greedy(name)])
@pytest.mark.benchmark(group="speculation native")
def test_against_native(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    model: Path,
    workload: str,
) -> None:
    """Ours against the best settings of llama-lookup and llama-speculative-simple, one sequence.

    Theirs are chosen over a quarter of the prompts. llama-lookup without drafts is their plain
    decoding.
    """
    rate = "decoded_per_sec"
    with ExitStack() as stack:
        bench = Bench(stack, model, workload, 1, N_TOKENS)
        programs = NativeLookup(native, model, n_ctx=N_CTX_SEQ, n_tokens=N_TOKENS)
        asked = asked_of(bench, workload)
        grid = {point.name: bench.native(programs, point) for point in NATIVE_GRID}
        heat = take_turns(grid, asked[: max(1, len(asked) // 4)], 1, 1)
        best = {
            program: max(
                (point.name for point in NATIVE_GRID if point.program == program),
                key=lambda name: heat[name][0].decoded_per_sec,
            )
            for program in dict.fromkeys(point.program for point in NATIVE_GRID)
        }
        modes = bench.modes()
        modes["native_plain"] = bench.native(programs, NativeSetting("llama-lookup", 0))
        modes |= {program: grid[name] for program, name in best.items()}
        sums = take_turns(modes, asked, 1, ROUNDS, benchmark)
    theirs = ["native_plain", *best]
    figure = {
        "gain": ratio(sums["auto"], sums["plain"], rate),
        "native_gain": {p: ratio(sums[p], sums["native_plain"], rate) for p in best},
        "paired_ratio": {name: ratio(sums["auto"], sums[name], rate) for name in theirs},
        "plain_ratio": ratio(sums["plain"], sums["native_plain"], rate),
        "tok_s": {name: speed(sums[name], rate) for name in modes},
        "acceptance": {name: acceptance(sums[name]) for name in ("auto", *best)},
        "best": best,
        "grid_tok_s": {name: speed(found, rate)["median"] for name, found in heat.items()},
    }
    benchmark.extra_info.update(figure)
    figures[f"speculation_native/{workload}/{model.stem}"] = figure
