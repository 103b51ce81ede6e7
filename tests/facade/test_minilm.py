"""A real sentence embedder against the vectors of its original; a text model that embeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import Llama, ParameterError, _core, errors

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "minilm_vectors.json").read_text("utf-8")
)
ENTRIES: list[dict[str, Any]] = GOLDEN["texts"]
N_TOKENS_MAX: int = GOLDEN["n_tokens_max"]
# What the original cuts is cut below; what it tokenises otherwise is embedded from its ids.
PLAIN = [entry for entry in ENTRIES if not entry["truncated"] and not entry["different_ids"]]
TEXTS = ["The capital of France is Paris.", "Water boils at 100 degrees.", "def f(x):\n", "x"]


@pytest.fixture(scope="module", params=["F32", "F16"])
def minilm(request: pytest.FixtureRequest) -> Iterator[Llama]:
    names = {"F32": "minilm_path", "F16": "minilm_f16_path"}
    with Llama(request.getfixturevalue(names[request.param]), n_threads=1) as llama:
        yield llama


def cosines(found: npt.NDArray[np.float32], expected: Any) -> npt.NDArray[np.float64]:
    """Return the cosine of each pair of rows; both must have length 1."""
    pairs = [np.asarray(rows, np.float64) for rows in (found, expected)]
    for rows in pairs:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=0, atol=1e-5)
    return np.asarray((pairs[0] * pairs[1]).sum(axis=1))


def vectors_of(entries: list[dict[str, Any]]) -> list[list[float]]:
    return [entry["vector"] for entry in entries]


def test_texts_have_the_originals_vectors(minilm: Llama) -> None:
    result = minilm.create_embedding([entry["text"] for entry in PLAIN])
    assert result.vectors.shape == (len(PLAIN), 384)
    assert len(PLAIN) > 20
    assert cosines(result.vectors, vectors_of(PLAIN)).min() >= 0.9999
    assert result.usage.prompt_tokens == sum(len(entry["ids"]) for entry in PLAIN)


def test_each_text_alone_has_the_originals_vector(minilm: Llama) -> None:
    found = np.array([minilm.embed(entry["text"]) for entry in PLAIN])
    assert cosines(found, vectors_of(PLAIN)).min() >= 0.9999


def test_ids_have_the_originals_vectors(minilm: Llama) -> None:
    """Also those that llama.cpp does not make of the text."""
    result = minilm.create_embedding([entry["ids"] for entry in ENTRIES])
    assert cosines(result.vectors, vectors_of(ENTRIES)).min() >= 0.9999
    assert result.usage.prompt_tokens == sum(len(entry["ids"]) for entry in ENTRIES)
    assert result.n_truncated == 0


def test_texts_have_the_originals_tokens(minilm: Llama) -> None:
    for entry in PLAIN:
        assert minilm.tokenize(entry["text"]) == entry["ids"], entry["name"]


def test_flags_name_texts_that_differ(minilm: Llama) -> None:
    """So that a text is not left out of the comparison any longer than it must be."""
    same = {
        entry["name"]
        for entry in ENTRIES
        if entry["different_ids"] and minilm.tokenize(entry["text"]) == entry["ids"]
    }
    # llama.cpp makes these ids when it is asked to read special tokens, as it is here.
    assert same == {"special pieces"}


def test_a_long_text_is_an_error_or_cut_where_the_original_cuts(minilm_path: Path) -> None:
    (long,) = (entry for entry in ENTRIES if entry["truncated"])
    with Llama(minilm_path, n_ubatch=N_TOKENS_MAX, n_threads=1) as llama:
        with pytest.raises(errors.ContextLengthError, match=f"text 1 .* can have {N_TOKENS_MAX}"):
            llama.embed(["short", long["text"]])
        result = llama.create_embedding(["short", long["text"]], truncate=True)
        assert result.n_truncated == 1
        assert result.usage.prompt_tokens == 3 + N_TOKENS_MAX
        assert cosines(result.vectors[1:], [long["vector"]])[0] >= 0.9999


def test_a_text_may_have_all_positions_of_the_model_and_no_more(minilm: Llama) -> None:
    assert minilm.embed(["a " * 510]).shape == (1, 384)
    with pytest.raises(errors.ContextLengthError, match="513 tokens, a text can have 512"):
        minilm.embed(["a " * 511])


def test_similar_texts_are_close(minilm: Llama) -> None:
    names = ("sentence", "paraphrase", "unrelated")
    texts = [entry["text"] for name in names for entry in ENTRIES if entry["name"] == name]
    sentence, paraphrase, unrelated = minilm.embed(texts)
    assert sentence @ paraphrase > 0.6
    assert abs(sentence @ unrelated) < 0.2


@pytest.mark.parametrize("dimensions", [1, 64, 384])
def test_leading_dimensions_are_normalised_again(minilm: Llama, dimensions: int) -> None:
    some = PLAIN[:8]
    whole = np.array(vectors_of(some))[:, :dimensions]
    expected = whole / np.linalg.norm(whole, axis=1)[:, None]
    found = minilm.embed([entry["text"] for entry in some], dimensions=dimensions)
    assert found.shape == (len(some), dimensions)
    assert cosines(found, expected).min() >= 0.9999


def test_it_is_recognised_as_an_embedder(minilm: Llama) -> None:
    assert minilm.params.embeddings is True
    assert minilm.context.pooling_type == "mean"
    with pytest.raises(ParameterError, match="loaded to embed"):
        minilm.create_completion("The capital of France is")
    with pytest.raises(ParameterError, match="no reranker"):
        minilm.rerank("capital", ["Paris"])


def test_a_text_model_embeds_only_when_asked(smol_llama: Llama) -> None:
    for call in (smol_llama.embed, smol_llama.create_embedding):
        with pytest.raises(ParameterError, match="without embeddings=True"):
            call(TEXTS)
    with pytest.raises(ParameterError, match="without embeddings=True"):
        smol_llama.rerank("capital", TEXTS)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_text_model_embeds(smol: _core.Model, smol_path: Path, pooling: str) -> None:
    fields: Any = {"embeddings": True, "n_ctx": 64, "n_threads": 1}
    with Llama(smol_path, pooling_type=pooling, **fields) as llama:
        found = llama.embed(TEXTS)
        with pytest.raises(ParameterError, match="loaded to embed"):
            llama.create_completion("The capital of France is")
    assert found.shape == (len(TEXTS), smol.n_embd)
    expected = []
    with (
        _core.Context(smol, pooling_type="none", n_threads_batch=1, **fields) as context,
        _core.Batch(64) as batch,
    ):
        for text in TEXTS:
            ids = smol.vocab.tokenize(text, True, True)
            batch.clear()
            batch.extend(ids, 0, 0, "all")
            context.memory.clear()
            context.decode(batch)
            rows = np.array([np.array(context.embeddings(i)) for i in range(len(ids))])
            row = rows[-1] if pooling == "last" else rows.mean(axis=0)
            expected.append(row / np.linalg.norm(row))
    assert cosines(found, expected).min() >= 0.999
