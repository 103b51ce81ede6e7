"""What the linker was told: one exported symbol, no library beside it, the CPU's instructions."""

import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_crab import _core

EXTENSION = Path(_core.__file__)


@pytest.mark.skipif(sys.platform == "win32", reason="a DLL exports only what it is told to")
def test_only_the_init_function_is_exported(tool: Callable[[str], str]) -> None:
    options = ["-gU"] if sys.platform == "darwin" else ["-D", "--defined-only"]
    command = [tool("nm"), *options, str(EXTENSION)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [line.split()[-1].lstrip("_") for line in listed.splitlines()] == ["PyInit__core"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_nothing_of_llama_cpp_is_linked_dynamically(tool: Callable[[str], str]) -> None:
    command = [tool("readelf"), "-d", str(EXTENSION)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listed)
    assert "libc.so.6" in needed
    assert not [name for name in needed if re.search(r"llama|ggml|mtmd|gomp|python", name)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instruction sets")
def test_the_instruction_sets_of_this_cpu_are_used() -> None:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    assert flags
    names = {"avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "bmi2": "BMI2"}
    expected = {name for flag, name in names.items() if flag in flags[1].split()}
    used = set(re.findall(r"(\w+) = 1", _core.system_info()))
    assert expected <= used
