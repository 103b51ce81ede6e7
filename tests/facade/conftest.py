"""Models opened by the facade, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_crab import Llama


@pytest.fixture(scope="session")
def smol_llama(smol_path: Path) -> Iterator[Llama]:
    """Return SmolLM2 with 4 sequences of 1024; its greedy text does not depend on the batch."""
    with Llama(
        smol_path, n_ctx=4096, n_ubatch=64, n_seq_max=4, n_outputs_max=64, flash_attn_type=True
    ) as llama:
        yield llama


@pytest.fixture(scope="session")
def gemma_llama(gemma_path: Path) -> Iterator[Llama]:
    with Llama(gemma_path, n_ctx=1024, n_ubatch=64, n_outputs_max=16) as llama:
        yield llama


@pytest.fixture
def tiny_llama(tiny_path: Path) -> Iterator[Llama]:
    with Llama(tiny_path, n_ctx=256, n_ubatch=16, n_batch=64, n_threads=1) as llama:
        yield llama


@pytest.fixture
def forced() -> Callable[..., Any]:
    """Return what makes a logits processor that writes a text, whatever a grammar says.

    Then the answer ends, or with ``end=False`` the model goes on.
    """

    def made(llama: Llama, text: str, *, end: bool = True) -> Callable[[Any, Any], None]:
        ids = llama._vocab.tokenize(text, False, True)
        left = iter([*ids, llama._vocab.eog_tokens[0]] if end else ids)

        def force(tokens: Any, logits: Any) -> None:
            token = next(left, None)
            if token is not None:
                logits[:] = float("-inf")
                logits[token] = 0.0

        return force

    return made
