"""complete_infill: the ids that reach the model, what is passed on, and what is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import Completion, Llama, ParameterError, SamplerChain, errors
from llama_crab.infill import infill_prompt

GREEDY = SamplerChain().greedy()
BEFORE = "the way of the world and "
AFTER = " is the way of war."
EXTRA = [("one.py", "the one of them"), ("two.py", "and the other")]


@pytest.fixture(scope="module")
def llama(tiny_fim_path: Path) -> Iterator[Llama]:
    # More context than a batch, so that there is room for other files.
    with Llama(tiny_fim_path, n_ctx=512, n_batch=128, n_ubatch=64, n_threads=1) as llama:
        yield llama


class Ids:
    """Notes what has reached the model when the first token is chosen."""

    def __init__(self) -> None:
        self.prompt: list[int] = []

    def __call__(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        if not self.prompt:
            self.prompt = tokens.tolist()


def infill(llama: Llama, *args: Any, **options: Any) -> tuple[Completion, list[int]]:
    ids = Ids()
    options = {"sampler": GREEDY, "logits_processors": [ids], **options}
    return llama.complete_infill(*args, **options), ids.prompt


def expected_prompt(llama: Llama, n_predict: int, *args: Any, **options: Any) -> list[int]:
    n_batch = min(llama.context.n_batch, llama.n_ctx - n_predict)
    return infill_prompt(
        llama.model.vocab, *args, n_ctx=llama.n_ctx, n_batch=n_batch, n_predict=n_predict, **options
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "some <|fim_pad|>"},
        {"extra": EXTRA},
        {"extra": iter(EXTRA), "repository": "crab", "filename": "main.py"},
        {"spm_infill": True, "prompt": "some"},
    ],
    ids=["plain", "prompt", "extra", "names", "suffix first"],
)
def test_the_prompts_ids_reach_the_model(llama: Llama, options: dict[str, Any]) -> None:
    options = {**options, "extra": list(options.get("extra", ()))}
    expected = expected_prompt(llama, 8, BEFORE, AFTER, **options)
    result, ids = infill(llama, BEFORE, AFTER, 8, **options)
    assert ids == expected
    assert result.usage.prompt_tokens == len(expected)
    vocab = llama.model.vocab
    assert {vocab.fim_pre, vocab.fim_suf, vocab.fim_mid, vocab.fim_rep, vocab.fim_sep} < set(ids)


def test_texts_or_their_ids_may_be_given(llama: Llama) -> None:
    before, after = (llama.tokenize(text, add_special=False) for text in (BEFORE, AFTER))
    expected = infill(llama, BEFORE, AFTER, 4)[1]
    assert infill(llama, before, after, 4)[1] == expected
    assert infill(llama, tuple(before), AFTER, 4)[1] == expected
    assert infill(llama, "", "", 4)[1] == expected_prompt(llama, 4, "", "")


def test_the_answer_is_that_of_these_ids(llama: Llama) -> None:
    for options in (
        {"sampler": GREEDY},
        {"seed": 7, "n": 2, "logprobs": 1, "stop": ["."], "special": True},
    ):
        ids = expected_prompt(llama, 24, BEFORE, AFTER)
        expected = llama.create_completion(ids, 24, cache_prompt=False, **options)
        found = llama.complete_infill(BEFORE, AFTER, 24, cache_prompt=False, **options)
        assert [choice.tokens for choice in found.choices] == [
            choice.tokens for choice in expected.choices
        ]
        assert found.text == expected.text
        assert len(found.tokens) > 0
        assert found.usage == expected.usage


def test_other_arguments_of_completions_are_passed_on(llama: Llama) -> None:
    seen: list[str] = []
    whole = llama.complete_infill(BEFORE, AFTER, 12, sampler=GREEDY, ignore_eos=True)
    found = llama.complete_infill(
        *(BEFORE, AFTER, 12),
        sampler=GREEDY,
        ignore_eos=True,
        callback=lambda chunk: seen.append(chunk.text) or len(seen) < 3,
    )
    assert found.finish_reason == "cancelled"
    assert "".join(seen) == found.text == whole.text[: len(found.text)]
    stream: Any = llama.complete_infill(
        BEFORE, AFTER, 12, sampler=GREEDY, ignore_eos=True, stream=True
    )
    assert "".join(chunk.text for chunk in stream) == whole.text
    with pytest.raises(errors.RequestTimeoutError):
        llama.complete_infill(BEFORE, AFTER, timeout=1e-6)
    with pytest.raises(TypeError, match="no_such_option"):
        llama.complete_infill(BEFORE, AFTER, no_such_option=1)


@pytest.mark.parametrize("max_tokens", [None, 0, 1, 100])
@pytest.mark.parametrize("n_batch", [64, 2048])
@pytest.mark.parametrize("spm_infill", [False, True])
def test_long_texts_are_cut_to_what_fits(
    tiny_fim_path: Path, max_tokens: int | None, n_batch: int, spm_infill: bool
) -> None:
    n_ctx, n_predict = 256, max_tokens or 0
    before = [300 + i % 300 for i in range(900)]
    after = [350 + i % 300 for i in range(900)]
    with Llama(tiny_fim_path, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=64, n_threads=1) as llama:
        vocab = llama.model.vocab
        fim = vocab.fim_pre, vocab.fim_suf, vocab.fim_mid
        result, ids = infill(
            *(llama, before, after, max_tokens),
            extra=[("long", "the way of war " * 300)],
            spm_infill=spm_infill,
            ignore_eos=True,
        )
    room = n_ctx - n_predict
    assert min(n_batch, room) - 4 <= result.usage.prompt_tokens <= room
    assert result.finish_reason == "length"
    assert max_tokens in (None, result.usage.completion_tokens)
    if max_tokens == 0:
        return  # nothing is chosen, so that nobody has seen the ids
    assert len(ids) == result.usage.prompt_tokens
    pre, suf, mid = (ids.index(token) for token in fim)
    assert (pre > suf, mid) == (spm_infill, len(ids) - 1)
    prefix = ids[pre + 1 : mid if spm_infill else suf]
    suffix = ids[suf + 1 : pre if spm_infill else mid]
    assert prefix == before[-len(prefix) :]
    assert suffix == after[: len(suffix)]
    assert len(prefix) > 2 * len(suffix) > 0


def test_a_model_without_the_tokens_is_refused(tiny_llama: Llama) -> None:
    with pytest.raises(ParameterError, match="infill: the model has no FIM_PRE token"):
        tiny_llama.complete_infill(BEFORE, AFTER)


def test_wrong_arguments_are_refused(llama: Llama) -> None:
    for max_tokens in (-1, 1.5, "8"):
        wrong: Any = max_tokens
        with pytest.raises((ParameterError, TypeError)):
            llama.complete_infill(BEFORE, AFTER, wrong)
    with pytest.raises(errors.InvalidTokenError, match="token 1000000 is outside"):
        llama.complete_infill([10**6], AFTER)
    with pytest.raises(ParameterError, match="seed"):
        llama.complete_infill(BEFORE, AFTER, seed=-1)
    with pytest.raises(errors.ContextLengthError, match="prompt"):
        llama.complete_infill(BEFORE, AFTER, prompt="the way of war " * 300)
    assert llama.stats()["n_running"] == 0


def test_a_closed_llama_says_so(tiny_fim_path: Path) -> None:
    llama = Llama(tiny_fim_path, n_ctx=64, n_threads=1)
    llama.close()
    with pytest.raises(errors.ClosedError):
        llama.complete_infill(BEFORE, AFTER)
