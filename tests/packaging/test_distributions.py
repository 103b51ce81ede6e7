"""What the wheel and the sdist carry, and what they must not."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import fetch
import pytest


def test_wheel_has_one_extension_and_no_library(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    binaries = [name for name in names if re.search(r"\.(so|pyd|dylib|dll|a|lib)(\.|$)", name)]
    assert [PurePosixPath(name).name.split(".")[0] for name in binaries] == ["_core"]
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    assert ("-cp311-abi3-" in wheel.name) is not free_threaded


def test_wheel_has_every_module_types_and_licences_but_no_source(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = root / "llama_crab"
    modules = {path.relative_to(root).as_posix() for path in package.rglob("*.py")}
    modules.add("pytest_llama_crab.py")
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"llama_crab/_core.pyi", "llama_crab/py.typed"} <= names
    assert not [name for name in names if re.search(r"\.(pyx|pxd|pxi|c|cpp|h|inc)$", name)]
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert {"LICENSE", "third_party/licenses/llama.cpp.txt"} <= licences


def test_sdist_carries_a_pruned_llama_cpp(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    tree = "third_party/llama.cpp/"
    assert {"LICENSE", f"{tree}LICENSE", f"{tree}CMakeLists.txt", f"{tree}llama_crab.pin"} <= names
    assert {"llama_crab/_core.pyx", "build_tools/backend.py", "third_party/fetch.py"} <= names
    top = {name.removeprefix(tree).partition("/")[0] for name in names if name.startswith(tree)}
    assert not top & {"models", "docs", "media", "benches", "tests", "examples", "gguf-py", ".git"}
    assert not [
        name for name in names if name.startswith((f"{tree}tools/server", f"{tree}tools/ui"))
    ]
    assert not [name for name in names if name.endswith((".so", ".gguf", ".o", ".a"))]
    assert sdist.stat().st_size < 8_000_000


@pytest.mark.full
def test_wheel_builds_from_the_sdist_without_network(sdist: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "-w", str(tmp_path), str(sdist)]
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    own = {"LLAMA_CRAB_CACHE": str(tmp_path / "empty-cache")}
    done = subprocess.run(
        command,
        env={**os.environ, **nowhere, **own},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from llama_crab import _core; print(_core.__file__, _core.system_info())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(site))


def test_carried_licences_are_those_of_the_tree(root: Path) -> None:
    tree = fetch.ensure_tree()
    origins = {
        "llama.cpp": "LICENSE",
        "nlohmann-json": "licenses/LICENSE-jsonhpp",
        "cpp-httplib": "vendor/cpp-httplib/LICENSE",
        "xxhash": "vendor/hash/xxhash/LICENSE",
        "sha256": "vendor/hash/sha256/LICENSE",
        "rotate-bits": "vendor/hash/rotate-bits/LICENSE.md",
    }
    carried = {path.stem: path.read_text() for path in (root / "third_party/licenses").iterdir()}
    assert carried == {name: (tree / origin).read_text() for name, origin in origins.items()}
