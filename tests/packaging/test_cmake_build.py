"""How settings become CMake arguments, and CMake's link line becomes ours."""

import os
import stat
import sys
from pathlib import Path

import backend
import cmake_build
import pytest
from cmake_build import BuildError, Settings


def test_local_build_is_native_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    monkeypatch.delenv("LLAMA_CRAB_ISA", raising=False)
    assert Settings.from_environment().isa_flags() == ["-DGGML_NATIVE=ON"]


def test_each_level_sets_every_switch() -> None:
    levels = {isa: Settings(isa=isa).isa_flags() for isa in cmake_build.X86_LEVELS}
    names = {isa: [flag.partition("=")[0] for flag in flags] for isa, flags in levels.items()}
    assert all(listed == names["x86-64"] for listed in names.values())
    assert "-DGGML_AVX2=ON" in levels["x86-64-v3"]
    assert "-DGGML_SSE42=ON" in levels["x86-64-v3"]
    assert "-DGGML_AVX512=OFF" in levels["x86-64-v3"]
    assert "-DGGML_AVX2=OFF" in levels["x86-64-v2"]
    arm = Settings(isa="armv8.2-a+dotprod").isa_flags()
    assert arm == ["-DGGML_NATIVE=OFF", "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LLAMA_CRAB_BUILD_BACKEND", "gpu"), ("LLAMA_CRAB_SANITIZE", "leaks")],
)
def test_unknown_choices_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BuildError, match=value):
        Settings.from_environment()
    with pytest.raises(BuildError, match="pentium"):
        Settings(isa="pentium").isa_flags()


def test_builds_that_differ_do_not_share_a_folder() -> None:
    settings = [
        Settings(),
        Settings(backend="cuda"),
        Settings(isa="x86-64-v3"),
        Settings(sanitize="address"),
        Settings(backend="cuda", isa="armv8.2-a+dotprod", sanitize="address"),
    ]
    assert len({setting.variant for setting in settings}) == len(settings)
    assert Settings().variant == "cpu"


def test_programs_are_built_where_the_tree_has_them(tmp_path: Path) -> None:
    for folder in ("examples", "pocs"):
        assert cmake_build._where_present("X", tmp_path, "examples", "pocs") == "-DX=OFF"
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "CMakeLists.txt").touch()
    assert cmake_build._where_present("X", tmp_path, "examples", "pocs") == "-DX=ON"


def test_config_setting_selects_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def build(*_: object) -> str:
        seen.append(os.environ.get("LLAMA_CRAB_BUILD_BACKEND"))
        return "a.whl"

    monkeypatch.setenv("LLAMA_CRAB_BUILD_BACKEND", "cpu")
    monkeypatch.setattr(backend.build_meta, "build_wheel", build)
    monkeypatch.setattr(backend.build_meta, "build_editable", build)
    backend.build_wheel("there", {"backend": "cuda"})
    backend.build_editable("there", {"backend": "vulkan"})
    assert seen == ["cuda", "vulkan"]
    with pytest.raises(ValueError, match="choose one of cpu, cuda"):
        backend.build_wheel("there", {"backend": "gpu"})
    with pytest.raises(ValueError, match="backnd"):
        backend.build_wheel("there", {"backnd": "cuda"})
    assert len(seen) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Ninja is not used there")
def test_link_line_is_read_from_cmake(tmp_path: Path) -> None:
    (tmp_path / "build.ninja").write_text(
        "build bin/llama-bench: LINK x.o\n"
        "  LINK_LIBRARIES = wrong/libwrong.a\n"
        "build bin/llama-mtmd-cli: CXX_EXECUTABLE_LINKER y.o | src/libllama.a\n"
        "  FLAGS = -O3\n"
        "  LINK_LIBRARIES = -Wl,-rpath,/opt/cuda/lib64::  tools/mtmd/libmtmd.a  src/libllama.a  "
        "-ldl  /opt/cuda/lib64/libcudart_static.a  -framework Metal\n"
        "  OBJECT_DIR = z\n"
    )
    linkage = cmake_build.linkage(tmp_path)
    expected = [str(tmp_path / "tools/mtmd/libmtmd.a"), str(tmp_path / "src/libllama.a")]
    assert linkage.archives == expected
    assert linkage.flags == [
        "-Wl,-rpath,/opt/cuda/lib64",
        "-ldl",
        "/opt/cuda/lib64/libcudart_static.a",
        "-framework",
        "Metal",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="writes a shell script")
def test_a_tool_that_fails_or_is_too_old_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {"broken": "exit 1", "old": "echo sometool 3.5.1", "good": "echo sometool 3.25.1"}
    for name, script in scripts.items():
        path = tmp_path / name / "sometool"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in scripts))
    assert cmake_build.find_tool("sometool", (3, 18)) == str(tmp_path / "good" / "sometool")
    assert cmake_build.find_tool("sometool", (4,)) is None
