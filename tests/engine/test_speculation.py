"""Drafts never change an answer: whatever they are, what is given is what is given without them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_crab import (
    Completion,
    Llama,
    LlamaParams,
    ParameterError,
    PromptLookupDecoding,
    SamplerChain,
)

GREEDY = SamplerChain().greedy()
FIXED = PromptLookupDecoding(max_ngram=3, num_pred_tokens=8, adaptive=False)
CODE = """def area(shapes):
    total = 0
    for shape in shapes:
        if shape.kind == "circle":
            total += 3.14159 * shape.radius ** 2
        elif shape.kind == "square":
            total += shape.side ** 2
    return total
"""
COPY = f"{CODE}\n\nThe same with sum for total:\n\ndef area(shapes):\n    sum = 0\n"
LIST = '[{"name": "Ann", "age": 31}, {"name": "Bob", "age": 28}, {"name": "'
STORY = "Once upon a time, in a village by the sea, a clockmaker"
PROMPTS = (COPY, LIST, STORY)


def same(found: Completion, expected: Completion) -> None:
    assert found.choices[0].tokens == expected.choices[0].tokens
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.usage == expected.usage


def agree(found: Completion, expected: Completion) -> None:
    """Assert that answers part where two tokens were nearly equal, if at all.

    Batches of other sizes and cells in other places are summed up in another order. `expected` was
    made with log-probabilities.
    """
    mine, other = found.choices[0].tokens, expected.choices[0].tokens
    n = sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(mine, other, strict=False)
        )
    )
    if n < min(len(mine), len(other)):
        logprobs = expected.choices[0].logprobs
        assert logprobs is not None
        first, second = logprobs.tokens[n].top[:2]
        assert first.logprob - second.logprob < 0.5
    else:
        assert len(mine) == len(other)


@pytest.fixture(scope="module")
def llama(smol_path: Path) -> Iterator[Llama]:
    with Llama(
        smol_path, n_ctx=1024, flash_attn_type=True, n_threads=1, speculative="auto"
    ) as loaded:
        yield loaded


class Oracle:
    """A drafter that knows the answer, and errs as it is told to."""

    num_pred_tokens = 12

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], err: Callable[[int], bool]):
        self.all = [*prompt, *answer]
        self.err = err
        self.asked: list[int] = []
        self.adaptive = False

    def __call__(self, tokens: Any, n_max: int) -> list[int]:
        assert list(tokens) == self.all[: len(tokens)]
        assert not tokens.flags.writeable
        self.asked.append(len(tokens))
        draft = self.all[len(tokens) :][:n_max]
        return [(t + 1) % 1000 if self.err(len(tokens) + k) else t for k, t in enumerate(draft)]


def plain(llama: Llama, prompt: str | list[int], n: int = 40, **options: Any) -> Completion:
    options = {"sampler": GREEDY, "cache_prompt": False, "speculative": None, **options}
    return llama.create_completion(prompt, n, **options)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["copy", "list", "story"])
@pytest.mark.parametrize("length", [1, 3, 8, 30])
def test_greedy_answers_are_equal(llama: Llama, prompt: str, length: int) -> None:
    fixed = PromptLookupDecoding(max_ngram=3, num_pred_tokens=length, adaptive=False)
    expected = plain(llama, prompt)
    found = plain(llama, prompt, speculative=fixed)
    same(found, expected)
    assert expected.timings.draft_n == 0
    assert found.timings.draft_n >= found.timings.draft_accepted_n
    if prompt == COPY:
        assert found.timings.draft_accepted_n > 5


ERRORS: dict[str, Callable[[int], bool]] = {
    "never": lambda at: False,
    "always": lambda at: True,
    "every-third": lambda at: at % 3 == 0,
    "random": lambda at: random.Random(at).random() < 0.3,
}


@pytest.mark.parametrize("errs", ERRORS)
@pytest.mark.parametrize("prompt", [COPY, STORY], ids=["copy", "story"])
def test_a_drafter_of_ones_own(llama: Llama, prompt: str, errs: str) -> None:
    expected = plain(llama, prompt, 48)
    ids = llama.tokenize(prompt)
    oracle = Oracle(ids, expected.choices[0].tokens, ERRORS[errs])
    for oracle.adaptive in (True, False):  # at last, whatever it is worth
        found = plain(llama, prompt, 48, speculative=oracle)
        same(found, expected)
    if errs == "never":
        assert found.timings.draft_accepted_n == found.timings.draft_n > 40
        assert len(oracle.asked) < 48 + 8
    elif errs == "always":
        assert found.timings.draft_accepted_n == 0 < found.timings.draft_n
    else:
        assert 0 < found.timings.draft_accepted_n < found.timings.draft_n


def test_a_drafter_may_be_the_default_of_a_model(tiny_path: Path) -> None:
    asked: list[int] = []

    def draft(tokens: Any, n_max: int) -> list[int]:
        asked.append(len(tokens))
        return []

    with Llama(tiny_path, n_ctx=64, n_threads=1, speculative=draft) as llama:
        assert llama.create_completion([1, 7, 9], 6, ignore_eos=True).timings.predicted_n == 6
    assert asked


def test_sampled_answers_are_equal_for_the_same_seed(llama: Llama) -> None:
    chains = [
        SamplerChain.default(),
        SamplerChain.creative(),
        SamplerChain().penalties(64, 1.3, 0.1, 0.1).temp(0.9).dist(),
        SamplerChain().temp(0.8).mirostat_v2(tau=5.0, eta=0.1),
    ]
    for prompt, chain, seed in itertools.product((COPY, LIST), chains, (1, 2)):
        expected = plain(llama, prompt, 32, sampler=chain, seed=seed)
        ids = llama.tokenize(prompt)
        oracle = Oracle(ids, expected.choices[0].tokens, ERRORS["every-third"])
        for drafts in (FIXED, oracle):
            found = plain(llama, prompt, 32, sampler=chain, seed=seed, speculative=drafts)
            same(found, expected)


def test_log_probabilities_are_those_of_each_token(llama: Llama) -> None:
    expected = plain(llama, COPY, 32, logprobs=3)
    found = plain(llama, COPY, 32, logprobs=3, speculative=FIXED)
    same(found, expected)
    assert found.timings.draft_accepted_n > 5
    ours, theirs = found.choices[0].logprobs, expected.choices[0].logprobs
    assert ours is not None
    assert theirs is not None
    assert len(ours.tokens) == len(theirs.tokens) == 32
    for mine, other in zip(ours.tokens, theirs.tokens, strict=True):
        assert mine.token == other.token
        assert mine.logprob == pytest.approx(other.logprob, abs=2e-2)
        assert [t.token for t in mine.top][:1] == [t.token for t in other.top][:1]


GRAMMAR = r"""root ::= "[" item ("," " " item)* "]"
item ::= "{\"name\": \"" [A-Z] [a-z]+ "\", \"age\": " [0-9]+ "}"
"""


def test_grammars_hold(llama: Llama) -> None:
    prompt = f'A list of three people: {LIST}Cid", "age": 44}}]\nAnother list of two people: '
    expected = plain(llama, prompt, 60, grammar=GRAMMAR)
    for drafts in (FIXED, "auto"):
        found = plain(llama, prompt, 60, grammar=GRAMMAR, speculative=drafts)
        same(found, expected)
    ids = llama.tokenize(prompt)
    for errs in ERRORS.values():
        oracle = Oracle(ids, expected.choices[0].tokens, errs)
        same(plain(llama, prompt, 60, grammar=GRAMMAR, speculative=oracle), expected)


def test_ends_of_every_kind(llama: Llama) -> None:
    long = plain(llama, COPY, 64)
    assert len(long.choices[0].tokens) > 24
    third = long.choices[0].tokens[20]
    cases: list[dict[str, Any]] = [
        {"stop": "total"},
        {"stop": "circle", "include_stop": True},
        {"stop_tokens": [third]},
        {"stop_tokens": [third], "min_tokens": 25},
        {"ignore_eos": True},
        {"stop": ["\n        elif", "zzz"], "stream": False},
    ]
    for n, options in itertools.product((5, 17, 64), cases):
        if options.get("min_tokens", 0) > n:
            continue
        same(
            plain(llama, COPY, n, speculative=FIXED, **options),
            plain(llama, COPY, n, **options),
        )


def test_streams_give_the_same_pieces_in_order(llama: Llama) -> None:
    expected = plain(llama, COPY, 48)
    chunks = list(
        llama.create_completion(
            COPY, 48, sampler=GREEDY, cache_prompt=False, speculative=FIXED, stream=True
        )
    )
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert chunks[-1].finish_reason == expected.finish_reason


def test_what_is_kept_for_the_next_request_is_right(llama: Llama) -> None:
    for n in (7, 23, 40):  # ends at other places of a draft
        first = plain(llama, COPY, n, speculative=FIXED)
        ids = [*llama.tokenize(COPY), *first.choices[0].tokens]
        again = plain(llama, ids, 24, cache_prompt=True)
        assert again.timings.cached_n == len(ids) - 1
        agree(again, plain(llama, ids, 24, logprobs=2))


@pytest.mark.parametrize("kv_unified", [False, True], ids=["split", "unified"])
def test_several_at_once(smol_path: Path, kv_unified: bool) -> None:
    prompts = [COPY, LIST, STORY, COPY + "    for", LIST + "Eve", STORY + " named"]
    with Llama(smol_path, n_ctx=1024, flash_attn_type=True, n_threads=1) as llama:
        expected = [plain(llama, prompt, 32, logprobs=2) for prompt in prompts]
    with Llama(
        smol_path, n_ctx=4 * 512, n_seq_max=4, flash_attn_type=True, n_threads=1,
        kv_unified=kv_unified, speculative=FIXED,
    ) as llama:  # fmt: skip
        for _ in range(2):
            found = list(llama.map(prompts, 32, sampler=GREEDY))
            assert sum(c.timings.draft_accepted_n for c in found) > 20
            for mine, other in zip(found, expected, strict=True):
                agree(mine, other)
        several = llama.create_completion(COPY, 24, n=3, sampler=GREEDY)
        alone = llama.create_completion(COPY, 24, sampler=GREEDY, speculative=None)
        assert len({c.tokens for c in several.choices}) == 1 or kv_unified
        assert len(alone.choices[0].tokens) == 24


def test_a_sliding_window(gemma_path: Path) -> None:
    """Gemma's window is 512: drafts are taken back behind its edge, too."""
    text = " ".join(f"The number {i} is followed by {i + 1}." for i in range(60))
    with Llama(gemma_path, n_ctx=1024, n_threads=1, speculative="auto") as llama:
        expected = plain(llama, text, 60, logprobs=5)
        assert len(llama.tokenize(text)) > 600
        ids = llama.tokenize(text)
        oracle = Oracle(ids, expected.choices[0].tokens, ERRORS["every-third"])
        for drafts in (FIXED, oracle):
            found = plain(llama, text, 60, speculative=drafts)
            assert found.timings.draft_n > found.timings.draft_accepted_n > 0 or drafts is FIXED
            agree(found, expected)


