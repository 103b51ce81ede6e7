"""Drive llama.cpp's own CMake into a build folder that outlives each ``pip install``.

``python build_tools/cmake_build.py [TARGET ...]`` builds the libraries, or the named targets
(llama-bench, llama-server, ...) from the same folder with the same flags.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "third_party"))
import fetch  # noqa: E402

LIBRARIES = ("llama", "llama-common", "mtmd")
BACKENDS = {
    "cpu": [],
    "cuda": ["-DGGML_CUDA=ON"],
    "vulkan": ["-DGGML_VULKAN=ON"],
    "rocm": ["-DGGML_HIP=ON"],
    "metal": ["-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"],
}
# x86-64 psABI levels in ggml's switches; each level has those of the levels before it.
X86_LEVELS = {
    "x86-64": [],
    "x86-64-v2": ["SSE42"],
    "x86-64-v3": ["AVX", "AVX2", "BMI2", "FMA", "F16C"],
    "x86-64-v4": ["AVX512"],
}
MSVC = sys.platform == "win32"


class BuildError(RuntimeError):
    """Report why llama.cpp could not be built."""


@dataclass(frozen=True)
class Settings:
    """Say what to build; ``from_environment`` reads the variables of CONTRIBUTING.md."""

    backend: str = "cpu"
    isa: str = "native"
    sanitize: str = ""
    debug: bool = False
    cmake_args: tuple[str, ...] = field(default=())

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the settings.

        Raises BuildError for an unknown backend or sanitizer.
        """
        apple_gpu = sys.platform == "darwin" and platform.machine() == "arm64"
        backend = os.environ.get("LLAMA_CRAB_BUILD_BACKEND") or ("metal" if apple_gpu else "cpu")
        if backend not in BACKENDS:
            raise BuildError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
        sanitize = os.environ.get("LLAMA_CRAB_SANITIZE", "")
        if sanitize not in ("", "address", "undefined"):
            raise BuildError(f"LLAMA_CRAB_SANITIZE={sanitize!r}; choose address or undefined")
        return cls(
            backend=backend,
            isa=os.environ.get("LLAMA_CRAB_ISA") or "native",
            sanitize=sanitize,
            debug=bool(os.environ.get("LLAMA_CRAB_DEBUG")),
            cmake_args=tuple(shlex.split(os.environ.get("CMAKE_ARGS", ""))),
        )

    @property
    def variant(self) -> str:
        """Name the build folder: one for each backend, instruction set and sanitizer."""
        isa = "" if self.isa == "native" else re.sub(r"[^\w.+-]", "_", self.isa)
        return "-".join(part for part in (self.backend, isa, self.sanitize) if part)

    def isa_flags(self) -> list[str]:
        """Return ggml's instruction set switches, every one explicit.

        ggml's own defaults drop AVX2 silently when SOURCE_DATE_EPOCH is set.
        """
        if self.isa == "native":
            return ["-DGGML_NATIVE=ON"]
        if self.isa.startswith("armv"):
            return ["-DGGML_NATIVE=OFF", f"-DGGML_CPU_ARM_ARCH={self.isa}"]
        if self.isa not in X86_LEVELS:
            known = ", ".join(["native", *X86_LEVELS])
            raise BuildError(f"LLAMA_CRAB_ISA={self.isa!r}; choose from {known} or armv...")
        last = list(X86_LEVELS).index(self.isa)
        on = {name for level in list(X86_LEVELS)[: last + 1] for name in X86_LEVELS[level]}
        switches = [name for names in X86_LEVELS.values() for name in names]
        return [
            "-DGGML_NATIVE=OFF",
            *(f"-DGGML_{name}={'ON' if name in on else 'OFF'}" for name in switches),
        ]


@dataclass(frozen=True)
class Linkage:
    """List what the extension links, in link order."""

    archives: list[str]
    flags: list[str]


def find_tool(name: str, minimum: tuple[int, ...] = (0,)) -> str | None:
    """Return a working program of that name: on the PATH first, else this Python's own.

    A program is tried before it is chosen: a launcher from another virtual environment may be
    found on the PATH of an isolated build and fail there.
    """
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), sysconfig.get_path("scripts")]
    for folder in folders:
        if path := shutil.which(name, path=folder):
            done = subprocess.run([path, "--version"], check=False, capture_output=True, text=True)
            version = re.search(r"\d+(?:\.\d+)+", done.stdout)
            works = done.returncode == 0 and version
            if works and tuple(map(int, works[0].split("."))) >= minimum:
                return path
    return None


def requirements() -> list[str]:
    """Return the packages a build needs besides setuptools and Cython, on this machine, now."""
    wanted = []
    if not find_tool("cmake", (3, 18)):
        wanted.append("cmake>=3.18")
    if not MSVC and not find_tool("ninja"):
        wanted.append("ninja")
    return wanted if fetch.is_in_place() else [*wanted, "pip"]


