"""Models with the shapes of large ones and no weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def large_gguf() -> ModuleType:
    """Return the module that writes them."""
    path = Path(__file__).parents[1] / "large_gguf.py"
    spec = importlib.util.spec_from_file_location("llama_crab_tests_large_gguf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def large_path(
    large_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path
) -> Callable[[str], Path]:
    """Return a function from the name of a shape (7B, 70B, 8x7B) to a file of that shape."""

    def path_of(name: str) -> Path:
        path = tiny_folder / f"{name}.gguf"
        if not path.exists():
            vocab = vocab_folder / "ggml-vocab-llama-spm.gguf"
            large_gguf.write(path, large_gguf.SHAPES[name], vocab)
        return path

    return path_of
