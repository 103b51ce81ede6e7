"""A second call prefills only what differs, and answers as a fresh context does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import Completion, Llama, SamplerChain

GREEDY = SamplerChain().greedy()
# Sentences of ordinary text, so that the model has something to attend to.
STORY = (
    "The harbour lay quiet in the early morning. Two fishermen mended their nets and talked about "
    "the storm that had passed in the night. A boy carried bread from the baker to the inn, and "
    "the keeper of the lighthouse wrote the date, the wind and the height of the water in his "
    "book. In the afternoon a ship with red sails came round the cape. "
)
BRANCH = " Suddenly the old captain stood up, opened the iron box and read the letter aloud:"

Row = npt.NDArray[np.float32]


def complete(llama: Llama, prompt: list[int], max_tokens: int = 16) -> Completion:
    result = llama.create_completion(prompt, max_tokens, sampler=GREEDY, ignore_eos=True)
    assert isinstance(result, Completion)
    return result


def last_row(llama: Llama, prompt: list[int]) -> Row:
    """Evaluate the prompt and return the logits behind it."""
    llama.create_completion(prompt, 0, sampler=GREEDY)
    return row_of(llama)


def row_of(llama: Llama) -> Row:
    """Return a copy of the context's last row."""
    with llama.context.logits() as view:
        return np.array(view, dtype=np.float32)


def assert_equal_but_for_close_calls(
    llama: Llama, prompt: list[int], expected: Completion, found: Completion
) -> None:
    """Compare tokens; where they part, `expected` must have been within 0.5 logits of a tie.

    Chunks of other sizes round differently in llama.cpp.
    """
    pairs = list(zip(expected.tokens, found.tokens, strict=True))
    for at, (token, other) in enumerate(pairs):
        if token != other:
            llama._engine.scheduler.stepper.clear(0)
            row = last_row(llama, [*prompt, *expected.tokens[:at]])
            assert abs(row[token] - row[other]) < 0.5
            return
    assert found.text == expected.text


@pytest.fixture(scope="module")
def smol_pair(smol_path: Path) -> Iterator[tuple[Llama, Llama]]:
    """Return two equal Llamas with one sequence: one to reuse, one to start afresh."""

    def load() -> Llama:
        return Llama(smol_path, n_ctx=512, n_ubatch=64, flash_attn_type="enabled")

    with load() as reused, load() as fresh:
        yield reused, fresh


def test_smollm2_answers_as_a_fresh_context(smol_pair: tuple[Llama, Llama]) -> None:
    reused, fresh = smol_pair
    story = reused.tokenize(STORY)
    branch = reused.tokenize(BRANCH)
    first = complete(reused, story)
    said = [*story, *first.tokens]
    cases = {
        "the same prompt": (story, len(story) - 1),
        "a conversation that goes on": ([*said, *branch], len(said) - 1),
        "a shorter prompt": (story[:40], 39),
        "a branch": ([*story[:50], *branch], 50),
        "nothing in common": (branch, 0),
        "one token": (story[:1], 0),
    }
    for name, (prompt, n_cached) in cases.items():
        fresh._engine.scheduler.stepper.clear(0)
        expected = complete(fresh, prompt)
        assert expected.timings.cached_n == 0
        complete(reused, story)
        before = reused._engine.scheduler.stepper.n_decoded
        result = complete(reused, prompt)
        assert result.timings.cached_n == result.usage.cached_tokens == n_cached, name
        assert reused._engine.scheduler.stepper.n_decoded - before == len(prompt) - n_cached + 15, (
            name
        )
        if name == "nothing in common":  # the same batches as afresh
            assert result.tokens == expected.tokens
        assert_equal_but_for_close_calls(fresh, prompt, expected, result)


def test_each_of_several_conversations_keeps_its_own_memory(smol_llama: Llama) -> None:
    chats = [smol_llama.tokenize(f"{name} said:{STORY[:150]}") for name in ("Ann", "Bob", "Cy")]
    for turn in range(3):
        for chat in chats:
            n_before = len(chat)
            result = complete(smol_llama, chat, 4)
            if turn:
                # All but the newest words, and the last answer's last token.
                assert result.timings.cached_n == n_before - 3
            chat += [*result.tokens, *smol_llama.tokenize(" and", add_special=False), 28]