def build(settings: Settings, targets: tuple[str, ...] = LIBRARIES) -> Path:
    """Configure if anything changed, build the targets, and return the build folder."""
    source = fetch.ensure_tree()
    base = Path(os.environ.get("LLAMA_CRAB_BUILD_DIR") or ROOT / "build")
    folder = base.resolve() / f"llama.cpp-{settings.variant}"
    cmake = find_tool("cmake", (3, 18))
    ninja = None if MSVC else find_tool("ninja")
    if not cmake or not (ninja or MSVC):
        raise BuildError("cmake >= 3.18 and ninja are needed: pip install cmake ninja")
    ccache = shutil.which("ccache") is not None
    environment = dict(os.environ, NINJA_STATUS="[%f/%t %es] ")
    environment["GIT_CEILING_DIRECTORIES"] = str(source.parent)
    if ccache:
        # Objects then hit the cache from any clone, wherever it lies.
        environment.setdefault("CCACHE_BASEDIR", os.path.commonpath([source, folder]))
        environment.setdefault("CCACHE_NOHASHDIR", "1")

    arguments = _arguments(settings, cmake, ninja, ccache, source, folder)
    stamp = folder / "llama_crab.args"
    text = "\n".join(arguments)
    configured = (folder / "CMakeCache.txt").is_file()
    if not configured or not stamp.is_file() or stamp.read_text(encoding="utf-8") != text:
        print(f"configuring llama.cpp ({settings.variant}) in {folder}", flush=True)
        if stamp.is_file():
            # CMake keeps the values of options that are no longer given.
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
        _run(arguments, environment, folder)
        stamp.write_text(text, encoding="utf-8")
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(cpu_count())
    print(f"building {', '.join(targets)} (minutes the first time)", flush=True)
    command = [cmake, "--build", str(folder), "--config", "Release", "--parallel", jobs]
    _run([*command, "--target", *targets], environment, folder)
    return folder


def _arguments(
    settings: Settings, cmake: str, ninja: str | None, ccache: bool, source: Path, folder: Path
) -> list[str]:
    arguments = [cmake, "-S", str(source), "-B", str(folder)]
    if ninja:
        # Given at every configure: an isolated build's ninja lives in a folder that is gone later.
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    arguments += [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DCMAKE_POSITION_INDEPENDENT_CODE=ON",
        "-DCMAKE_C_VISIBILITY_PRESET=hidden",
        "-DCMAKE_CXX_VISIBILITY_PRESET=hidden",
        "-DCMAKE_VISIBILITY_INLINES_HIDDEN=ON",
        "-DGGML_OPENMP=OFF",
        "-DGGML_CCACHE=OFF",  # set below; ggml's own search finds it outside the PATH as well
        *settings.isa_flags(),
        "-DLLAMA_BUILD_COMMON=ON",
        "-DLLAMA_BUILD_TOOLS=ON",
        _where_present("LLAMA_BUILD_SERVER", source, "tools/server", "tools/cli", "tools/ui"),
        _where_present("LLAMA_BUILD_EXAMPLES", source, "examples", "pocs"),
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_NUMBER=0",
        f"-DLLAMA_BUILD_COMMIT={fetch.read_pin().commit}",
        "-DGIT_EXE=",  # else ggml names the commit of the repository around the tree, ours
    ]
    if ccache:
        languages = ["C", "CXX", *{"cuda": ["CUDA"], "rocm": ["HIP"]}.get(settings.backend, [])]
        arguments += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in languages]
    if sys.platform == "darwin" and settings.backend == "cpu":
        arguments.append("-DGGML_METAL=OFF")
    if settings.sanitize:
        kind = settings.sanitize.upper()
        arguments += [f"-DGGML_SANITIZE_{kind}=ON", f"-DLLAMA_SANITIZE_{kind}=ON"]
    return [*arguments, *BACKENDS[settings.backend], *settings.cmake_args]


def _where_present(option: str, source: Path, *folders: str) -> str:
    """Return the switch of programs whose folders a pruned tree lacks."""
    present = all((source / folder / "CMakeLists.txt").is_file() for folder in folders)
    return f"-D{option}={'ON' if present else 'OFF'}"


def linkage(folder: Path) -> Linkage:
    """Return what to link, from the link line CMake wrote for a program of the same libraries.

    The line names whatever the backend needs: CUDA's libraries, Vulkan's loader, frameworks.
    """
    if MSVC:
        archives = [str(path) for path in folder.rglob("Release/*.lib")]
        names = ("advapi32", "ws2_32", "crypt32", "bcrypt", "shell32", "user32")
        return Linkage(sorted(archives), [f"{name}.lib" for name in names])
    rules = (folder / "build.ninja").read_text(encoding="utf-8")
    line = re.search(r"^build bin/llama-mtmd-cli:.*?^  LINK_LIBRARIES = (.*?)$", rules, re.M | re.S)
    if not line:
        raise BuildError(f"{folder / 'build.ninja'} has no link line for llama-mtmd-cli")
    archives, flags = [], []
    for item in shlex.split(line[1].replace("$ ", " ").replace("$:", ":")):
        if item.endswith(".a") and not Path(item).is_absolute():
            archives.append(str(folder / item))
        else:
            # CMake pads the run path with colons; an empty entry would mean the current folder.
            flags.append(item.rstrip(":") if item.startswith("-Wl,-rpath") else item)
    return Linkage(archives, flags)


def cpu_count() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run a command, show its progress lines, and keep the rest for the log and for errors."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "llama_crab.log"
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        last: deque[str] = deque(maxlen=80)
        for line in process.stdout or ():
            file.write(line)
            last.append(line)
            if MSVC or line.startswith("["):
                print(line.rstrip(), flush=True)
    if process.returncode:
        print("".join(last), flush=True)
        raise BuildError(f"failed (all output is in {log}): {shlex.join(command)}")


def _main(arguments: list[str]) -> None:
    if arguments == ["--requirements"]:
        print(*requirements())
    else:
        print(build(Settings.from_environment(), tuple(arguments) or LIBRARIES))


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except (BuildError, fetch.FetchError) as error:
        sys.exit(f"error: {error}")
