"""Vectors against llama.cpp's own llama-embedding, with every pooling that it has."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import Llama

# Short enough for one micro-batch: llama-embedding cannot take a longer one.
TEXTS = [
    "The capital of France is Paris.",
    "Paris is the capital of France, and has been for most of its history.",
    "def add(a, b): return a + b",
    "Größe und Übermut, Привет мир",
    "x",
    " ".join(["A longer text of many sentences says the same thing again."] * 12),
]


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS), "utf-8")
    return path


@pytest.fixture(scope="module")
def native_vectors(
    find_program: Callable[[str], Path], texts_file: Path
) -> Callable[..., npt.NDArray[np.float64]]:
    program = find_program("llama-embedding")

    def embed(model: Path, pooling: str, *flags: str) -> npt.NDArray[np.float64]:
        done = subprocess.run(
            [
                *(str(program), "-m", str(model), "-f", str(texts_file), "--pooling", pooling),
                *("-t", "1", "-c", "512", "-b", "512", "-ub", "512", "-ngl", "0", "-fa", "off"),
                *("--embd-output-format", "array", *flags),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return np.array(json.loads(done.stdout), np.float64)

    return embed


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
# Products with 4-bit weights round by the shape of the batch, and the two batch differently.
@pytest.mark.parametrize(
    ("model", "at_least"),
    [("minilm_path", 0.9999), ("minilm_f16_path", 0.9999), ("smol_path", 0.999)],
)
def test_vectors_are_those_of_llama_embedding(
    request: pytest.FixtureRequest,
    native_vectors: Callable[..., npt.NDArray[np.float64]],
    model: str,
    at_least: float,
    pooling: str,
) -> None:
    path: Path = request.getfixturevalue(model)
    expected = native_vectors(path, pooling)
    fields = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": 1, "n_seq_max": 4}
    with Llama(
        path, embeddings=True, pooling_type=pooling, flash_attn_type=False, **fields
    ) as llama:
        found = llama.embed(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (len(TEXTS), expected.shape[1])
    cosines = (found * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-5)
    assert cosines.min() >= at_least
    # Different texts have different vectors: a constant would be as close to another constant.
    assert (found @ found.T)[np.triu_indices(len(TEXTS), 1)].max() < 0.9999


def test_vectors_that_are_not_normalised_have_the_same_length(
    native_vectors: Callable[..., npt.NDArray[np.float64]], minilm_path: Path
) -> None:
    expected = native_vectors(minilm_path, "mean", "--embd-normalize", "-1")
    with Llama(minilm_path, n_threads=1) as llama:
        found = llama.embed(TEXTS, normalize=False)
    lengths = np.linalg.norm(expected, axis=1)
    assert abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), lengths, rtol=1e-3)