@pytest.fixture(scope="module")
def window_llama(gemma_path: Path) -> Iterator[Llama]:
    # Without snapshots: one of the prompt's end would serve.
    fields = {"n_ctx": 1024, "n_ubatch": 64, "swa_full": False, "cache_ram_mib": 0}
    with Llama(gemma_path, **fields) as llama:
        assert llama.model.n_swa == 512
        yield llama


def long_prompt(llama: Llama, n: int) -> list[int]:
    """Return BOS and a text of `n` tokens that does not repeat itself."""
    numbers = "".join(f"On day {i * 37 % 101} they counted {i * i} gulls. " for i in range(200))
    return llama.tokenize(STORY + numbers)[:n]


def test_gemma_decodes_again_what_its_window_has_dropped(window_llama: Llama) -> None:
    llama = window_llama
    stepper = llama._engine.scheduler.stepper
    whole = long_prompt(llama, 800)
    other = [*whole[:520], *llama.tokenize(BRANCH, add_special=False)]
    expected = last_row(llama, other)
    stepper.clear(0)

    complete(llama, whole, 2)
    # Position 520 attends to those from 9 on.
    assert llama.context.memory.seq_pos_min(0) > 9
    # Control: told to keep the prefix all the same, the core gives other logits.
    greedy = SamplerChain().greedy().compile(llama.context.model, 1)
    stepper.assign(
        0, other, sampler=greedy, n_keep=520, leader=-1, max_tokens=0, min_tokens=0, stop_tokens=(),
        n_logprobs=-1, prompt_logprobs=False, ignore_eos=False, special=False, emit=False,
    )  # fmt: skip
    while stepper.is_active(0):
        stepper.step(64)
    assert np.abs(row_of(llama) - expected).max() > 0.1
    stepper.clear(0)

    complete(llama, whole, 2)
    result = llama.create_completion(other, 0)
    assert isinstance(result, Completion)
    assert result.timings.cached_n == 0
    np.testing.assert_allclose(row_of(llama), expected, atol=1e-2)


def test_a_windowed_model_answers_as_a_fresh_one_at_every_cut(tiny_swa_path: Path) -> None:
    """A window of 16 in a cache of 256 cells: near cuts are kept, far ones decoded again."""
    rng = np.random.default_rng(3)
    fields = {"n_ctx": 512, "n_ubatch": 8, "n_threads": 1, "cache_ram_mib": 0}
    with Llama(tiny_swa_path, swa_full=False, **fields) as llama:
        stepper = llama._engine.scheduler.stepper
        n_vocab = llama.model.vocab.n_tokens - 2
        whole = [int(token) for token in rng.integers(0, n_vocab, 400)]
        kept = []
        for n in range(20, 400, 20):
            other = [*whole[:n], *(int(token) for token in rng.integers(0, n_vocab, 5))]
            stepper.clear(0)
            expected = last_row(llama, other)
            stepper.clear(0)
            complete(llama, whole, 2)
            oldest = llama.context.memory.seq_pos_min(0)
            row = last_row(llama, other)
            n_cached = stepper.progress(0)[1]
            assert n_cached == (n if oldest <= max(0, n - 16) else 0)
            kept.append(n_cached > 0)
            np.testing.assert_allclose(row, expected, atol=2e-2)
        assert kept == sorted(kept)
        assert set(kept) == {False, True}


def test_gemma_with_a_full_cache_keeps_any_prefix(gemma_llama: Llama) -> None:
    prompt = long_prompt(gemma_llama, 620)
    complete(gemma_llama, prompt, 2)
    other = [*prompt[:560], *gemma_llama.tokenize(BRANCH, add_special=False)]
    result = complete(gemma_llama, other)
    assert result.timings.cached_n == 560
    gemma_llama._engine.scheduler.stepper.clear(0)
    fresh = complete(gemma_llama, other)
    assert fresh.timings.cached_n == 0
    assert_equal_but_for_close_calls(gemma_llama, other, fresh, result)
