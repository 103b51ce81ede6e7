"""Embedder: the rows of packed batches are those of each text alone; room, wrong input, failure."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import _core, errors

Rows = npt.NDArray[np.float32]

SMALL: Any = {
    **{"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 8, "kv_unified": True},
    **{"n_threads": 1, "n_threads_batch": 1, "embeddings": True},
}
TEXTS = ["the world", "of war and peace, and of the world!", "x", "", "we and they know the way"]
N_EMBD = 64


@pytest.fixture
def context(tiny: _core.Model) -> Iterator[_core.Context]:
    with _core.Context(tiny, pooling_type="mean", **SMALL) as context:
        yield context


@pytest.fixture
def ids() -> _core.TokenizedTexts:
    """Return texts of 3, 7, 1, 12 and 5 tokens."""
    lengths = (3, 7, 1, 12, 5)
    return _core.TokenizedTexts.from_ids([range(300 + n, 300 + 2 * n) for n in lengths])


def alone(model: _core.Model, tokens: list[int], **fields: Any) -> Rows:
    """Return the rows of one text: a context and a batch of its own."""
    with _core.Context(model, **{**SMALL, "n_seq_max": 1, **fields}) as context:
        with _core.Batch(64) as batch:
            batch.extend(tokens, 0, 0, "all")
            context.decode(batch)
        if context.pooling_type == "none":
            return np.array([np.array(context.embeddings(i)) for i in range(len(tokens))])
        return np.array(context.embeddings_seq(0))[None]


def together(context: _core.Context, texts: _core.TokenizedTexts, normalize: Any = "none") -> Rows:
    """Return the rows of all texts, which fit one batch."""
    embedder = _core.Embedder(context)
    lengths = texts.lengths() if embedder.per_token else [1] * len(texts)
    out = np.full((sum(lengths), embedder.n_values), np.nan, np.float32)
    for i in range(len(texts)):
        assert embedder.add(texts, i, out, sum(lengths[:i]))
    assert (embedder.n_texts, embedder.n_tokens) == (len(texts), sum(texts.lengths()))
    embedder.run(normalize)
    assert (embedder.n_texts, embedder.n_tokens) == (0, 0)
    return out


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "none"])
def test_rows_of_a_decoder_equal_those_of_each_text_alone(
    tiny: _core.Model, ids: _core.TokenizedTexts, pooling: str
) -> None:
    with _core.Context(tiny, pooling_type=pooling, **SMALL) as context:
        found = together(context, ids)
        again = together(context, ids)
    expected = [alone(tiny, ids.ids(i), pooling_type=pooling) for i in range(len(ids))]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2e-3)
    np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_rows_of_models_with_states(
    request: pytest.FixtureRequest, ids: _core.TokenizedTexts, kind: str, pooling: str
) -> None:
    """llama.cpp gives each of their sequences a micro-batch, so memory need not be unified."""
    fields = {**SMALL, "pooling_type": pooling, "kv_unified": False, "n_ctx": 2048}
    with _core.Model(request.getfixturevalue(f"tiny_{kind}_path")) as model:
        with _core.Context(model, **fields) as context:
            found = together(context, ids)
        expected = [alone(model, ids.ids(i), pooling_type=pooling) for i in range(len(ids))]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_rows_of_an_encoder_equal_those_of_each_text_alone(
    tiny_embedder_path: Path, pooling: str
) -> None:
    with _core.Model(tiny_embedder_path) as model:
        texts = model.vocab.tokenize_many(TEXTS, add_special=True, parse_special=True, n_threads=2)
        with _core.Context(model, pooling_type=pooling, **SMALL) as context:
            found = together(context, texts)
        expected = [alone(model, texts.ids(i), pooling_type=pooling) for i in range(len(texts))]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2e-3)


def test_a_reranker_gives_its_scores(tiny_reranker_path: Path) -> None:
    with _core.Model(tiny_reranker_path) as model:
        texts = model.vocab.tokenize_many(TEXTS, add_special=True, parse_special=True, n_threads=1)
        with _core.Context(model, **SMALL) as context:
            assert _core.Embedder(context).n_values == 1
            found = together(context, texts)
        expected = [alone(model, texts.ids(i)) for i in range(len(texts))]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2e-3)


def test_rows_are_cut_and_then_scaled(context: _core.Context, ids: _core.TokenizedTexts) -> None:
    whole = together(context, ids)
    unit = together(context, ids, "l2")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(whole, axis=1)[:, None], whole, rtol=1e-5)
    embedder = _core.Embedder(context)
    wide, narrow = np.empty((5, 16), np.float32), np.empty((5, 1), np.float32)
    for i in range(5):
        embedder.add(ids, i, wide, 4 - i)
    embedder.run("l2")
    for i in range(5):  # both outs in one batch
        embedder.add(ids, i, narrow if i % 2 else whole, i)
    embedder.run("none")
    cut = whole[::-1, :16]
    expected = cut / np.linalg.norm(cut, axis=1)[:, None]
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(narrow[1::2, 0], whole[1::2, 0] * 0 + narrow[1::2, 0])
    np.testing.assert_allclose(narrow[1::2, 0], whole[1::2, 0], rtol=1e-5)


def test_rows_land_where_they_were_asked_for_and_nowhere_else(
    context: _core.Context, ids: _core.TokenizedTexts
) -> None:
    embedder = _core.Embedder(context)
    out = np.zeros((6, N_EMBD), np.float32)
    embedder.add(ids, 1, out, 4)
    embedder.run("l2")
    assert (np.abs(out).sum(axis=1) > 0).tolist() == [False] * 4 + [True, False]


def test_a_batch_is_full_by_tokens(tiny: _core.Model, ids: _core.TokenizedTexts) -> None:
    with _core.Context(tiny, pooling_type="mean", **{**SMALL, "n_ubatch": 16}) as context:
        embedder = _core.Embedder(context)
        out = np.zeros((5, N_EMBD), np.float32)
        assert (embedder.n_tokens_max, embedder.n_text_tokens_max) == (16, 16)
        added = [embedder.add(ids, i, out, i) for i in (3, 0, 4, 2, 2)]  # 12 + 3 + 5 + 1 + 1
        assert added == [True, True, False, True, False]
        assert (embedder.n_texts, embedder.n_tokens) == (3, 16)
        embedder.run("l2")
        assert embedder.add(ids, 4, out, 4)


def test_a_batch_is_full_by_texts_and_by_output_rows(
    tiny: _core.Model, ids: _core.TokenizedTexts
) -> None:
    out = np.zeros((5, N_EMBD), np.float32)
    with _core.Context(tiny, pooling_type="mean", **{**SMALL, "n_seq_max": 2}) as context:
        embedder = _core.Embedder(context)
        assert embedder.n_texts_max == 2
        assert [embedder.add(ids, 2, out, i) for i in range(3)] == [True, True, False]
    rows = np.zeros((9, N_EMBD), np.float32)
    with _core.Context(tiny, pooling_type="none", n_outputs_max=8, **SMALL) as context:
        embedder = _core.Embedder(context)
        assert embedder.n_tokens_max == 8
        assert [embedder.add(ids, i, rows, 0) for i in (0, 4, 2)] == [True, True, False]
        embedder.run("l2")


def test_a_text_that_is_too_long_is_refused_and_the_queue_stays(
    context: _core.Context, ids: _core.TokenizedTexts
) -> None:
    embedder = _core.Embedder(context)
    out = np.zeros((5, N_EMBD), np.float32)
    long = _core.TokenizedTexts.from_ids([[5] * 64, [5] * 65])
    embedder.add(ids, 0, out, 0)
    with pytest.raises(errors.ContextLengthError, match="text 1 has 65 tokens, a text can have 64"):
        embedder.add(long, 1, out, 1)
    assert not embedder.add(long, 0, out, 1)
    assert (embedder.n_texts, embedder.n_tokens) == (1, 3)
    embedder.run("l2")
    assert embedder.add(long, 0, out, 1)
    embedder.run("l2")


def test_a_text_has_no_more_tokens_than_the_model_has_positions(
    tiny_gguf: ModuleType, tiny_embedder_path: Path
) -> None:
    """Beyond its table of positions llama.cpp would end the process."""
    n = tiny_gguf.N_CTX_TRAIN
    fields = {**SMALL, "n_batch": 2 * n, "n_ubatch": 2 * n}
    out = np.zeros((2, N_EMBD), np.float32)
    texts = _core.TokenizedTexts.from_ids([[7] * n, [7] * (n + 1)])
    with _core.Model(tiny_embedder_path) as model, _core.Context(model, **fields) as context:
        embedder = _core.Embedder(context)
        assert (embedder.n_tokens_max, embedder.n_text_tokens_max) == (2 * n, n)
        assert embedder.add(texts, 0, out, 0)
        assert embedder.add(texts, 0, out, 1)
        with pytest.raises(errors.ContextLengthError):
            embedder.add(texts, 1, out, 1)
        embedder.run("l2")
    np.testing.assert_allclose(out[0], out[1], atol=2e-3)


def read_only() -> Rows:
    out = np.zeros((2, 64), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "row", "kinds"),
    [
        (np.zeros((2, 64)), 0, ValueError),
        (np.zeros((2, 64), np.int32), 0, ValueError),
        (np.zeros(64, np.float32), 0, ValueError),
        (np.zeros((1, 1, 64), np.float32), 0, ValueError),
        (np.zeros((2, 65), np.float32), 0, ValueError),
        (np.zeros((2, 0), np.float32), 0, ValueError),
        (np.zeros((2, 128), np.float32)[:, ::2], 0, ValueError),
        (np.zeros((0, 64), np.float32), 0, ValueError),
        (np.zeros((2, 64), np.float32), 2, ValueError),
        (np.zeros((2, 64), np.float32), -1, ValueError),
        (np.zeros((2, 64), np.float32), 2**63, OverflowError),
        (read_only(), 0, (ValueError, BufferError)),
        (bytearray(256), 0, ValueError),
        (b"", 0, BufferError),
        ([[0.0] * 64], 0, TypeError),
        (None, 0, TypeError),
    ],
)
def test_outs_that_do_not_fit_are_refused(
    context: _core.Context, ids: _core.TokenizedTexts, out: Any, row: int, kinds: Any
) -> None:
    embedder = _core.Embedder(context)
    with pytest.raises(kinds):
        embedder.add(ids, 0, out, row)
    assert embedder.n_texts == 0


def test_per_token_rows_need_as_many_rows_as_tokens(
    tiny: _core.Model, ids: _core.TokenizedTexts
) -> None:
    with _core.Context(tiny, pooling_type="none", **SMALL) as context:
        embedder = _core.Embedder(context)
        assert embedder.per_token
        out = np.zeros((7, N_EMBD), np.float32)
        assert embedder.add(ids, 1, out, 0)
        with pytest.raises(ValueError, match=r"7 rows, rows 1\.\.7"):
            embedder.add(ids, 1, out, 1)


def test_wrong_texts_are_refused(context: _core.Context, ids: _core.TokenizedTexts) -> None:
    embedder = _core.Embedder(context)
    out = np.zeros((5, N_EMBD), np.float32)
    n_vocab = context.model.vocab.n_tokens
    wrong = _core.TokenizedTexts.from_ids([[1, n_vocab], [-1], []])
    for i, kind in enumerate(
        (errors.InvalidTokenError, errors.InvalidTokenError, errors.InvalidBatchError)
    ):
        with pytest.raises(kind, match=f"text {i}|of text {i}"):
            embedder.add(wrong, i, out, 0)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            embedder.add(ids, index, out, 0)
    other: Any = [[1, 2]]
    with pytest.raises(TypeError):
        embedder.add(other, 0, out, 0)
    assert embedder.n_texts == 0


def test_normalize_is_one_of_two(context: _core.Context, ids: _core.TokenizedTexts) -> None:
    embedder = _core.Embedder(context)
    wrong: Any = "L2"
    embedder.add(ids, 0, np.zeros((1, N_EMBD), np.float32), 0)
    with pytest.raises(ValueError, match="'l2', 'none'"):
        embedder.run(wrong)
    assert embedder.n_texts == 1


def test_contexts_that_give_no_embeddings_are_refused(
    tiny: _core.Model, ids: _core.TokenizedTexts
) -> None:
    with (
        _core.Context(tiny, **{**SMALL, "embeddings": False}) as context,
        pytest.raises(errors.ContextCreateError, match="without embeddings"),
    ):
        _core.Embedder(context)
    split = {**SMALL, "kv_unified": False, "n_ctx": 2048}
    with (
        _core.Context(tiny, pooling_type="mean", **split) as context,
        pytest.raises(errors.ContextCreateError, match="kv_unified"),
    ):
        _core.Embedder(context)
    with _core.Context(tiny, pooling_type="none", **split) as context:
        expected = [alone(tiny, ids.ids(i), pooling_type="none") for i in range(len(ids))]
        np.testing.assert_allclose(
            together(context, ids), np.concatenate(expected), rtol=0, atol=2e-3
        )
    with _core.Context(tiny, pooling_type="mean", **SMALL) as context:
        embedder = _core.Embedder(context)
        context.embeddings_enabled = False
        with pytest.raises(errors.InvalidBatchError, match="disabled"):
            embedder.add(ids, 0, np.zeros((1, N_EMBD), np.float32), 0)


def test_the_memory_of_the_sequences_is_emptied_before_and_after(
    context: _core.Context, ids: _core.TokenizedTexts
) -> None:
    with _core.Batch(4) as batch:
        for seq in (0, 7):
            batch.extend([5, 6], 0, seq, "all")
        context.decode(batch)
    first = together(context, ids)
    assert [context.memory.seq_pos_max(seq) for seq in range(8)] == [-1] * 7 + [1]
    np.testing.assert_array_equal(together(context, ids), first)


def failing_runs(context: _core.Context) -> dict[type[errors.DecodeError], Callable[[], None]]:
    def fill_the_memory() -> None:
        with _core.Batch(64) as batch:
            for start in range(0, 256, 64):
                batch.clear()
                batch.extend([5] * 64, start, 7, "all")
                context.decode(batch)

    return {errors.DecodeAborted: context.abort, errors.KVCacheFullError: fill_the_memory}


@pytest.mark.parametrize("kind", [errors.DecodeAborted, errors.KVCacheFullError])
def test_a_failed_run_leaves_the_embedder_empty_and_usable(
    context: _core.Context, ids: _core.TokenizedTexts, kind: type[errors.DecodeError]
) -> None:
    expected = together(context, ids)
    embedder = _core.Embedder(context)
    failing_runs(context)[kind]()
    out = np.zeros((5, N_EMBD), np.float32)
    for i in range(5):
        embedder.add(ids, i, out, i)
    with pytest.raises(kind):
        embedder.run("l2")
    assert (embedder.n_texts, embedder.n_tokens) == (0, 0)
    assert not out.any()
    context.memory.clear()
    np.testing.assert_array_equal(together(context, ids), expected)


def test_an_encoder_can_be_aborted(tiny_embedder_path: Path, ids: _core.TokenizedTexts) -> None:
    with _core.Model(tiny_embedder_path) as model, _core.Context(model, **SMALL) as context:
        embedder = _core.Embedder(context)
        out = np.zeros((1, N_EMBD), np.float32)
        embedder.add(ids, 0, out, 0)
        context.abort()
        with pytest.raises(errors.DecodeAborted):
            embedder.run("l2")
        embedder.add(ids, 0, out, 0)
        embedder.run("l2")
        assert np.linalg.norm(out) == pytest.approx(1)


def test_a_buffer_over_an_embedding_stops_a_run_that_can_be_repeated(
    context: _core.Context, ids: _core.TokenizedTexts
) -> None:
    together(context, ids)
    embedder = _core.Embedder(context)
    out = np.zeros((1, N_EMBD), np.float32)
    embedder.add(ids, 0, out, 0)
    with context.embeddings_seq(0), pytest.raises(BufferError):
        embedder.run("l2")
    assert embedder.n_texts == 1
    embedder.run("l2")
    assert out.any()


def test_outs_are_pinned_while_queued(context: _core.Context, ids: _core.TokenizedTexts) -> None:
    def lent(embedder: _core.Embedder) -> memoryview:
        out = memoryview(bytearray(4 * N_EMBD)).cast("f", (1, N_EMBD))
        embedder.add(ids, 0, out, 0)
        with pytest.raises(BufferError):
            out.release()
        return out

    embedder = _core.Embedder(context)
    out = lent(embedder)
    embedder.clear()
    assert embedder.n_texts == 0
    out.release()
    out = lent(embedder)
    embedder.run("l2")
    out.release()
    out = lent(embedder)
    del embedder
    out.release()


def test_an_empty_run_does_nothing(context: _core.Context) -> None:
    embedder = _core.Embedder(context)
    embedder.run("l2")
    with pytest.raises(IndexError):
        context.embeddings_seq(0)


def test_closing_the_context_ends_the_embedder(
    tiny: _core.Model, ids: _core.TokenizedTexts
) -> None:
    context = _core.Context(tiny, pooling_type="mean", **SMALL)
    embedder = _core.Embedder(context)
    out = memoryview(bytearray(4 * N_EMBD)).cast("f", (1, N_EMBD))
    embedder.add(ids, 0, out, 0)
    before = _core.live_handles()["embedders"]
    context.close()
    with pytest.raises(errors.ClosedError):
        embedder.run("l2")
    with pytest.raises(errors.ClosedError):
        _core.Embedder(context)
    assert embedder.context is context
    del embedder
    out.release()
    assert _core.live_handles()["embedders"] == before - 1


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_many_texts_are_tokenised_like_one(tiny: _core.Model, n_threads: int) -> None:
    texts = [f"{text} {i}" * (i % 5) for i, text in enumerate(TEXTS * 40)]
    texts += ["a\ud800b", "\0", "<s></s>"]
    for flag in (False, True):
        found = tiny.vocab.tokenize_many(
            texts, add_special=flag, parse_special=not flag, n_threads=n_threads
        )
        expected = [tiny.vocab.tokenize(text, flag, not flag) for text in texts]
        assert [found.ids(i) for i in range(len(found))] == expected
        assert found.lengths() == [len(ids) for ids in expected]
    assert repr(found) == f"<TokenizedTexts of {len(texts)} texts>"


def test_what_cannot_be_tokenised(tiny: _core.Model) -> None:
    def many(texts: Any, n_threads: Any = 1) -> _core.TokenizedTexts:
        return tiny.vocab.tokenize_many(
            texts, add_special=False, parse_special=False, n_threads=n_threads
        )

    assert len(many([])) == 0
    assert many([b"abc", "abc"]).ids(0) == many(["abc"]).ids(0)
    for one in ("abc", b"abc"):
        with pytest.raises(TypeError, match="not one"):
            many(one)
    with pytest.raises(TypeError):
        many([None])
    for n_threads in (0, 10**6):
        with pytest.raises(ValueError, match="n_threads"):
            many(["abc"], n_threads)


def test_an_assertion_in_another_thread_is_an_error_that_names_the_text(
    vocab_folder: Path,
) -> None:
    path = vocab_folder / "ggml-vocab-nomic-bert-moe.gguf"
    gone = {"tokenizer.ggml.bos_token_id": 2**31 - 1}  # the vocabulary still adds one
    with _core.Model(path, vocab_only=True, kv_overrides=gone) as model:
        texts = ["a"] * 100
        with pytest.raises(errors.TokenizeError, match=r"text \d+: .*special_bos_id"):
            model.vocab.tokenize_many(texts, add_special=True, parse_special=True, n_threads=4)
        found = model.vocab.tokenize_many(texts, add_special=False, parse_special=True, n_threads=4)
        assert len(found) == 100


def test_ids_come_from_any_integers() -> None:
    given: list[Any] = [[1, 2], (3,), np.array([4, 5], np.int32), range(6, 9), np.array([9]), []]
    found = _core.TokenizedTexts.from_ids(given)
    assert [found.ids(i) for i in range(6)] == [[1, 2], [3], [4, 5], [6, 7, 8], [9], []]
    with pytest.raises(errors.InvalidTokenError):
        _core.TokenizedTexts.from_ids([[2**31]])
    wrong: Any = [1, 2]
    with pytest.raises(TypeError):
        _core.TokenizedTexts.from_ids(wrong)
    for i in (-1, 6):
        with pytest.raises(IndexError):
            found.ids(i)
    with pytest.raises(TypeError):
        _core.TokenizedTexts()
    with pytest.raises(TypeError):
        pickle.dumps(found)


def test_longer_texts_are_cut(ids: _core.TokenizedTexts) -> None:
    before = [ids.ids(i) for i in range(5)]
    assert ids.truncate(12, False) == 0
    assert ids.truncate(5, False) == 2
    assert [ids.ids(i) for i in range(5)] == [tokens[:5] for tokens in before]
    again = _core.TokenizedTexts.from_ids(before)
    assert again.truncate(5, True) == 2
    assert again.ids(1) == [*before[1][:4], before[1][-1]]
    assert again.truncate(1, True) == 4
    assert again.lengths() == [1] * 5
    assert again.ids(3) == [before[3][-1]]
    for n in (0, -1, 2**31):
        with pytest.raises(ValueError, match="max_tokens"):
            ids.truncate(n, False)
