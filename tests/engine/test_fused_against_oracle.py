"""The fused executor against the float64 definition of every stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_cases import (
    SELECTORS,
    Case,
    make_case,
    oracle_for,
    started,
)
from sampling_oracle import Draw, Mt19937, NoCandidateError

from llama_crab import _core
from llama_crab.errors import SamplerError
from llama_crab.sampling import SamplerChain

EXECUTOR = "fused"
# Share of draws that decide on a threshold, so that all that follows may differ: rows with ties,
# or so large or small that float32 hardly tells their probabilities apart, mostly.
MOST_SKIPPED = 0.08


@pytest.fixture(scope="module")
def model(vocab_folder: Path) -> Iterator[_core.Model]:
    with _core.Model(str(vocab_folder / "ggml-vocab-llama-spm.gguf"), vocab_only=True) as loaded:
        yield loaded


def agrees(draw: Draw, ids: list[int], p: list[float], *, has_p: bool) -> bool:
    """Assert that the candidates agree; False where rounding forbids to say."""
    if draw.is_blurred:
        return False
    different = set(ids) ^ set(draw.ids.tolist())
    assert different <= draw.doubtful, f"wrongly kept or dropped: {different - draw.doubtful}"
    if different:
        return False
    place = np.empty(int(draw.ids.max()) + 1, np.int64)
    place[draw.ids] = np.arange(draw.ids.size)
    order = place[np.asarray(ids)]
    keys, slack = draw.keys[order], draw.slack[order]
    assert (keys[:-1] <= keys[1:] + slack[:-1] + slack[1:]).all(), "wrong order"
    clear = np.append((keys[1:] == keys[:-1]) & (slack[1:] == 0.0), False)
    assert (order[:-1] < order[1:])[clear[:-1]].all(), "of equal candidates the smaller id is first"
    if has_p:
        expected = draw.p[order]
        likely = expected > 1e-30
        np.testing.assert_allclose(np.asarray(p)[likely], expected[likely], rtol=draw.rtol)
    return True


class Tally:
    """Draws compared, skipped, and selected differently."""

    def __init__(self) -> None:
        self.draws = self.skipped = self.different = 0

    def add(self, case: Case, executor: str, model: _core.Model) -> None:
        """Compare a case draw by draw until the first different token."""
        sampler, oracle = started(case, executor, model), oracle_for(case, model)
        for row in case.rows:
            try:
                draw = oracle.apply(row)
            except NoCandidateError:
                with pytest.raises(SamplerError):
                    sampler.select(row)
                return
            outcome = sampler.apply(row)
            self.draws += 1
            has_p = case.stages[-1].name != "greedy"
            compared = agrees(draw, outcome[0], outcome[2], has_p=has_p)
            self.skipped += not compared
            if outcome[3] != draw.selected:
                self.different += compared
                return
            sampler.accept(draw.selected)
            oracle.accept(draw.selected)

    def add_all(self, cases: Iterable[Case], executor: str, model: _core.Model) -> None:
        for case in cases:
            try:
                self.add(case, executor, model)
            except AssertionError as error:
                raise AssertionError(f"{case!r}: {error}") from error
        print(
            f"{self.draws} draws, {self.skipped} on a threshold, "
            f"selected the same: {1 - self.different / self.draws:.4%}"
        )
        assert self.skipped <= MOST_SKIPPED * self.draws
        assert self.different <= max(0.001 * self.draws, 1)


@pytest.mark.parametrize("chunk", range(4))
def test_candidates_and_probabilities(model: _core.Model, chunk: int) -> None:
    """Sets, order, probabilities and tokens are those of the definition, up to rounding."""
    seeds = range(500 * chunk, 500 * (chunk + 1))
    Tally().add_all((make_case(seed, big=0.004) for seed in seeds), EXECUTOR, model)


@pytest.mark.full
@pytest.mark.parametrize("chunk", range(20))
def test_candidates_and_probabilities_of_many(model: _core.Model, chunk: int) -> None:
    seeds = range(10_000 + 1000 * chunk, 10_000 + 1000 * (chunk + 1))
    Tally().add_all((make_case(seed) for seed in seeds), EXECUTOR, model)


def test_the_oracles_generator_is_the_standards() -> None:
    """The standard gives the 10,000th word of a default std::mt19937."""
    generator = Mt19937(5489)
    assert [generator.word() for _ in range(10_000)][-1] == 4_123_659_995
    first, second, third = Mt19937(7), Mt19937(7), Mt19937(7)
    low, high = first.word(), first.word()
    assert second.double() == (low + high * 2.0**32) / 2.0**64
    assert third.single() == float(np.float32(low)) / 2.0**32


SELECTING: list[Any] = [
    SamplerChain().penalties(16, 1.2, 0.1, 0.2).temp(1.2).xtc(0.5, 0.05),
    SamplerChain().dry(0.8, seq_breakers=()).top_p(0.95).dist(3),
    SamplerChain().mirostat(tau=3.0),
    SamplerChain().mirostat_v2(tau=3.0),
    SamplerChain().adaptive_p(0.3),
    SamplerChain().greedy(),
]
assert {chain.selector.name for chain in SELECTING} == set(SELECTORS)


def rows_of(n_rows: int) -> list[Any]:
    rng = np.random.default_rng(11)
    return [rng.normal(0.0, 2.0, 200).astype(np.float32) for _ in range(n_rows)]


@pytest.mark.parametrize("chain", SELECTING, ids=repr)
def test_a_clone_goes_on_like_the_original(model: _core.Model, chain: SamplerChain) -> None:
    """A clone has history, random state and averages (llama.cpp's adaptive_p forgets its own)."""
    sampler = chain.compile(model, 5)
    rows = rows_of(60)
    for row in rows[:20]:
        sampler.select(row)
    copied = sampler.clone()
    assert [sampler.select(row) for row in rows[20:]] == [copied.select(row) for row in rows[20:]]


@pytest.mark.parametrize("chain", SELECTING, ids=repr)
def test_reset_starts_again(model: _core.Model, chain: SamplerChain) -> None:
    sampler = chain.compile(model, 5)
    rows = rows_of(40)
    first = [sampler.select(row) for row in rows]
    sampler.reset()
    assert [sampler.select(row) for row in rows] == first


@pytest.mark.parametrize("chain", SELECTING, ids=repr)
def test_select_is_apply_and_accept(model: _core.Model, chain: SamplerChain) -> None:
    one, other = (chain.compile(model, 5) for _ in range(2))
    for row in rows_of(40):
        token = other.apply(row)[3]
        other.accept(token)
        assert one.select(row) == token