def test_samples_follow_the_distribution_of_the_model(tiny_path: Path) -> None:
    """Chi-square over what comes third, with drafts that are right about half of the time."""
    chain = SamplerChain().top_k(4).temp(1.5).dist()
    n = 1500
    with Llama(tiny_path, n_ctx=64, n_threads=1, speculative="auto") as llama:
        prompt = [1, 7, 9]
        seen = plain(llama, prompt, 3, sampler=chain, seed=0).choices[0].tokens

        class Guess:
            adaptive = False

            def __call__(self, tokens: Any, n_max: int) -> list[int]:
                return list(seen)[max(0, len(tokens) - 3) :][:n_max]

        counts: list[dict[tuple[int, ...], int]] = []
        n_accepted = 0
        for drafts, base in ((None, 1), (Guess(), 10_000)):
            found: dict[tuple[int, ...], int] = {}
            for seed in range(n):
                result = plain(
                    llama, prompt, 3, sampler=chain, seed=base + seed, speculative=drafts,
                    cache_prompt=True, ignore_eos=True,
                )  # fmt: skip
                found[result.choices[0].tokens] = found.get(result.choices[0].tokens, 0) + 1
                n_accepted += result.timings.draft_accepted_n
            counts.append(found)
    assert n_accepted > 50
    statistic, n_classes = 0.0, 0
    common = [key for key in counts[0] if counts[0][key] + counts[1].get(key, 0) >= 20]
    for key in common:
        a, b = counts[0][key], counts[1].get(key, 0)
        statistic += (a - b) ** 2 / (a + b)
        n_classes += 1
    assert n_classes > 5
    # The 99.99 % quantile of chi-square is below this for 6 to 200 degrees of freedom.
    assert statistic < n_classes + 6.0 * (2 * n_classes) ** 0.5


