"""rerank: scores are those of each prompt alone, sorted; what is cut, and what is refused."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llama_crab import AsyncLlama, Llama, ParameterError, _core, errors

QUERY = "the world"
DOCUMENTS = ["the way of war", "x", "", "the world and the people of the world", "no, peace"]
TEMPLATE = "[CLS] query: {query} [SEP] document: {document} [SEP] so?"
FIELDS: Any = {"n_ubatch": 64, "n_threads": 1}
# A score depends on the batch that it is computed in by rounding.
ROUNDING = 5e-3


@pytest.fixture(scope="module")
def model(tiny_reranker_path: Path) -> Iterator[_core.Model]:
    with _core.Model(tiny_reranker_path) as model:
        yield model


@pytest.fixture(scope="module")
def llama(tiny_reranker_path: Path) -> Iterator[Llama]:
    with Llama(tiny_reranker_path, **FIELDS) as llama:
        yield llama


def prompt(vocab: _core.Vocab, document: str, query: str = QUERY) -> list[int]:
    """Return [CLS] query [SEP] document: this vocabulary asks for no more."""
    ids = [vocab.tokenize(text, False, False) for text in (query, document)]
    assert vocab.bos is not None
    assert vocab.sep is not None
    return [vocab.bos, *ids[0], vocab.sep, *ids[1]]


def alone(model: _core.Model, prompts: Sequence[list[int]]) -> list[float]:
    """Return the score of each prompt, computed in a batch of its own."""
    scores = []
    with _core.Context(model, embeddings=True, n_threads_batch=1) as context:
        assert context.pooling_type == "rank"
        with _core.Batch(512) as batch:
            for ids in prompts:
                batch.clear()
                batch.extend(ids, 0, 0, "all")
                context.decode(batch)
                (score,) = np.array(context.embeddings_seq(0))
                scores.append(float(score))
    return scores


def test_scores_are_those_of_each_prompt_alone_and_sorted(llama: Llama, model: _core.Model) -> None:
    documents = [f"{DOCUMENTS[i % 5]} {DOCUMENTS[i // 5 % 5]}" for i in range(25)]
    expected = alone(model, [prompt(model.vocab, document) for document in documents])
    n_batches = llama.stats()["n_batches"]
    found = llama.rerank(QUERY, documents)
    assert 1 < llama.stats()["n_batches"] - n_batches < 25
    assert sorted(result.index for result in found) == list(range(25))
    for result in found:
        assert result.document == documents[result.index]
        assert result.score == pytest.approx(expected[result.index], abs=ROUNDING)
    scores = [result.score for result in found]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 20 * ROUNDING


def test_the_query_comes_first(llama: Llama, model: _core.Model) -> None:
    pair = ["the people of war", "peace"]
    expected = alone(model, [prompt(model.vocab, pair[1], pair[0])])
    (found,) = llama.rerank(pair[0], pair[1:])
    (swapped,) = llama.rerank(pair[1], pair[:1])
    assert found.score == pytest.approx(expected[0], abs=ROUNDING)
    assert abs(found.score - swapped.score) > 2 * ROUNDING


def test_the_best_are_kept(llama: Llama) -> None:
    whole = llama.rerank(QUERY, DOCUMENTS)
    for n in (0, 1, 3, 5, 100):
        assert llama.rerank(QUERY, DOCUMENTS, top_n=n) == whole[:n]
    assert llama.rerank(QUERY, []) == []


def test_equal_documents_keep_their_order(llama: Llama) -> None:
    found = llama.rerank(QUERY, ["x"] * 5)
    # Their scores may differ by the place in the batch.
    assert found == sorted(found, key=lambda result: (-result.score, result.index))
    assert found[0].score == pytest.approx(found[4].score, abs=ROUNDING)


def test_sigmoid_maps_scores_to_probabilities(llama: Llama) -> None:
    plain = llama.rerank(QUERY, DOCUMENTS)
    found = llama.rerank(QUERY, DOCUMENTS, sigmoid=True)
    assert [result.index for result in found] == [result.index for result in plain]
    for result, before in zip(found, plain, strict=True):
        assert result.score == pytest.approx(1 / (1 + math.exp(-before.score)))
    assert any(not 0 <= result.score <= 1 for result in plain)


def test_long_documents_are_an_error_or_cut(llama: Llama, model: _core.Model) -> None:
    documents = ["x", "the way of war " * 30, "peace"]
    prompts = [prompt(model.vocab, document) for document in documents]
    assert len(prompts[1]) > 64
    with pytest.raises(errors.ContextLengthError, match=f"text 1 has {len(prompts[1])} tokens"):
        llama.rerank(QUERY, documents)
    found = llama.rerank(QUERY, documents, truncate=True)
    expected = alone(model, [ids[:64] for ids in prompts])
    assert {result.document for result in found} == set(documents)
    for result in found:
        assert result.score == pytest.approx(expected[result.index], abs=ROUNDING)
    for options in ({}, {"truncate": True}):
        with pytest.raises(errors.ContextLengthError):
            llama.rerank("the way of war " * 30, ["x"], **options)


@pytest.fixture(scope="module")
def templated(tiny_gguf: ModuleType, tmp_path_factory: Any, vocab_folder: Path) -> Path:
    """Return the same weights with a template of their own."""
    tokens = tiny_gguf.wpm_tokens(vocab_folder / "ggml-vocab-bert-bge.gguf")
    folder: Path = tmp_path_factory.mktemp("templated")
    path: Path = tiny_gguf.write_reranker(folder / "model.gguf", tokens, template=TEMPLATE)
    return path


def test_the_models_template_is_filled_in(templated: Path, llama: Llama) -> None:
    long = ["x", "the way of war " * 30]
    with _core.Model(templated) as model:
        vocab = model.vocab

        def filled(document: str) -> list[int]:
            text = TEMPLATE.replace("{query}", QUERY).replace("{document}", document)
            return vocab.tokenize(text, False, True)

        expected = alone(model, [filled(document) for document in DOCUMENTS])
        assert filled("").count(vocab.sep) == 2
        end = vocab.tokenize("[SEP] so?", False, True)
        n_end = len(end)
        cut = filled(long[1])[: 64 - n_end] + end
        (cut_score,) = alone(model, [cut])
    with Llama(templated, **FIELDS) as with_template:
        found = with_template.rerank(QUERY, DOCUMENTS)
        cut_found = with_template.rerank(QUERY, long, truncate=True)
    for result in found:
        assert result.score == pytest.approx(expected[result.index], abs=ROUNDING)
    plain = {result.index: result.score for result in llama.rerank(QUERY, DOCUMENTS)}
    assert all(abs(result.score - plain[result.index]) > 2 * ROUNDING for result in found)
    (score,) = (result.score for result in cut_found if result.index == 1)
    assert score == pytest.approx(cut_score, abs=ROUNDING)


def test_wrong_values_are_refused_before_anything_is_computed(llama: Llama) -> None:
    n_batches = llama.stats()["n_batches"]
    wrong: list[dict[str, Any]] = [
        *({"top_n": value} for value in (-1, 1.5, "2", True)),
        *({"priority": value} for value in (1.5, 10**7)),
        *({"timeout": value} for value in (0, -1, "1")),
    ]
    for options in wrong:
        with pytest.raises(ParameterError, match=next(iter(options))):
            llama.rerank(QUERY, DOCUMENTS, **options)
    with pytest.raises(ParameterError, match="documents: expected several"):
        llama.rerank(QUERY, "one document")
    assert llama.stats()["n_batches"] == n_batches


def test_only_a_reranker_reranks_and_it_gives_no_vectors(
    llama: Llama, tiny_llama: Llama, tiny_embedder_path: Path, tiny_path: Path
) -> None:
    with pytest.raises(ParameterError, match="without embeddings=True"):
        tiny_llama.rerank(QUERY, DOCUMENTS)
    decoder = {"embeddings": True, "pooling_type": "last"}
    for path, fields in ((tiny_embedder_path, {}), (tiny_path, decoder)):
        with (
            Llama(path, **fields, **FIELDS) as other,
            pytest.raises(ParameterError, match="no reranker"),
        ):
            other.rerank(QUERY, DOCUMENTS)
    for call in (llama.embed, llama.create_embedding):
        with pytest.raises(ParameterError, match=r"a reranker.*rerank\(\)"):
            call(DOCUMENTS)


def test_a_closed_reranker_says_so(tiny_reranker_path: Path) -> None:
    llama = Llama(tiny_reranker_path, **FIELDS)
    llama.close()
    with pytest.raises(errors.ClosedError):
        llama.rerank(QUERY, DOCUMENTS)


def test_threads_each_get_their_own_scores(llama: Llama) -> None:
    queries = [f"{QUERY} {document}" for document in DOCUMENTS]
    expected = [llama.rerank(query, DOCUMENTS) for query in queries]
    start = threading.Barrier(len(queries))

    def ask(query: str) -> dict[int, float]:
        start.wait()
        return {result.index: result.score for result in llama.rerank(query, DOCUMENTS)}

    with ThreadPoolExecutor(len(queries)) as pool:
        for scores, results in zip(pool.map(ask, queries), expected, strict=True):
            for result in results:
                assert scores[result.index] == pytest.approx(result.score, abs=ROUNDING)


def test_coroutines_rerank(tiny_reranker_path: Path, llama: Llama) -> None:
    expected = [llama.rerank(query, DOCUMENTS, top_n=1)[0] for query in DOCUMENTS]

    async def main() -> None:
        async with AsyncLlama(tiny_reranker_path, **FIELDS) as other:
            found = await asyncio.gather(
                *(other.rerank(query, DOCUMENTS, top_n=1) for query in DOCUMENTS)
            )
            for (result,), best in zip(found, expected, strict=True):
                assert result.score == pytest.approx(best.score, abs=ROUNDING)

    asyncio.run(main())
