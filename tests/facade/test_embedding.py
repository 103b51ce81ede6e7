"""Embeddings through the engine: order, packing, what ends a request early, and OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import AsyncLlama, Llama, ParameterError, _core, errors
from llama_crab.embedding import Embeddings, EmbeddingUsage, embedding_request, tokenize_texts
from llama_crab.engine import EmbeddingRequest, EmbeddingScheduler

Rows = npt.NDArray[np.float32]

SMALL: Any = {
    **{"n_batch": 48, "n_ubatch": 48, "n_seq_max": 8},
    **{"n_threads": 1, "n_threads_batch": 1, "embeddings": True},
}
WORDS = ["the world", "war and peace", "x", "they know the way of the world and of war", "no"]
OUTSIDE = 10**6
# A row depends on the batch that it is computed in by rounding.
CLOSE: Any = {"rtol": 0, "atol": 2e-3}


@pytest.fixture(scope="module")
def model(tiny_embedder_path: Path) -> Iterator[_core.Model]:
    with _core.Model(tiny_embedder_path) as model:
        yield model


@pytest.fixture
def scheduler(model: _core.Model) -> Iterator[EmbeddingScheduler]:
    with _core.Context(model, **SMALL) as context:
        yield EmbeddingScheduler(context)


@pytest.fixture
def llama(tiny_embedder_path: Path) -> Iterator[Llama]:
    with Llama(tiny_embedder_path, n_threads=1) as llama:
        yield llama


def texts_of(model: _core.Model, n: int) -> _core.TokenizedTexts:
    texts = [WORDS[i % 5] * (1 + i % 3) for i in range(n)]
    return tokenize_texts(model.vocab, texts, n_threads=2)[0]


def of_ids(*ids: list[int]) -> _core.TokenizedTexts:
    return _core.TokenizedTexts.from_ids(ids)


def submit(
    scheduler: EmbeddingScheduler, texts: _core.TokenizedTexts, **options: Any
) -> EmbeddingRequest:
    request = embedding_request(scheduler.embedder, texts, **options)
    scheduler.submit(request)
    return request


def rows(scheduler: EmbeddingScheduler, request: EmbeddingRequest) -> Rows:
    """Run the scheduler until the request is done."""
    while not request.done:
        assert scheduler.step()
    if request.error is not None:
        raise request.error
    return request.vectors


def embed(scheduler: EmbeddingScheduler, texts: _core.TokenizedTexts, **options: Any) -> Rows:
    return rows(scheduler, submit(scheduler, texts, **options))


class Watched:
    """An embedder that does something around each `add` and `run`."""

    def __init__(self, embedder: Any, **hooks: Callable[[], object]) -> None:
        self._embedder = embedder
        self._hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def add(self, *args: Any) -> bool:
        self._call("before_add")
        found: bool = self._embedder.add(*args)
        self._call("after_add")
        return found

    def run(self, *args: Any) -> None:
        self._call("before_run")
        self._embedder.run(*args)
        self._call("after_run")

    def _call(self, name: str) -> None:
        self._hooks.get(name, lambda: None)()


@contextmanager
def watched(scheduler: Any, **hooks: Callable[[], object]) -> Iterator[None]:
    embedder = scheduler.embedder
    scheduler.embedder = Watched(embedder, **hooks)
    try:
        yield
    finally:
        scheduler.embedder = embedder


def fails_once(error: BaseException, *, after: int = 0) -> Callable[[], None]:
    """Return a function that raises `error`, once, after so many calls."""
    calls = iter([*[False] * after, True])

    def call() -> None:
        if next(calls, False):
            raise error

    return call


@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_rows_are_in_the_order_of_the_texts(
    model: _core.Model, scheduler: EmbeddingScheduler, n: int
) -> None:
    texts = texts_of(model, n)
    vectors = embed(scheduler, texts)
    assert (vectors.shape, vectors.dtype) == ((n, scheduler.embedder.n_values), np.float32)
    for i in range(n):
        np.testing.assert_allclose(vectors[i], embed(scheduler, of_ids(texts.ids(i)))[0], **CLOSE)


@pytest.mark.parametrize("batch_tokens", [1, 24, 48, 1000])
def test_batches_are_packed(
    model: _core.Model, scheduler: EmbeddingScheduler, batch_tokens: int
) -> None:
    texts = texts_of(model, 200)
    scheduler._batch_tokens = batch_tokens
    vectors = embed(scheduler, texts)
    # No order could do with fewer than this: a text is in a batch, and a batch has so much room.
    embedder, lengths = scheduler.embedder, texts.lengths()
    room = min(batch_tokens, embedder.n_tokens_max)
    least = max(sum(min(length, room) for length in lengths) / room, 200 / embedder.n_texts_max)
    assert least <= scheduler.n_batches <= 1.15 * least + 1
    assert (embedder.n_texts, scheduler.n_tokens) == (0, sum(lengths))
    scheduler._batch_tokens = 48
    np.testing.assert_allclose(vectors, embed(scheduler, texts), **CLOSE)


def test_dimensions_and_normalisation(model: _core.Model, scheduler: EmbeddingScheduler) -> None:
    texts = texts_of(model, 9)
    whole = embed(scheduler, texts, normalize=False)
    short = embed(scheduler, texts, dimensions=16)
    assert short.shape == (9, 16)
    cut = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1)[:, None]
    np.testing.assert_allclose(short, cut, rtol=0, atol=1e-5)
    for dimensions in (0, -1, scheduler.embedder.n_values + 1, 1.5):
        with pytest.raises(ParameterError, match="dimensions"):
            embed(scheduler, texts, dimensions=dimensions)


def test_without_pooling_each_token_has_a_row(model: _core.Model) -> None:
    texts = texts_of(model, 12)
    with _core.Context(model, pooling_type="none", **SMALL) as context:
        vectors = embed(EmbeddingScheduler(context), texts, normalize=False)
    lengths = texts.lengths()
    assert len(vectors) == sum(lengths)
    with _core.Context(model, pooling_type="cls", **SMALL) as context:
        first = embed(EmbeddingScheduler(context), texts, normalize=False)
    starts = np.cumsum([0, *lengths[:-1]])
    np.testing.assert_allclose(vectors[starts], first, **CLOSE)


def test_nothing_is_computed_when_a_text_cannot_be(scheduler: EmbeddingScheduler) -> None:
    for wrong, kind, what in (
        ([5] * 49, errors.ContextLengthError, "text 1 has 49 tokens, a text can have 48"),
        ([], ParameterError, "text 1 has no tokens"),
    ):
        with pytest.raises(kind, match=what):
            embed(scheduler, of_ids([5], wrong, [6]))
    assert not scheduler.step()
    assert (scheduler.n_batches, scheduler.n_tokens) == (0, 0)


def test_requests_share_batches(model: _core.Model, scheduler: EmbeddingScheduler) -> None:
    texts = texts_of(model, 40)
    expected = embed(scheduler, texts)
    before = scheduler.n_batches
    requests = [submit(scheduler, of_ids(texts.ids(i))) for i in range(40)]
    assert scheduler.stats()["n_waiting"] == 40
    for request, row in zip(requests, expected, strict=True):
        np.testing.assert_allclose(rows(scheduler, request)[0], row, **CLOSE)
    # Each alone would be a batch; one request for all of them can be packed a little better.
    assert scheduler.n_batches - before <= 1.25 * before
    assert scheduler.stats()["n_waiting"] == 0


def test_requests_that_are_normalised_otherwise_run_beside_each_other(
    model: _core.Model, scheduler: EmbeddingScheduler
) -> None:
    texts = texts_of(model, 10)
    requests = [submit(scheduler, texts, normalize=i % 2 == 0) for i in range(4)]
    found = [rows(scheduler, request) for request in requests]
    lengths = np.linalg.norm(found[1], axis=1)
    assert not np.allclose(lengths, 1, atol=0.1)
    for i, vectors in enumerate(found):
        expected = found[1] if i % 2 else found[1] / lengths[:, None]
        np.testing.assert_allclose(vectors, expected, rtol=2e-3, atol=2e-3)


def test_urgent_requests_are_served_first(scheduler: EmbeddingScheduler) -> None:
    ended: list[str] = []
    whole = of_ids([7] * 48, [8] * 48)  # a batch for each text
    requests = {
        "first": submit(scheduler, whole),
        "low": submit(scheduler, whole, priority=-1),
        "second": submit(scheduler, whole),
        "high": submit(scheduler, whole, priority=1),
        "highest": submit(scheduler, whole, priority=2),
    }
    while scheduler.step():
        ended += [name for name, request in requests.items() if request.done and name not in ended]
    assert ended == ["highest", "high", "first", "second", "low"]
    assert scheduler.n_batches == 10


def test_short_texts_of_others_fill_the_room(scheduler: EmbeddingScheduler) -> None:
    long = submit(scheduler, of_ids([7] * 40, [8] * 40), priority=5)
    short = submit(scheduler, of_ids([9] * 8))
    assert scheduler.step()
    assert (long.done, short.done) == (False, True)
    assert scheduler.step()
    assert (long.done, scheduler.n_batches) == (True, 2)


def test_a_request_that_is_too_late_ends_and_the_others_stay(
    model: _core.Model, scheduler: EmbeddingScheduler
) -> None:
    texts = texts_of(model, 30)
    expected = embed(scheduler, texts)
    other = submit(scheduler, texts)
    late = submit(scheduler, texts, timeout=3600, priority=9)
    scheduler.step()
    assert 0 < len(late.waiting) < 30
    late.deadline_us = late.submit_us + 1
    scheduler.step()
    assert len(other.waiting) < 30
    with pytest.raises(errors.RequestTimeoutError, match="not done within 1e-06 s"):
        rows(scheduler, late)
    np.testing.assert_allclose(rows(scheduler, other), expected, **CLOSE)


def test_a_cancelled_request_ends_and_the_others_stay(
    model: _core.Model, scheduler: EmbeddingScheduler
) -> None:
    texts = texts_of(model, 30)
    expected = embed(scheduler, texts)
    requests = [submit(scheduler, texts) for _ in range(3)]
    scheduler.step()
    for request in requests[:2]:
        scheduler.cancel(request)
        with pytest.raises(errors.ClosedError, match="cancelled"):
            rows(scheduler, request)
    scheduler.cancel(requests[0])
    np.testing.assert_allclose(rows(scheduler, requests[2]), expected, **CLOSE)
    assert not scheduler.step()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("wrong", [OUTSIDE, -1])
def test_an_id_outside_the_vocabulary_ends_its_request_alone(
    model: _core.Model, scheduler: EmbeddingScheduler, normalize: bool, wrong: int
) -> None:
    texts = texts_of(model, 10)
    expected = embed(scheduler, texts, normalize=normalize)
    before = submit(scheduler, of_ids([5, 6]))
    bad = submit(scheduler, of_ids([5, 6, 7], [wrong], [8]), priority=1)
    good = submit(scheduler, texts, normalize=normalize)
    np.testing.assert_allclose(rows(scheduler, good), expected, **CLOSE)
    with pytest.raises(errors.InvalidTokenError, match=f"token {wrong} of text 1"):
        rows(scheduler, bad)
    assert not np.isnan(rows(scheduler, before)).any()
    assert not scheduler.step()
    assert scheduler.embedder.n_texts == 0


def test_an_aborted_batch_is_computed_again(
    model: _core.Model, scheduler: EmbeddingScheduler
) -> None:
    texts = texts_of(model, 30)
    expected = embed(scheduler, texts)
    counts = scheduler.n_batches, scheduler.n_tokens
    request = submit(scheduler, texts)
    scheduler.step()
    n_waiting = len(request.waiting)
    scheduler.context.abort()
    assert scheduler.step()
    assert len(request.waiting) == n_waiting < 30
    np.testing.assert_allclose(rows(scheduler, request), expected, **CLOSE)
    # What was aborted does not count as computed.
    assert scheduler.n_tokens == 2 * counts[1]
    assert scheduler.n_batches <= 2 * counts[0] + 1


@pytest.mark.parametrize("where", ["before_add", "after_add", "before_run", "after_run"])
def test_ctrl_c_loses_no_text_of_others(
    model: _core.Model, scheduler: EmbeddingScheduler, where: str
) -> None:
    texts = texts_of(model, 30)
    expected = embed(scheduler, texts)
    other, own = submit(scheduler, texts), submit(scheduler, texts)
    with (
        watched(scheduler, **{where: fails_once(KeyboardInterrupt(), after=2)}),
        pytest.raises(KeyboardInterrupt),
    ):
        rows(scheduler, own)
    scheduler.cancel(own)
    other.vectors[:] = np.nan
    other_waits = len(other.waiting)
    found = rows(scheduler, other)
    computed = ~np.isnan(found).any(axis=1)
    assert np.count_nonzero(computed) == other_waits > 0
    np.testing.assert_allclose(found[computed], expected[computed], **CLOSE)
    assert not scheduler.step()
    np.testing.assert_array_equal(embed(scheduler, texts), expected)


def test_a_view_of_an_embedding_keeps_batches_waiting(
    model: _core.Model, scheduler: EmbeddingScheduler
) -> None:
    texts = texts_of(model, 10)
    expected = embed(scheduler, texts)
    request = submit(scheduler, texts)
    with scheduler.context.embeddings_seq(0), pytest.raises(BufferError):
        scheduler.step()
    assert not request.done
    np.testing.assert_array_equal(rows(scheduler, request), expected)


def test_a_failed_batch_ends_all_requests(
    model: _core.Model, scheduler: EmbeddingScheduler
) -> None:
    texts = texts_of(model, 30)
    expected = embed(scheduler, texts)
    requests = [submit(scheduler, texts) for _ in range(3)]
    failure = errors.DecodeError("a device is gone")
    with (
        watched(scheduler, before_run=fails_once(failure)),
        pytest.raises(errors.DecodeError, match="gone"),
    ):
        scheduler.step()
    assert [request.error for request in requests] == [failure] * 3
    assert not scheduler.step()
    np.testing.assert_array_equal(embed(scheduler, texts), expected)


def test_a_listener_is_told_of_the_end(scheduler: EmbeddingScheduler) -> None:
    requests = [submit(scheduler, of_ids([5], [6])) for _ in range(3)]
    for request in requests[:2]:
        request.listener = lambda: None
    scheduler.cancel(requests[0])
    assert list(scheduler.told) == requests[:1]
    rows(scheduler, requests[1])
    assert list(scheduler.told) == requests[:2]


def test_a_single_text_gives_a_single_row(llama: Llama) -> None:
    both = llama.embed(WORDS[:2])
    assert both.shape == (2, 64)
    np.testing.assert_allclose(llama.embed(WORDS[1]), both[1], **CLOSE)
    np.testing.assert_array_equal(llama.embed([llama.tokenize(text) for text in WORDS[:2]]), both)
    assert llama.embed([]).shape == (0, 64)
    assert llama.embed(iter(WORDS), dimensions=5, normalize=False).shape == (5, 5)


def test_a_single_text_without_pooling_gives_a_row_for_each_token(tiny_path: Path) -> None:
    with Llama(tiny_path, n_threads=1, embeddings=True, pooling_type="none") as llama:
        assert len(llama.tokenize("")) == 1
        assert llama.embed("").shape == (1, 64)
        assert len(llama.tokenize("the world")) == 5
        assert llama.embed("the world").shape == (5, 64)


def test_tokens_and_cut_texts_are_counted(tiny_embedder_path: Path) -> None:
    with Llama(tiny_embedder_path, **{**SMALL, "n_batch": 8, "n_ubatch": 8}) as llama:
        ids = [llama.tokenize(text) for text in WORDS]
        assert max(map(len, ids)) > 8
        with pytest.raises(
            errors.ContextLengthError, match="text 1 has 9 tokens, a text can have 8"
        ):
            llama.create_embedding(WORDS)
        result = llama.create_embedding(WORDS, truncate=True)
        assert result.n_truncated == sum(len(tokens) > 8 for tokens in ids)
        assert result.usage.prompt_tokens == sum(min(8, len(tokens)) for tokens in ids)
        assert result.model == tiny_embedder_path.name
        cut = [tokens if len(tokens) <= 8 else [*tokens[:7], tokens[-1]] for tokens in ids]
        np.testing.assert_array_equal(llama.create_embedding(cut).vectors, result.vectors)


@pytest.mark.parametrize("texts", [None, 5, [1, 2], [None], [b"abc"], ["a", [5]], [["a"]], [[]]])
def test_what_is_no_text_is_refused(llama: Llama, texts: Any) -> None:
    with pytest.raises(ParameterError, match="texts"):
        llama.embed(texts)


def test_wrong_values_are_refused_before_anything_is_computed(llama: Llama) -> None:
    wrong: list[dict[str, Any]] = [
        *({"priority": value} for value in (1.5, 10**7, None)),
        *({"timeout": value} for value in (0, -1, "1", True)),
        {"dimensions": 65},
    ]
    for options in wrong:
        with pytest.raises(ParameterError, match=next(iter(options))):
            llama.embed(WORDS, **options)
    assert llama.stats() == {"n_waiting": 0, "n_batches": 0, "n_tokens": 0}


def test_methods_for_text_are_refused(llama: Llama, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: llama.create_completion("the"),
        lambda: llama.create_completion("the", stream=True),
        lambda: llama.submit("the"),
        lambda: list(llama.map(["the"])),
        lambda: llama.complete_infill("a", "b"),
        llama.session,
        lambda: llama.load_session(tmp_path / "none"),
        lambda: llama.load_lora(tmp_path / "none"),
    ]
    for call in calls:
        with pytest.raises(ParameterError, match="loaded to embed"):
            call()


def test_a_timeout_and_ctrl_c_leave_nothing_behind(llama: Llama) -> None:
    expected = llama.embed(WORDS)
    scheduler = llama._engine.scheduler
    with (
        watched(scheduler, before_run=lambda: time.sleep(0.02)),
        pytest.raises(TimeoutError, match=r"0\.01 s"),
    ):
        llama.embed(WORDS * 100, timeout=0.01)
    with (
        watched(scheduler, after_run=fails_once(KeyboardInterrupt())),
        pytest.raises(KeyboardInterrupt),
    ):
        llama.embed(WORDS * 100)
    assert llama.stats()["n_waiting"] == 0
    np.testing.assert_array_equal(llama.embed(WORDS), expected)


def test_threads_share_batches_and_each_gets_its_own_rows(llama: Llama) -> None:
    n_threads, n_calls = 6, 10
    texts = [f"{WORDS[i % 5]} {WORDS[(i + i // 5) % 5]}" for i in range(n_threads * n_calls)]
    expected = llama.embed(texts)
    before = llama.stats()["n_batches"]
    start = threading.Barrier(n_threads)

    def ask(first: int) -> None:
        start.wait()
        for i in range(first, len(texts), n_threads):
            np.testing.assert_allclose(llama.embed(texts[i]), expected[i], **CLOSE)
            with pytest.raises(errors.InvalidTokenError, match=f"token {OUTSIDE + i}"):
                llama.embed([[5], [OUTSIDE + i]])

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(ask, range(n_threads)))
    stats = llama.stats()
    assert stats["n_batches"] - before < len(texts)
    assert stats["n_waiting"] == 0


def test_close_ends_calls_that_wait(tiny_embedder_path: Path) -> None:
    n_calls = 4
    llama = Llama(tiny_embedder_path, n_threads=1)
    engine = llama._engine

    def until_close_waits() -> None:
        limit = time.monotonic() + 30
        while len(engine._callers) < n_calls and time.monotonic() < limit:
            time.sleep(0.001)

    with (
        watched(engine.scheduler, before_run=until_close_waits),
        ThreadPoolExecutor(n_calls + 1) as pool,
    ):
        calls = [pool.submit(llama.embed, WORDS * 1000) for _ in range(n_calls)]
        closing = pool.submit(llama.close)
        for call in calls:
            assert isinstance(call.exception(), errors.ClosedError)
        closing.result()
    for call in (llama.embed, llama.create_embedding):
        with pytest.raises(errors.ClosedError):
            call(WORDS)


def test_coroutines_share_batches(tiny_embedder_path: Path) -> None:
    texts = [WORDS[i % 5] * (1 + i % 3) for i in range(40)]

    async def main() -> None:
        async with AsyncLlama(tiny_embedder_path, n_threads=1) as llama:
            expected = await llama.embed(texts)
            n_batches = llama.stats()["n_batches"]
            found = await asyncio.gather(
                *(llama.embed(text) for text in texts),
                llama.embed([[OUTSIDE]]),
                return_exceptions=True,
            )
            assert isinstance(found.pop(), errors.InvalidTokenError)
            np.testing.assert_allclose(np.array(found), expected, **CLOSE)
            assert llama.stats()["n_batches"] - n_batches < len(texts)

    asyncio.run(main())


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
