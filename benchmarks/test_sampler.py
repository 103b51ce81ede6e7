"""What a chain costs per token, both executors side by side, one core, no decode."""

from __future__ import annotations

import statistics
from typing import Any

import fetch_models
import numpy as np
import pytest
from logits_rows import Rows, recorded_rows, resized
from pytest_benchmark.fixture import BenchmarkFixture

from llama_crab import SamplerChain, _core

ROUNDS = 9
SIZES = [32_000, 49_152, 128_256, 262_144]
CHAINS = {
    "greedy": SamplerChain().greedy(),
    "top_k_first": SamplerChain().top_k(40).top_p(0.95).min_p(0.05).temp(0.8),
    "code": SamplerChain.code(),
    "chat": SamplerChain.chat(),
    "creative": SamplerChain.creative(),
    "temp_dist": SamplerChain().temp(0.8),
    "mirostat": SamplerChain().mirostat(),
    "mirostat_v2": SamplerChain().mirostat_v2(),
    "top_p": SamplerChain().top_p(0.95),
    "min_p": SamplerChain().min_p(0.05),
    "typical": SamplerChain().typical(0.9),
    "top_n_sigma": SamplerChain().top_n_sigma(1.0),
    "xtc": SamplerChain().xtc(0.5, 0.1),
    "temp_ext": SamplerChain().temp_ext(0.8, 0.3),
    "adaptive_p": SamplerChain().adaptive_p(0.5),
    "dry": SamplerChain().dry(0.8).temp(0.8),
    "top_k_1000": SamplerChain().top_k(1000),
    "logit_bias": SamplerChain().logit_bias({5: 1.0, 900: -1.0}).temp(0.8),
}


@pytest.fixture(scope="session")
def real_rows() -> Rows:
    return recorded_rows(fetch_models.fetch(fetch_models.GEMMA), 16)


@pytest.fixture(scope="session")
def vocab_model() -> Any:
    with _core.Model(fetch_models.fetch(fetch_models.DEMO_MODEL), vocab_only=True) as model:
        yield model


@pytest.mark.parametrize("n_vocab", SIZES)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.benchmark(group="sampler")
def test_chain(
    benchmark: BenchmarkFixture,
    figures: dict[str, Any],
    real_rows: Rows,
    vocab_model: _core.Model,
    name: str,
    n_vocab: int,
) -> None:
    """Microseconds per token: the least, and the median ratio of turns side by side."""
    rows = real_rows if n_vocab == real_rows.shape[1] else resized(real_rows, n_vocab)
    history = np.random.default_rng(0).integers(0, 32_000, 128)
    samplers = [
        CHAINS[name].with_executor(executor).compile(vocab_model, 1)
        for executor in ("fused", "reference")
    ]
    for sampler in samplers:
        for token in history:
            sampler.accept(int(token))
    turns: list[list[float]] = []

    def run() -> None:
        # The clock of a shared machine changes within a second: short turns see the same one.
        turns.append([min(_core.time_sampler(sampler, rows, n_vocab, 16)) for sampler in samplers])

    run()
    turns.clear()
    benchmark.pedantic(run, rounds=ROUNDS)
    fused, reference = zip(*turns, strict=True)
    figure = {
        "fused_us": round(min(fused), 2),
        "reference_us": round(min(reference), 2),
        "ratio": round(statistics.median(ours / theirs for ours, theirs in turns), 4),
    }
    benchmark.extra_info.update(figure)
    figures[f"sampler/{name}/{n_vocab}"] = figure
