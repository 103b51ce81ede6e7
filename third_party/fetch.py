"""Put the pinned llama.cpp tree at third_party/llama.cpp.

Run as a script, or import it and call ``ensure_tree()``. Standard library only.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE / "llama.cpp"
STAMP = "llama_crab.pin"


class FetchError(RuntimeError):
    """Report why the llama.cpp tree could not be put in place."""


@dataclass(frozen=True)
class Pin:
    """Name one exact llama.cpp tree and the source package that carries it."""

    commit: str
    ggml: str
    package: str
    version: str
    sha256: str
    folder: str

    @property
    def stamp(self) -> str:
        """Return the text that marks a tree unpacked from this pin."""
        return f"{self.commit} {self.sha256}\n"


def read_pin(path: Path = HERE / "llama_cpp.toml") -> Pin:
    """Read the pin file."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return Pin(**data["llama_cpp"], **data["source"])


def cache_dir() -> Path:
    """Return the user's cache folder, the one llama_crab keeps its models in."""
    if own := os.environ.get("LLAMA_CRAB_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        base = Path(xdg)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif local := os.environ.get("LOCALAPPDATA"):
        base = Path(local)
    else:
        base = Path.home() / ".cache"
    return base / "llama-crab"


def ensure_tree(*, full: bool = False, tree: Path = TREE, pin: Pin | None = None) -> Path:
    """Return a llama.cpp tree, fetching the pinned one when it is not in place.

    ``LLAMA_CPP_DIR`` names a tree of the user's own, taken as it is. The tree inside an sdist is
    pruned and suffices for a build; ``full=True`` asks for upstream's models and tests as well.

    Raises FetchError when the source package cannot be had or is not the pinned one.
    """
    if own := os.environ.get("LLAMA_CPP_DIR"):
        path = Path(own).expanduser().resolve()
        if not (path / "include" / "llama.h").is_file():
            raise FetchError(f"LLAMA_CPP_DIR={own} is not a llama.cpp tree (no include/llama.h)")
        return path
    pin = pin or read_pin()
    if _in_place(tree, pin, full):
        return tree
    if tree.exists() and not (tree / STAMP).is_file() and any(tree.iterdir()):
        raise FetchError(
            f"{tree} exists but was not put there by {Path(__file__).name}. Remove it, or build "
            f"from it as it is with LLAMA_CPP_DIR={tree}"
        )
    _unpack(_archive(pin), tree, pin, full)
    return tree


def is_in_place(tree: Path = TREE) -> bool:
    """Tell whether ``ensure_tree()`` would return without fetching anything."""
    return "LLAMA_CPP_DIR" in os.environ or _in_place(tree, read_pin(), full=False)


def _in_place(tree: Path, pin: Pin, full: bool) -> bool:
    try:
        stamp = (tree / STAMP).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stamp == pin.stamp and (not full or (tree / "models").is_dir())


def _archive(pin: Pin) -> Path:
    """Return the verified source package, from the cache or downloaded into it."""
    folder = cache_dir() / "sources" / pin.sha256
    for path in folder.glob("*.tar.gz"):
        if _sha256(path) == pin.sha256:
            return path
        print(f"{path} is damaged; fetching it again", file=sys.stderr)
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching llama.cpp {pin.commit} ({pin.package} {pin.version}, source)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        downloaded = _download(pin, Path(temporary))
        if (found := _sha256(downloaded)) != pin.sha256:
            raise FetchError(f"{downloaded.name}: sha256 is {found}, the pin says {pin.sha256}")
        return downloaded.replace(folder / downloaded.name)


def _download(pin: Pin, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", pin.package, "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise FetchError(
            f"could not download the source package {pin.package}=={pin.version}; pip said:\n"
            f"{done.stdout.strip() or '(nothing)'}\n"
            "This needs pip and a reachable package index. Without a network, either set "
            "LLAMA_CPP_DIR to a llama.cpp tree you have, or put the package's .tar.gz into "
            f"{folder.parent}"
        )
    return archives[0]


def _unpack(archive: Path, tree: Path, pin: Pin, full: bool) -> None:
    """Unpack the tree beside its place and rename it in, so that it is whole or absent."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".unpack-") as temporary:
        fresh = Path(temporary) / "tree"
        fresh.mkdir()
        with tarfile.open(archive) as tar:
            _extract(tar, f"{pin.folder}/", fresh)
        if not (fresh / "include" / "llama.h").is_file():
            raise FetchError(f"{archive} holds no llama.cpp tree in {pin.folder}")
        # A stray submodule pointer: CMake would follow it out of the tree.
        (fresh / ".git").unlink(missing_ok=True)
        (fresh / STAMP).write_text(pin.stamp, encoding="utf-8")
        if _in_place(tree, pin, full):  # another build was faster
            return
        if tree.exists():
            tree.rename(Path(temporary) / "old")
        fresh.rename(tree)


def _extract(tar: tarfile.TarFile, folder: str, target: Path) -> None:
    """Extract what lies in ``<top>/<folder>``; modification times are kept for ninja's sake."""
    members = []
    for member in tar:
        path = member.name.partition("/")[2]
        if path.startswith(folder):
            member.name = path.removeprefix(folder)
            members.append(member)
    if hasattr(tarfile, "data_filter"):
        tar.extraction_filter = tarfile.data_filter
    tar.extractall(target, members)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        print(ensure_tree(full=True))
    except FetchError as error:
        sys.exit(f"error: {error}")
