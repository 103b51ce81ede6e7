"""Another quantisation of a model of the tests, made once and kept beside it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from side_by_side import N_THREADS, Native


def requantised(native: Native, model: Path, kind: str) -> Path:
    """Return `model` as llama-quantize writes it in another type, for its speed.

    Its text is no better than the original's.
    """
    program = native.folder / "llama-quantize"
    target = model.with_name(f"{model.name.split('.')[0]}.{kind}.gguf")
    marker = target.with_name(f".{target.name}.made")
    if _made(marker, model, target):
        return target
    if not program.exists():
        pytest.exit("llama-quantize is missing: run `make native-speculation`", returncode=2)
    with tempfile.TemporaryDirectory(prefix=".quantise-", dir=target.parent) as folder:
        whole = Path(folder, target.name)
        command = [program, "--allow-requantize", model, whole, kind, str(N_THREADS)]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(whole, target)
    marker.write_text(json.dumps(_stamp(model, target)))
    return target


def _stamp(*paths: Path) -> list[list[int]]:
    return [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths)]


def _made(marker: Path, *paths: Path) -> bool:
    try:
        found: bool = json.loads(marker.read_text()) == _stamp(*paths)
    except (OSError, ValueError):
        return False
    return found
