"""Models opened through llama-cpp-python's face."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_crab.compat.llama_cpp import Llama, notices

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def smol_cpp(smol_path: Path) -> Iterator[Llama]:
    llama = Llama(str(smol_path), n_ctx=512, verbose=False)
    yield llama
    llama.close()


@pytest.fixture
def tiny_cpp(tiny_path: Path) -> Iterator[Llama]:
    llama = Llama(str(tiny_path), n_ctx=256, n_threads=1, verbose=False)
    yield llama
    llama.close()


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test see the warnings that a process gets once."""
    monkeypatch.setattr(notices, "_told", set())
