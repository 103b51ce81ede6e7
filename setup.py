"""Build llama.cpp with CMake, then the one extension ``llama_crab._core`` around it.

pyproject.toml holds the metadata; build_tools/cmake_build.py drives CMake.
"""

import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
import cmake_build  # noqa: E402
import fetch  # noqa: E402

# An abi3 wheel serves every CPython from 3.11 on; free-threaded builds have no stable ABI yet.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
BUILD_FILES = [Path(__file__), Path(cmake_build.__file__), ROOT / "third_party" / "llama_cpp.toml"]


class BuildPy(build_py):
    """Copy the package into an empty folder, so that removed modules leave no trace in a wheel."""

    def run(self) -> None:
        """Empty the folder, then copy."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "llama_crab", ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Build llama.cpp, translate the Cython, compile what changed, and always link."""

    def run(self) -> None:
        """Build everything the extension links before compiling it."""
        self.settings = cmake_build.Settings.from_environment()
        self.folder = cmake_build.build(self.settings)
        self.build_temp = f"{self.build_temp}-{self.settings.variant}"
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; an archive newer than the last link is never missed."""
        from Cython.Build import cythonize

        ext.sources = cythonize([ext], build_dir="build/cython", language_level=3)[0].sources
        source = fetch.ensure_tree()
        folders = ("include", "ggml/include", "ggml/src", "src", "common", "vendor", "tools/mtmd")
        # As system headers: their warnings are upstream's.
        flag = "/I" if cmake_build.MSVC else "-isystem"
        headers = [item for folder in folders for item in (flag, str(source / folder))]
        linkage = cmake_build.linkage(self.folder)
        ext.extra_objects = linkage.archives
        ext.extra_compile_args = [*compile_flags(self.settings), *headers]
        ext.extra_link_args = [*linkage.flags, *link_flags(self.settings)]
        ext.define_macros += [
            ("LLAMA_SUBPROCESS", None),  # llama-common's headers must agree with the library
            ("LLAMA_CRAB_LLAMA_COMMIT", f'"{fetch.read_pin().commit}"'),
            ("LLAMA_CRAB_BACKEND", f'"{self.settings.backend}"'),
        ]
        self.force = self.compiler.force = True
        self.compiler.compile = partial(compile_changed, self.compiler, self.compiler.compile)
        print(f"building {ext.name} (about a minute)", flush=True)
        super().build_extension(ext)


def compile_changed(
    compiler: Any, compile_all: Callable[..., list[str]], sources: list[str], **options: Any
) -> list[str]:
    """Compile the sources whose object is older than anything it was made from, in parallel."""

    def compile_one(source: str) -> list[str]:
        (target,) = compiler.object_filenames([source], output_dir=options["output_dir"])
        record = Path(target + ".d")
        if is_current(Path(target), record):
            return [target]
        print(f"  compiling {source}", flush=True)
        extra = [] if cmake_build.MSVC else ["-MD", "-MF", str(record)]
        postargs = [*options["extra_postargs"], *extra]
        record.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        return compile_all([source], **{**options, "extra_postargs": postargs})

    with ThreadPoolExecutor(cmake_build.cpu_count()) as pool:
        return [target for targets in pool.map(compile_one, sources) for target in targets]


def is_current(target: Path, record: Path) -> bool:
    """Tell whether an object is newer than all files its compiler recorded for it."""
    if not (target.is_file() and record.is_file()):
        return False
    listed = record.read_text(encoding="utf-8").replace("\\\n", " ").partition(": ")[2]
    made_from = [
        Path(re.sub(r"\\(.)", r"\1", name)) for name in re.split(r"(?<!\\)\s+", listed.strip())
    ]
    made = target.stat().st_mtime
    return all(file.is_file() and file.stat().st_mtime <= made for file in made_from + BUILD_FILES)


def compile_flags(settings: cmake_build.Settings) -> list[str]:
    """Return compiler flags; the instruction set is the compiler's baseline on purpose."""
    if cmake_build.MSVC:
        return ["/std:c++17", "/O2", "/utf-8", "/EHsc", "/bigobj"]
    flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    if settings.sanitize:
        flags += [f"-fsanitize={settings.sanitize}", "-fno-omit-frame-pointer"]
    return [*flags, "-g" if settings.debug or settings.sanitize else "-g0"]


def link_flags(settings: cmake_build.Settings) -> list[str]:
    """Return linker flags that export PyInit__core alone.

    Two copies of llama.cpp may live in one process; none of its symbols may be visible.
    """
    if cmake_build.MSVC:
        return []
    keep = settings.debug or settings.sanitize
    sanitizer = [f"-fsanitize={settings.sanitize}"] if settings.sanitize else []
    if sys.platform == "darwin":
        exported = ["-Wl,-exported_symbol,_PyInit__core", "-Wl,-dead_strip"]
        return [*exported, *([] if keep else ["-Wl,-x"]), *sanitizer]
    script = ROOT / "build_tools" / "exports.map"
    exported = [f"-Wl,--version-script={script}", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
    return ["-pthread", "-lrt", *exported, *([] if keep else ["-s"]), *sanitizer]


fetch.ensure_tree()
setup(
    ext_modules=[
        Extension(
            "llama_crab._core",
            ["llama_crab/_core.pyx", *sorted(map(str, Path("llama_crab/native").glob("*.cpp")))],
            include_dirs=["llama_crab"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if ABI3 else [],
            py_limited_api=ABI3,
            language="c++",
        )
    ],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
