"""embed_texts drives an embedder over many texts; Embeddings has OpenAI's shape."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_crab import ParameterError, _core, errors
from llama_crab.embedding import Embeddings, EmbeddingUsage, embed_texts, tokenize_texts

SMALL: Any = {
    **{"n_batch": 48, "n_ubatch": 48, "n_seq_max": 8},
    **{"n_threads": 1, "n_threads_batch": 1, "embeddings": True},
}
WORDS = ["the world", "war and peace", "x", "they know the way of the world and of war", "no"]


@pytest.fixture(scope="module")
def model(tiny_embedder_path: Path) -> Iterator[_core.Model]:
    with _core.Model(tiny_embedder_path) as model:
        yield model


@pytest.fixture
def embedder(model: _core.Model) -> Iterator[_core.Embedder]:
    with _core.Context(model, **SMALL) as context:
        yield _core.Embedder(context)


def texts_of(model: _core.Model, n: int) -> _core.TokenizedTexts:
    texts = [WORDS[i % 5] * (1 + i % 3) for i in range(n)]
    return tokenize_texts(model.vocab, texts, n_threads=2)[0]


@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_rows_are_in_the_order_of_the_texts(
    model: _core.Model, embedder: _core.Embedder, n: int
) -> None:
    texts = texts_of(model, n)
    vectors = embed_texts(embedder, texts)
    assert (vectors.shape, vectors.dtype) == ((n, embedder.n_values), np.float32)
    for i in range(n):
        alone = embed_texts(embedder, _core.TokenizedTexts.from_ids([texts.ids(i)]))
        np.testing.assert_allclose(vectors[i], alone[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("batch_tokens", [1, 24, 48, 1000])
def test_batches_are_packed(
    model: _core.Model, embedder: _core.Embedder, batch_tokens: int
) -> None:
    texts = texts_of(model, 200)
    turns: list[int] = []
    vectors = embed_texts(
        embedder,
        texts,
        batch_tokens=batch_tokens,
        between=lambda: turns.append(embedder.n_texts),
    )
    # No order could do with fewer than this: a text is in a batch, and a batch has so much room.
    room = max(1, min(batch_tokens, embedder.n_tokens_max))
    lengths = texts.lengths()
    least = max(sum(min(length, room) for length in lengths) / room, 200 / embedder.n_texts_max)
    assert least <= len(turns) <= 1.15 * least + 1
    assert not any(turns)
    np.testing.assert_allclose(vectors, embed_texts(embedder, texts), rtol=0, atol=2e-3)
    with pytest.raises(ParameterError, match="batch_tokens"):
        embed_texts(embedder, texts, batch_tokens=0)


def test_dimensions_and_normalisation(model: _core.Model, embedder: _core.Embedder) -> None:
    texts = texts_of(model, 9)
    whole = embed_texts(embedder, texts, normalize="none")
    short = embed_texts(embedder, texts, dimensions=16)
    assert short.shape == (9, 16)
    cut = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1)[:, None]
    np.testing.assert_allclose(short, cut, rtol=0, atol=1e-5)
    for dimensions in (0, -1, embedder.n_values + 1, 1.5):
        wrong: Any = dimensions
        with pytest.raises(ParameterError, match="dimensions"):
            embed_texts(embedder, texts, dimensions=wrong)


def test_without_pooling_each_token_has_a_row(model: _core.Model) -> None:
    texts = texts_of(model, 12)
    with _core.Context(model, pooling_type="none", **SMALL) as context:
        vectors = embed_texts(_core.Embedder(context), texts, normalize="none")
    lengths = texts.lengths()
    assert len(vectors) == sum(lengths)
    with _core.Context(model, pooling_type="cls", **SMALL) as context:
        first = embed_texts(_core.Embedder(context), texts, normalize="none")
    starts = np.cumsum([0, *lengths[:-1]])
    np.testing.assert_allclose(vectors[starts], first, rtol=0, atol=2e-3)


def test_nothing_is_computed_when_a_text_cannot_be(
    model: _core.Model, embedder: _core.Embedder
) -> None:
    turns: list[int] = []
    for wrong, kind, what in (
        ([5] * 49, errors.ContextLengthError, "text 1 has 49 tokens, a text can have 48"),
        ([], ParameterError, "text 1 has no tokens"),
    ):
        texts = _core.TokenizedTexts.from_ids([[5], wrong, [6]])
        with pytest.raises(kind, match=what):
            embed_texts(embedder, texts, between=lambda: turns.append(1))
    assert not turns


def test_what_ends_the_work_leaves_the_embedder_usable(
    model: _core.Model, embedder: _core.Embedder
) -> None:
    texts = texts_of(model, 30)
    expected = embed_texts(embedder, texts)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_texts(embedder, texts, between=stop)
    bad = _core.TokenizedTexts.from_ids([[5, 6, 7], [10**6]])
    with pytest.raises(errors.InvalidTokenError):
        embed_texts(embedder, bad)
    assert embedder.n_texts == 0
    np.testing.assert_array_equal(embed_texts(embedder, texts), expected)
    with pytest.raises(errors.ClosedError):
        embed_texts(embedder, texts, between=embedder.context.close)


def test_texts_are_tokenised_and_cut(model: _core.Model) -> None:
    vocab = model.vocab
    texts, n_cut = tokenize_texts(vocab, WORDS, n_threads=2)
    assert [texts.ids(i) for i in range(5)] == [vocab.tokenize(text, True, True) for text in WORDS]
    assert n_cut == 0
    cut, n_cut = tokenize_texts(vocab, WORDS, n_threads=2, max_tokens=4)
    assert n_cut == sum(length > 4 for length in texts.lengths()) > 0
    for i, length in enumerate(texts.lengths()):
        ids = texts.ids(i)
        assert cut.ids(i) == (ids if length <= 4 else [*ids[:3], vocab.sep])


def test_a_model_without_a_last_special_keeps_the_beginning(tiny: _core.Model) -> None:
    texts, n_cut = tokenize_texts(tiny.vocab, WORDS, n_threads=1, max_tokens=2)
    assert n_cut > 0
    assert texts.ids(0) == tiny.vocab.tokenize(WORDS[0], True, True)[:2]


def test_ids_are_taken_as_they_are(model: _core.Model) -> None:
    texts, _ = tokenize_texts(model.vocab, [[7, 8], [9]], n_threads=1)
    assert [texts.ids(i) for i in range(2)] == [[7, 8], [9]]
    assert len(tokenize_texts(model.vocab, [], n_threads=1)[0]) == 0
    for wrong in (["a", [1]], "abc"):
        with pytest.raises(ParameterError, match="texts"):
            tokenize_texts(model.vocab, wrong, n_threads=1)


def result() -> Embeddings:
    vectors = np.array([[0.1, -2.0, 3e-5], [0.0, 1.0, 1.5]], np.float32)
    return Embeddings(vectors, EmbeddingUsage(7), "tiny", 1)


def test_the_result_has_openais_shape() -> None:
    found = json.loads(json.dumps(result().to_dict()))
    assert found["object"] == "list"
    assert found["model"] == "tiny"
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [(item["object"], item["index"]) for item in found["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    for item, row in zip(found["data"], result().vectors, strict=True):
        np.testing.assert_array_equal(np.array(item["embedding"], np.float32), row)


def test_base64_holds_little_endian_floats() -> None:
    found = json.loads(json.dumps(result().to_dict("base64")))
    for item, row in zip(found["data"], result().vectors, strict=True):
        np.testing.assert_array_equal(
            np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), row
        )
    wrong: Any = "int8"
    with pytest.raises(ParameterError, match="int8"):
        result().to_dict(wrong)


def test_the_result_is_short_to_look_at() -> None:
    assert len(result()) == 2
    assert repr(result()) == ("Embeddings(2 x 3, EmbeddingUsage(prompt_tokens=7), model='tiny')")
