"""Requests that run together answer as they do one by one, as far as the arithmetic allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_crab import Completion, Llama, SamplerChain

STORY = (
    "The harbour lay quiet in the early morning. Two fishermen mended their nets and talked about "
    "the storm that had passed in the night. A boy carried bread from the baker to the inn, and "
    "the keeper of the lighthouse wrote the date, the wind and the height of the water in his book."
)
# (prompt, tokens to generate): from one word to a page, so that they begin and end at other steps.
REQUESTS = [
    ("The capital of France is", 6),
    ("def fibonacci(n):\n", 10),
    (STORY, 12),
    ("Once upon a time", 12),
    (STORY[:200], 4),
    ("Water boils at", 8),
    ("1, 2, 3, 4,", 11),
    (STORY[90:], 5),
    ("Yes", 7),
    ("The largest planet is Jupiter. The smallest", 9),
    (f"{STORY} In the afternoon", 5),
    ("Dear Sir or Madam,\n", 8),
]
# One thread, which no other program's can keep waiting; prompts that are cut up the same each time.
FIELDS: dict[str, Any] = {
    "n_ubatch": 64, "flash_attn_type": True, "n_threads": 1, "max_itl_ms": None,
}  # fmt: skip
KV_UNIFIED = pytest.mark.parametrize("kv_unified", [False, True], ids=["split", "unified"])
MARGIN = 0.5


def options(n_tokens: int, logprobs: int | None = None) -> dict[str, Any]:
    return {
        "max_tokens": n_tokens, "sampler": SamplerChain().greedy(), "ignore_eos": True,
        "cache_prompt": False, "logprobs": logprobs,
    }  # fmt: skip


def one_by_one(path: Path) -> list[Completion]:
    """Return the answers with the log-probabilities of ten candidates for each token."""
    with Llama(path, n_ctx=256, **FIELDS) as llama:
        found = []
        for prompt, n_tokens in REQUESTS:
            result = llama.create_completion(prompt, **options(n_tokens, 10))
            assert isinstance(result, Completion)
            found.append(result)
        return found


def together(path: Path, *, kv_unified: bool) -> list[Completion]:
    n = len(REQUESTS)
    with Llama(path, n_ctx=256 * n, n_seq_max=n, kv_unified=kv_unified, **FIELDS) as llama:
        jobs = [
            llama.create_completion(prompt, stream=True, **options(n_tokens))
            for prompt, n_tokens in REQUESTS
        ]
        results = [job.result() for job in jobs]
        # One after the other would take a step for each token.
        assert llama.stats()["n_steps"] < sum(n_tokens for _, n_tokens in REQUESTS) / 2
        return results


@pytest.fixture(scope="module")
def smol_alone(smol_path: Path) -> list[Completion]:
    return one_by_one(smol_path)


@pytest.fixture(scope="module")
def gemma_alone(gemma_path: Path) -> list[Completion]:
    return one_by_one(gemma_path)


def margins(expected: list[Completion], found: list[Completion]) -> Iterator[float]:
    """Yield, for each request that differs, by how much its single run chose as it did."""
    for single, result in zip(expected, found, strict=True):
        assert len(result.tokens) == len(single.tokens)
        logprobs = single.choices[0].logprobs
        assert logprobs is not None
        for token, entry in zip(result.tokens, logprobs.tokens, strict=True):
            if token != entry.token_id:
                candidates = {top.token_id: top.logprob or 0.0 for top in entry.top}
                assert token in candidates
                yield candidates[entry.token_id] - candidates[token]
                break


Record = Callable[[str, object], None]


def check_close_calls(expected: list[Completion], found: list[Completion], record: Record) -> None:
    parted = sorted(round(margin, 3) for margin in margins(expected, found))
    record("requests_that_differ", f"{len(parted)} of {len(REQUESTS)}")
    record("margins_in_logits", parted)
    assert all(margin < MARGIN for margin in parted)


def test_smollm2_with_a_stream_per_sequence_gives_exactly_the_text_of_single_runs(
    smol_path: Path, smol_alone: list[Completion]
) -> None:
    results = together(smol_path, kv_unified=False)
    assert [result.text for result in results] == [result.text for result in smol_alone]
    assert [len(result.tokens) for result in results] == [n for _, n in REQUESTS]


def test_smollm2_in_a_unified_cache_differs_at_close_calls_only(
    smol_path: Path, smol_alone: list[Completion], record_testsuite_property: Record
) -> None:
    """Cells of all sequences lie mixed there, and are summed up in the order in which they lie."""
    results = together(smol_path, kv_unified=True)
    check_close_calls(
        smol_alone, results, lambda name, value: record_testsuite_property(f"smol {name}", value)
    )


@KV_UNIFIED
def test_gemma_differs_at_close_calls_only(
    gemma_path: Path,
    gemma_alone: list[Completion],
    kv_unified: bool,
    record_testsuite_property: Record,
) -> None:
    results = together(gemma_path, kv_unified=kv_unified)
    kind = "gemma unified" if kv_unified else "gemma split"
    check_close_calls(
        gemma_alone, results, lambda name, value: record_testsuite_property(f"{kind} {name}", value)
    )
