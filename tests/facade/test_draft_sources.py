"""Drafts that do not come from the text itself: a second model, n-grams of earlier answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_crab import DraftModelDecoding, Llama, PromptLookupDecoding, SamplerChain
from llama_crab.errors import DraftModelError, ModelNotFoundError

GREEDY = SamplerChain().greedy()
STORY = "Once upon a time, in a village by the sea, a clockmaker"
OTHER = "The list of planets: Mercury, Venus,"


def test_a_model_as_its_own_draft_is_always_right(smol_path: Path) -> None:
    with Llama(smol_path, n_ctx=512, n_threads=1, flash_attn_type=True) as llama:
        expected = [llama.create_completion(p, 40, sampler=GREEDY).tokens for p in (STORY, OTHER)]
    drafts = DraftModelDecoding(smol_path, num_pred_tokens=4, adaptive=False)
    with Llama(
        smol_path, n_ctx=1024, n_seq_max=2, n_threads=1, flash_attn_type=True, speculative=drafts
    ) as llama:
        found = [llama.create_completion(p, 40, sampler=GREEDY) for p in (STORY, OTHER)]
        assert [completion.tokens for completion in found] == expected
        for completion in found:
            timings = completion.timings
            assert timings.draft_n > 20
            assert timings.draft_accepted_n >= 0.95 * timings.draft_n
        off = llama.create_completion(STORY, 10, sampler=GREEDY, speculative=None)
        assert off.timings.draft_n == 0
        together = list(llama.map([STORY, OTHER] * 2, 24, sampler=GREEDY))
        assert sum(completion.timings.draft_accepted_n for completion in together) > 20


def test_models_that_cannot_draft_are_refused(
    smol_path: Path, gemma_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(DraftModelError, match="vocabulary"):
        Llama(smol_path, n_ctx=256, speculative=DraftModelDecoding(gemma_path))
    with pytest.raises(DraftModelError):
        Llama(smol_path, n_ctx=256, speculative=DraftModelDecoding())  # it has no such heads
    with pytest.raises(ModelNotFoundError):
        Llama(smol_path, n_ctx=256, speculative=DraftModelDecoding(tmp_path / "none.gguf"))


def test_what_was_answered_is_drafted_later(
    smol_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "answers.ngrams"
    # Of the text itself nothing is found: its n-grams would have to be longer than it is.
    drafts = PromptLookupDecoding(16, 4, min_ngram=16, adaptive=False, cache=path)

    def answer() -> tuple[tuple[int, ...], int]:
        with Llama(smol_path, n_ctx=512, n_threads=1, speculative=drafts) as llama:
            found = llama.create_completion(STORY, 32, sampler=GREEDY)
            return found.tokens, found.timings.draft_accepted_n

    tokens, n_accepted = answer()
    assert path.exists()
    assert n_accepted == 0
    again, n_accepted = answer()
    assert again == tokens
    assert n_accepted > 10
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        last, n_accepted = answer()
    assert (last, n_accepted) == (tokens, 0)
    assert "drafts begin anew" in caplog.text


def test_the_page_runs(smol_path: Path, run_page: Callable[..., list[str]]) -> None:
    lines = run_page("speculative.md", 2, '"model.gguf"', repr(str(smol_path)))
    n_drafted, n_accepted = map(int, lines[0].split())
    assert n_drafted >= n_accepted
    acceptance, gain = map(float, lines[1].split())
    assert 0.0 <= acceptance <= 1.0 < 10 * gain