def test_a_full_cache_makes_do_without_drafts(smol_path: Path) -> None:
    with Llama(smol_path, n_ctx=512, flash_attn_type=True, n_threads=1) as llama:
        expected = [plain(llama, p, 100, ignore_eos=True, logprobs=2) for p in (COPY, LIST)]
    with Llama(
        smol_path, n_ctx=384, n_seq_max=2, kv_unified=True, flash_attn_type=True, n_threads=1,
        speculative=PromptLookupDecoding(3, 30, adaptive=False),
    ) as llama:  # fmt: skip
        found = list(llama.map([COPY, LIST], 100, sampler=GREEDY, ignore_eos=True))
        for mine, other in zip(found, expected, strict=True):
            agree(mine, other)


def test_the_end_of_the_context(llama: Llama) -> None:
    ids = (llama.tokenize(COPY) * 12)[: llama.n_ctx - 20]
    expected = plain(llama, ids, None, ignore_eos=True)
    found = plain(llama, ids, None, ignore_eos=True, speculative=FIXED)
    same(found, expected)
    assert found.finish_reason == "length"


def test_recurrent_models_refuse_with_a_reason(tiny_recurrent_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"^speculative: the state of a recurrent model"):
        Llama(tiny_recurrent_path, n_ctx=64, speculative=FIXED)
    with Llama(tiny_recurrent_path, n_ctx=64, speculative="auto") as llama:
        assert llama.create_completion([1, 5, 7], 6, ignore_eos=True).timings.draft_n == 0
        with pytest.raises(ParameterError, match=r"^speculative: the state of a recurrent model"):
            llama.create_completion([1, 5, 7], 6, speculative=FIXED)


