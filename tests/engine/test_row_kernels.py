"""The vector kernels: every set that this processor runs chooses the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llama_crab import _core
from llama_crab.errors import SamplerError
from llama_crab.sampling import SamplerChain

CHAINS = [
    SamplerChain().greedy(),
    SamplerChain.default(),
    SamplerChain.chat(),
    SamplerChain().temp(0.8),
    SamplerChain().top_p(0.99),
    SamplerChain().top_k(700),
    SamplerChain().typical(0.9),
    SamplerChain().top_n_sigma(1.5),
    SamplerChain().temp_ext(1.0, 0.5).xtc(0.5),
    SamplerChain().mirostat(),
    SamplerChain().mirostat_v2(),
    SamplerChain().adaptive_p(0.3),
]


@pytest.fixture(scope="module")
def model(vocab_folder: Path) -> Iterator[_core.Model]:
    with _core.Model(str(vocab_folder / "ggml-vocab-llama-spm.gguf"), vocab_only=True) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def best_kernels() -> Iterator[None]:
    yield
    _core.use_row_kernels(_core.row_kernels()[0])


def test_the_processors_best_set_is_known() -> None:
    assert _core.row_kernels()[-1] == "baseline"
    with pytest.raises(ValueError, match="x86-64-v9"):
        _core.use_row_kernels("x86-64-v9")


@pytest.mark.parametrize("n", [1, 3, 15, 17, 63, 64, 65, 1023, 1025, 4100, 32000])
def test_all_sets_choose_the_same_tokens(model: _core.Model, n: int) -> None:
    """Sizes around every vector, tile and block; with impossible candidates among them."""
    rng = np.random.default_rng(n)
    rows = rng.normal(0.0, 3.0, (12, n)).astype(np.float32)
    rows[::3, rng.integers(0, n, n // 4)] = -np.inf
    rows[:, rng.integers(n)] = 2.0  # no row without a candidate
    chosen = []
    for name in _core.row_kernels():
        _core.use_row_kernels(name)
        samplers = [chain.compile(model, 7) for chain in CHAINS]
        chosen.append([[sampler.select(row) for row in rows] for sampler in samplers])
    assert all(tokens == chosen[0] for tokens in chosen)


def test_time_sampler_takes_rows_by_turns(model: _core.Model) -> None:
    rows = np.zeros((3, 100), np.float32)
    rows[[0, 1, 2], [5, 6, 7]] = 1.0
    for executor in ("fused", "reference"):
        chain = SamplerChain(executor=executor).penalties(8, penalty_present=9.0).greedy()
        sampler = chain.compile(model, 1)
        assert all(us > 0.0 for us in _core.time_sampler(sampler, rows, 100, 3))
        # It has chosen 5, 6 and 7, one from each row.
        assert sampler.select(rows[0]) not in (5, 6, 7)
        with pytest.raises(SamplerError, match="no rows of 64"):
            _core.time_sampler(sampler, rows, 64, 3)
        with pytest.raises(SamplerError, match="NaN"):
            _core.time_sampler(sampler, np.full(100, np.nan, np.float32), 100, 3)
