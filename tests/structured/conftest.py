"""Vocabularies for walks through grammars; puts this folder on the path for `walks`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_crab import Llama, _core

sys.path.insert(0, str(Path(__file__).resolve().parent))

from walks import Walker


@pytest.fixture(scope="session")
def walker(tiny_swa_path: Path) -> Iterator[Walker]:
    """Return a walker over a vocabulary of 558 tokens: every byte, 300 merges."""
    with _core.Model(tiny_swa_path) as model:
        yield Walker(model)


@pytest.fixture(scope="session")
def smol_llama(smol_path: Path) -> Iterator[Llama]:
    with Llama(smol_path, n_ctx=2048, n_ubatch=64, n_seq_max=2, flash_attn_type=True) as llama:
        yield llama