def test_errors_of_a_drafter_end_its_request_only(llama: Llama) -> None:
    calls = []

    def broken(tokens: Any, n_max: int) -> list[int]:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise RuntimeError("no idea")
        return []

    with pytest.raises(RuntimeError, match="no idea"):
        plain(llama, STORY, 20, speculative=broken)
    same(plain(llama, STORY, 20, speculative=FIXED), plain(llama, STORY, 20))

    def nonsense(tokens: Any, n_max: int) -> list[Any]:
        return [-5, 10**6]

    same(plain(llama, STORY, 20, speculative=nonsense), plain(llama, STORY, 20))

    def words(tokens: Any, n_max: int) -> list[Any]:
        return ["the"]

    with pytest.raises(ValueError, match="the"):
        plain(llama, STORY, 20, speculative=words)


def test_wrong_values_are_named(llama: Llama, smol_path: Path) -> None:
    with pytest.raises(ParameterError, match=r'^speculative: expected "auto", None'):
        LlamaParams(speculative="always")
    with pytest.raises(ParameterError, match=r"^speculative: expected"):
        plain(llama, STORY, 5, speculative=5)
    with pytest.raises(ParameterError, match=r"^speculative\.max_ngram: 17 is more than 16"):
        PromptLookupDecoding(17)
    with pytest.raises(ParameterError, match=r"^speculative\.min_ngram: 3 is more than 2"):
        PromptLookupDecoding(2, min_ngram=3)
    with pytest.raises(ParameterError, match=r"^speculative\.num_pred_tokens: 0 is less than 1"):
        PromptLookupDecoding(2, 0)
    no_rows = pytest.raises(ParameterError, match=r"^speculative: the context has no output rows")
    with Llama(smol_path, n_ctx=256) as other, no_rows:
        plain(other, STORY, 5, speculative="auto")


def test_parameters_are_written_and_read() -> None:
    for value in ("auto", None, FIXED, PromptLookupDecoding()):
        params = LlamaParams("m.gguf", speculative=value)
        assert LlamaParams.from_dict(params.to_dict()) == params
    with pytest.raises(ParameterError, match="cannot be written down"):
        LlamaParams(speculative=lambda tokens, n_max: []).to_dict()


def test_counts_are_reported(llama: Llama) -> None:
    with llama.measure() as measured:
        found = plain(llama, COPY, 48, speculative=FIXED)
    perf = measured.perf
    assert perf.n_drafted == found.timings.draft_n > 0
    assert perf.n_draft_accepted == found.timings.draft_accepted_n > 0
    assert perf.acceptance == found.timings.draft_accepted_n / found.timings.draft_n
    assert perf.predicted_n == 48
    assert perf.n_steps < 48
    assert "accepted" in str(perf)
    known = llama.stats()["speculation"]
    assert known["cost_us"][1] > 0
    assert known["acceptance"]["lookup"]
