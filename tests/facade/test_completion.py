"""Every option of `create_completion`, on real models."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import Completion, CompletionChunk, Llama, ParameterError, SamplerChain, _core

GREEDY = SamplerChain().greedy()
WARM = SamplerChain().temp(1.4)
PROMPT = "The capital of France is"
BABEL = "Größe, 東京タワー, Привет, नमस्ते, 👩‍👩‍👧 🇩🇪, ∑x²: Übung, 大阪城,"


def complete(
    llama: Llama, prompt: Any = PROMPT, max_tokens: int = 12, **options: Any
) -> Completion:
    options = {"sampler": GREEDY, **options}
    result = llama.create_completion(prompt, max_tokens, **options)
    assert isinstance(result, Completion)
    return result


def stream(llama: Llama, prompt: Any = PROMPT, max_tokens: int = 12, **options: Any) -> Any:
    options = {"sampler": GREEDY, **options}
    return llama.create_completion(prompt, max_tokens, stream=True, **options)


def detokenized(llama: Llama, prompt: list[int], tokens: tuple[int, ...]) -> str:
    """Return the text of `tokens` behind the prompt, by detokenising both as a whole."""
    vocab = llama.model.vocab
    before = vocab.detokenize(prompt, False, False)
    both = vocab.detokenize([*prompt, *tokens], False, False)
    assert both.startswith(before)
    return both[len(before) :].decode("utf-8", "replace")


def test_a_completion_says_what_happened(smol_llama: Llama) -> None:
    result = complete(smol_llama, max_tokens=8)
    prompt = smol_llama.tokenize(PROMPT)
    assert result.text.startswith(" Paris")
    assert result.finish_reason == "length"
    assert result.stop_reason is None
    assert len(result.tokens) == 8
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(prompt), 8)
    assert result.usage.total_tokens == len(prompt) + 8
    timings = result.timings
    assert (timings.prompt_n, timings.predicted_n) == (len(prompt), 8)
    assert 0 < timings.first_token_sec <= timings.total_sec
    assert 0 < timings.prompt_sec <= timings.total_sec
    assert 0 < timings.predicted_sec <= timings.total_sec
    assert 0 < timings.sample_sec <= timings.total_sec
    assert timings.load_sec > 0
    assert pickle.loads(pickle.dumps(result)) == result
    shape = result.to_dict()
    assert json.loads(json.dumps(shape)) == shape
    assert shape["object"] == "text_completion"
    assert shape["choices"][0]["text"] == result.text
    assert shape["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("name", ["smol_llama", "gemma_llama"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_space_is_lost_and_no_character_broken(
    name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    """Streamed text, whole text and llama.cpp's own detokenizer agree (BPE, SentencePiece)."""
    llama: Llama = request.getfixturevalue(name)
    prompt = llama.tokenize(BABEL)
    chunks = list(stream(llama, BABEL, 24, sampler=WARM, seed=seed, ignore_eos=True))
    text = "".join(chunk.text for chunk in chunks)
    tokens = tuple(itertools.chain.from_iterable(chunk.tokens for chunk in chunks))
    assert len(tokens) == 24
    assert text == detokenized(llama, prompt, tokens)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"echo": True},
        {"stop": [" the", "."]},
        {"stop": [" the", "."], "include_stop": True},
        {"logprobs": 2},
        {"logprobs": 1, "stop": "tou"},
        {"echo": True, "logprobs": 1},
        {"n": 3, "sampler": WARM, "seed": 5},
        {"n": 2, "sampler": WARM, "seed": 5, "logprobs": 0, "echo": True},
        {"sampler": WARM, "seed": 7, "special": True},
    ],
    ids=str,
)
def test_streaming_gives_the_same_as_waiting(smol_llama: Llama, options: dict[str, Any]) -> None:
    whole = complete(smol_llama, max_tokens=10, **options)
    job = stream(smol_llama, max_tokens=10, **options)
    chunks: list[CompletionChunk] = list(job)
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in own) == choice.text
        assert tuple(t for chunk in own for t in chunk.tokens) == choice.tokens
        assert [chunk.finish_reason for chunk in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        assert own[-1].stop_reason == choice.stop_reason
        if choice.logprobs is None:
            assert all(chunk.logprobs is None for chunk in own)
        else:
            parts = [chunk.logprobs for chunk in own if chunk.logprobs is not None]
            entries = [entry for part in parts for entry in part.tokens]
            offsets = [offset for part in parts for offset in part.text_offset]
            assert [(e.token, len(e.top)) for e in entries] == [
                (e.token, len(e.top)) for e in choice.logprobs.tokens
            ]
            assert [e.logprob for e in entries] == pytest.approx(
                [e.logprob for e in choice.logprobs.tokens], abs=1e-3
            )
            assert offsets == list(choice.logprobs.text_offset)
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert {chunk.id for chunk in chunks} == {job.id}
    result = job.result()
    assert [(c.text, c.tokens) for c in result.choices] == [
        (c.text, c.tokens) for c in whole.choices
    ]


def test_a_callback_sees_every_chunk(smol_llama: Llama) -> None:
    seen: list[CompletionChunk] = []
    result = complete(smol_llama, callback=seen.append)
    assert "".join(chunk.text for chunk in seen) == result.text
    assert seen[-1].finish_reason == "length"


def test_a_callback_ends_the_request_by_returning_false(smol_llama: Llama) -> None:
    seen: list[str] = []

    def third(chunk: CompletionChunk) -> bool:
        seen.append(chunk.text)
        return len(seen) < 3

    whole = complete(smol_llama, max_tokens=12)
    result = complete(smol_llama, max_tokens=12, callback=third)
    assert result.finish_reason == "cancelled"
    assert len(result.tokens) == 3
    assert whole.text.startswith(result.text)
    assert "".join(seen) == result.text


def test_an_exception_of_a_callback_comes_through(smol_llama: Llama) -> None:
    def fail(chunk: CompletionChunk) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        complete(smol_llama, callback=fail)
    assert smol_llama._engine.scheduler.n_running == 0
    assert complete(smol_llama, max_tokens=2).text == " Paris."


def test_max_tokens_none_goes_on_until_the_context_is_full(tiny_llama: Llama) -> None:
    prompt = tiny_llama.tokenize("once upon")
    result = tiny_llama.create_completion(prompt, None, sampler=GREEDY, ignore_eos=True)
    assert result.finish_reason == "length"
    assert len(result.tokens) == 256 - len(prompt) + 1
    assert result.text == detokenized(tiny_llama, prompt, result.tokens)


def test_max_tokens_0_scores_the_prompt(smol_llama: Llama) -> None:
    result = complete(smol_llama, max_tokens=0, echo=True, logprobs=0)
    assert (result.text, result.tokens, result.finish_reason) == (PROMPT, (), "length")
    assert result.logprobs is not None
    assert len(result.logprobs.tokens) == result.usage.prompt_tokens


def test_a_stop_string_across_every_token_border(smol_llama: Llama) -> None:
    whole = complete(smol_llama, max_tokens=10)
    pieces = [smol_llama.detokenize([token]) for token in whole.tokens]
    for i in range(1, len(pieces)):
        stop = pieces[i - 1][-1] + pieces[i][:2]
        at = whole.text.index(stop)
        result = complete(smol_llama, max_tokens=10, stop=stop)
        assert result.text == whole.text[:at]
        assert (result.finish_reason, result.stop_reason) == ("stop", stop)
        n = next(k for k in range(11) if len("".join(pieces[:k])) >= at)
        assert result.tokens == whole.tokens[:n]
        included = complete(smol_llama, max_tokens=10, stop=["zzz", stop], include_stop=True)
        assert included.text == whole.text[: at + len(stop)]
        assert included.stop_reason == stop


def test_tokens_of_a_stop_string_are_not_streamed(smol_llama: Llama) -> None:
    whole = complete(smol_llama, max_tokens=10)
    pieces = [smol_llama.detokenize([token]) for token in whole.tokens]
    stop = "".join(pieces[4:8])
    chunks = list(stream(smol_llama, max_tokens=10, stop=stop, logprobs=0))
    assert "".join(chunk.text for chunk in chunks) == "".join(pieces[:4])
    assert tuple(t for chunk in chunks for t in chunk.tokens) == whole.tokens[:4]
    assert chunks[-1].stop_reason == stop


def test_a_stop_string_that_does_not_come_loses_nothing(smol_llama: Llama) -> None:
    whole = complete(smol_llama, max_tokens=6)
    result = complete(smol_llama, max_tokens=6, stop=whole.text[-2:] + "never")
    assert (result.text, result.tokens) == (whole.text, whole.tokens)
    assert (result.finish_reason, result.stop_reason) == ("length", None)


def test_a_stop_token_ends_the_answer(smol_llama: Llama) -> None:
    whole = complete(smol_llama)
    stop = whole.tokens[4]
    n = whole.tokens.index(stop)
    result = complete(smol_llama, stop_tokens=[stop, 3], logprobs=0)
    assert result.tokens == whole.tokens[:n]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert result.logprobs is not None
    assert len(result.logprobs.tokens) == n
    later = complete(smol_llama, stop_tokens=[stop], min_tokens=n + 1, max_tokens=n + 2)
    assert stop not in later.tokens[: n + 1]
    assert len(later.tokens) >= n + 1


@pytest.mark.parametrize("name", ["smol_llama", "gemma_llama"])
def test_every_token_that_ends_a_generation_does(name: str, request: pytest.FixtureRequest) -> None:
    llama: Llama = request.getfixturevalue(name)
    eog_tokens = llama.model.vocab.eog_tokens
    assert eog_tokens
    for token in eog_tokens:
        push = {token: 1000.0}
        result = complete(llama, max_tokens=5, logit_bias=push)
        assert (result.text, result.tokens) == ("", ())
        assert (result.finish_reason, result.stop_reason) == ("stop", None)
        result = complete(llama, max_tokens=5, logit_bias=push, min_tokens=3)
        assert (len(result.tokens), result.finish_reason) == (3, "stop")
        result = complete(llama, max_tokens=5, logit_bias=push, ignore_eos=True)
        assert (len(result.tokens), result.finish_reason) == (5, "length")
        assert not set(result.tokens) & set(eog_tokens)


def test_the_seed_is_reported_and_repeats_the_answer(smol_llama: Llama) -> None:
    first = complete(smol_llama, sampler=SamplerChain.default())
    assert 0 <= first.seed < 2**32 - 1
    again = complete(smol_llama, sampler=SamplerChain.default(), seed=first.seed)
    assert (again.text, again.seed) == (first.text, first.seed)
    others = {complete(smol_llama, sampler=WARM, seed=seed).text for seed in range(4)}
    assert len(others) > 1
    assert len({complete(smol_llama, max_tokens=1).seed for _ in range(3)}) == 3


def test_n_answers_are_those_of_the_next_seeds(smol_llama: Llama) -> None:
    result = complete(smol_llama, sampler=WARM, seed=40, n=3)
    singles = [complete(smol_llama, sampler=WARM, seed=40 + i) for i in range(3)]
    assert [choice.text for choice in result.choices] == [single.text for single in singles]
    assert [choice.index for choice in result.choices] == [0, 1, 2]
    assert result.usage.completion_tokens == 36


def test_best_of_returns_the_most_probable_on_average(smol_llama: Llama) -> None:
    # No answer may end early: whether one does at this temperature differs between processors.
    options: Any = {"sampler": WARM, "seed": 9, "ignore_eos": True}
    every = complete(smol_llama, n=4, logprobs=0, **options)

    def mean(index: int) -> float:
        found = every.choices[index].logprobs
        assert found is not None
        return float(np.mean([entry.logprob for entry in found.tokens]))

    ranked = sorted(range(4), key=mean, reverse=True)
    best = complete(smol_llama, n=2, best_of=4, **options)
    assert [c.text for c in best.choices] == [every.choices[i].text for i in ranked[:2]]
    assert [c.index for c in best.choices] == [0, 1]
    assert best.logprobs is None
    assert best.usage.completion_tokens == 48


def test_a_logit_bias_bans_and_forces_tokens(smol_llama: Llama) -> None:
    plain = complete(smol_llama, max_tokens=4)
    banned = complete(smol_llama, max_tokens=4, logit_bias=dict.fromkeys(plain.tokens, -np.inf))
    assert not set(banned.tokens) & set(plain.tokens)
    forced = complete(smol_llama, max_tokens=4, logit_bias={3000: 500.0})
    assert forced.tokens == (3000,) * 4


def test_special_renders_control_tokens(smol_llama: Llama) -> None:
    (token,) = smol_llama.tokenize("<|im_start|>", add_special=False)
    for special, text in [(False, ""), (True, "<|im_start|>" * 3)]:
        result = complete(smol_llama, max_tokens=3, logit_bias={token: 1e4}, special=special)
        assert (result.text, result.tokens) == (text, (token,) * 3)


def test_token_ids_are_taken_as_they_are(smol_llama: Llama) -> None:
    whole = complete(smol_llama, max_tokens=6)
    ids = smol_llama.tokenize(PROMPT)
    for prompt in (ids, tuple(ids), np.array(ids, dtype=np.int64)):
        result = complete(smol_llama, prompt, max_tokens=6)
        assert (result.text, result.tokens) == (whole.text, whole.tokens)
    assert complete(smol_llama, ids, max_tokens=2, echo=True).text == PROMPT + " Paris."


def test_an_empty_prompt_starts_from_the_bos_token(gemma_llama: Llama) -> None:
    bos = gemma_llama.model.vocab.bos
    assert bos is not None
    result = complete(gemma_llama, [], max_tokens=4)
    assert result.usage.prompt_tokens == 1
    assert result.tokens == complete(gemma_llama, [bos], max_tokens=4).tokens


def full_batch_logprobs(model: _core.Model, tokens: list[int]) -> npt.NDArray[np.float64]:
    """Decode all tokens in one batch with all rows; return log-softmax per row, by numpy."""
    n = len(tokens)
    with (
        _core.Context(
            model, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1
        ) as context,
        _core.Batch(n) as batch,
    ):
        for pos, token in enumerate(tokens):
            batch.add(token, pos, [0], True)
        context.decode(batch)
        rows = np.empty((n, model.vocab.n_tokens), np.float64)
        for i in range(n):
            with context.logits(i) as view:
                rows[i] = view
    top = rows.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = rows - (
        top + np.log(np.exp(rows - top).sum(axis=1, keepdims=True))
    )
    return result


@pytest.mark.parametrize("name", ["smol_llama", "gemma_llama"])
def test_logprobs_of_prompt_and_answer_match_a_full_decode(
    name: str, request: pytest.FixtureRequest
) -> None:
    llama: Llama = request.getfixturevalue(name)
    prompt = "The capital of France is Paris, and naïve people say"
    result = complete(llama, prompt, max_tokens=4, echo=True, logprobs=3)
    tokens = [*llama.tokenize(prompt), *result.tokens]
    exact = full_batch_logprobs(llama.model, tokens)
    found = result.logprobs
    assert found is not None
    assert [entry.token_id for entry in found.tokens] == tokens
    assert found.tokens[0].logprob is None
    for i, entry in enumerate(found.tokens[1:], start=1):
        # One row at a time against a batch: llama.cpp's rounding differs.
        assert entry.logprob == pytest.approx(exact[i - 1, entry.token_id], abs=0.1)
        assert len(entry.top) == 3
        for other in entry.top:
            assert other.logprob == pytest.approx(exact[i - 1, other.token_id], abs=0.1)
        assert [o.logprob for o in entry.top] == sorted(
            (o.logprob for o in entry.top if o.logprob is not None), reverse=True
        )
    for entry, offset in zip(found.tokens, found.text_offset, strict=True):
        if entry.token_id != llama.model.vocab.bos:
            assert result.text[offset : offset + len(entry.token)] == entry.token


@pytest.fixture(scope="module")
def fim_llama(tiny_gguf: Any, tiny_folder: Path, vocab_folder: Path) -> Iterator[Llama]:
    """Open the tiny model with three of its tokens declared as fill-in-the-middle tokens."""
    add_metadata = tiny_gguf._add_metadata

    def with_fim(writer: Any, arch: str, tokens: Any) -> None:
        add_metadata(writer, arch, tokens)
        for name, token in (("pre", 300), ("suf", 301), ("mid", 302)):
            writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", token)

    tiny_gguf._add_metadata = with_fim
    try:
        tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
        path = tiny_gguf.write_model(tiny_folder / "fim.gguf", tokens)[0]
    finally:
        tiny_gguf._add_metadata = add_metadata
    with Llama(path, n_ctx=256, n_threads=1) as llama:
        yield llama


def test_a_suffix_fills_in_the_middle(fim_llama: Llama) -> None:
    before, after = "def add(a, b):", "return c"
    bos, *prefix = fim_llama.tokenize(before)
    assert bos == fim_llama.model.vocab.bos
    rest = fim_llama.tokenize(after, add_special=False)
    ids = [bos, 300, *prefix, 301, *rest, 302]
    expected = complete(fim_llama, ids, ignore_eos=True)
    result = complete(fim_llama, before, suffix=after, ignore_eos=True, echo=True)
    assert result.tokens == expected.tokens
    assert result.usage.prompt_tokens == len(ids)
    assert result.text == before + expected.text


def test_a_suffix_needs_fill_in_the_middle_tokens(smol_llama: Llama) -> None:
    with pytest.raises(ParameterError, match="suffix"):
        complete(smol_llama, suffix="end")
