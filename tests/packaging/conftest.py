"""Give the packaging tests the build modules, the tools they need, and one wheel and sdist."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "build_tools"), str(ROOT / "third_party")]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Return a finder of programs: what .ci/packages promises must be there in CI."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None and os.environ.get("CI"):
            pytest.fail(f"{name} is missing; .ci/packages should have brought it")
        if path is None:
            pytest.skip(f"{name} is not installed (see .ci/packages)")
        return path

    return find


def _build(command: list[str], folder: Path, pattern: str) -> Path:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (built,) = folder.glob(pattern)
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as `pip wheel .` does, from the build folders already filled."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    return _build(command, folder, "*.whl")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return _build(["setup.py", "-q", "sdist", "-d", str(folder)], folder, "*.tar.gz")
