"""What prompt lookup costs beside a decode: one token taken in and a draft after it.

The bar is 5 us per token behind 8,192 tokens. `cold` is what counts: before each token as much
memory is written to as a decode of a small model reads, so that the index has left the caches.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llama_crab import _core

Tokens = npt.NDArray[np.int32]

N_CONTEXT = 8192
N_TOKENS = 256
N_DRAFT = 16
EVICT_BYTES = 64 << 20
PACKAGE = Path(_core.__file__).parent


@pytest.fixture(scope="module")
def texts(smollm2: Path) -> dict[str, Tokens]:
    """Return sequences of 8,192 tokens and those that come after."""
    n = N_CONTEXT + N_TOKENS
    with _core.Model(str(smollm2), vocab_only=True) as model:
        code = "".join(path.read_text("utf-8") for path in sorted(PACKAGE.glob("*.py")))
        tokens = model.vocab.tokenize(code, False, False)[:n]
    rng = np.random.default_rng(1)
    return {
        "code": np.array(tokens, np.int32),
        "one token": np.full(n, 42, np.int32),
        "random": rng.integers(0, 49_152, n, dtype=np.int32),
    }


@pytest.mark.parametrize("orders", [(1, 2), (1, 4), (1, 16)], ids=str)
@pytest.mark.parametrize("kind", ["code", "one token", "random"])
@pytest.mark.benchmark(group="n-gram index")
def test_extend_and_draft(
    benchmark: BenchmarkFixture,
    figures: dict[str, Any],
    texts: dict[str, Tokens],
    kind: str,
    orders: tuple[int, int],
) -> None:
    tokens = texts[kind]
    assert len(tokens) == N_CONTEXT + N_TOKENS
    known = _core.NgramIndex(*orders)
    known.extend(tokens[:N_CONTEXT])

    warm: list[float] = []

    def run() -> None:
        warm.extend(_core.time_ngram_index(copy.copy(known), tokens, N_DRAFT, 0))

    benchmark.pedantic(run, rounds=20, warmup_rounds=1)
    cold = _core.time_ngram_index(copy.copy(known), tokens, N_DRAFT, EVICT_BYTES)
    figure = {
        "warm_us": round(statistics.fmean(warm), 3),
        "cold_us": round(statistics.fmean(cold), 3),
        "cold_median_us": round(statistics.median(cold), 3),
        "bytes_per_token": round(known.n_bytes / N_CONTEXT, 1),
    }
    benchmark.extra_info.update(figure)
    figures[f"ngram_index/{kind}/{orders[0]}..{orders[1]}"] = figure


@pytest.mark.benchmark(group="n-gram index")
def test_take_in_a_prompt(
    benchmark: BenchmarkFixture, figures: dict[str, Any], texts: dict[str, Tokens]
) -> None:
    """8,192 tokens at once, copied from Python: what a new request waits for."""

    def run() -> None:
        _core.NgramIndex(1, 2).extend(texts["code"][:N_CONTEXT])

    benchmark(run)
    figures["ngram_index/prompt of 8192"] = {"us": round(benchmark.stats["median"] * 1e6, 1)}


@pytest.mark.benchmark(group="n-gram cache")
def test_cache(
    benchmark: BenchmarkFixture,
    figures: dict[str, Any],
    texts: dict[str, Tokens],
    tmp_path: Path,
) -> None:
    """A full cache of a million n-grams: learning, drafting (called from Python), its file."""
    rng = np.random.default_rng(2)
    cache = _core.NgramCache(1 << 20)
    cache.learn(rng.integers(0, 49_152, 600_000, dtype=np.int32))
    cache.learn(texts["code"])
    answers = rng.integers(0, 49_152, (64, 256), dtype=np.int32)
    taken = iter(range(1 << 30))

    def learn() -> None:
        cache.learn(answers[next(taken) % 64])

    benchmark(learn)
    figure = {"learn_us_per_token": round(benchmark.stats["median"] * 1e6 / 256, 3)}
    for name, action in {
        "draft_us": lambda: cache.draft(texts["code"][-40:-30], 8),
        "save_us": lambda: cache.save(tmp_path / "x.ngrams", 1),
        "load_us": lambda: cache.load(tmp_path / "x.ngrams", 1, 49_152),
    }.items():
        figure[name] = round(median_us(action), 1)
    figure["file_mib"] = round((tmp_path / "x.ngrams").stat().st_size / 2**20, 1)
    figures["ngram_cache"] = figure


def median_us(action: Any, rounds: int = 11) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        action()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)
