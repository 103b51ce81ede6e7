"""The programs that `make native` built from the same tree with the same flags."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FindProgram = Callable[[str], Path]


@pytest.fixture(scope="session")
def find_program() -> FindProgram:
    """Return a function from a program's name to its path; it skips, in CI fails, without one."""
    override = os.environ.get("LLAMA_CRAB_NATIVE_BIN")
    folders = [Path(override)] if override else sorted((ROOT / "build").glob("llama.cpp-*/bin"))

    def find(name: str) -> Path:
        for folder in folders:
            found = shutil.which(name, path=folder)
            if found is not None:
                return Path(found)
        message = f"{name} is missing: run `make native`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return find
