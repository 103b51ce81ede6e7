"""Native llama.cpp beside us, and what a record says about the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import llama_crab
from llama_crab import _core
from llama_crab.tuning.probe import default_n_threads

ROOT = Path(__file__).resolve().parent.parent
N_THREADS = default_n_threads()
GPU_LAYERS = 99 if _core.supports_gpu_offload() else 0
# A run of a GPU is over in milliseconds: its first repetition still warms up.
REPETITIONS = 5 if GPU_LAYERS else 1


class Native:
    """llama.cpp's own programs, built by ``make native`` from the same tree and flags."""

    def __init__(self) -> None:
        override = os.environ.get("LLAMA_CRAB_NATIVE_BIN")
        found = [Path(override)] if override else sorted((ROOT / "build").glob("llama.cpp-*/bin"))
        folders = [path for path in found if (path / "llama-bench").exists()]
        if not folders:
            pytest.exit("llama-bench is missing: run `make native`", returncode=2)
        self.folder = folders[0]

    def bench(
        self,
        model: Path,
        *,
        n_prompt: int = 0,
        n_gen: int = 0,
        depth: int = 0,
        flash_attn: bool = True,
        repetitions: int = REPETITIONS,
    ) -> float:
        """Return llama-bench's tokens per second (median of its repetitions)."""
        command = [
            str(self.folder / "llama-bench"),
            "-m",
            str(model),
            "-p",
            str(n_prompt),
            "-n",
            str(n_gen),
            "-d",
            str(depth),
            "-t",
            str(N_THREADS),
            "-fa",
            str(int(flash_attn)),
            "-r",
            str(repetitions),
            "-o",
            "json",
            "-ngl",
            str(GPU_LAYERS),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        (row,) = json.loads(done.stdout)
        return statistics.median(row["samples_ts"])


def machine() -> dict[str, Any]:
    """Return where and from what the figures come."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("LLAMA_CRAB_COMMIT", commit),
        "version": llama_crab.__version__,
        "llama_cpp": _core.build_commit(),
        "python": platform.python_version(),
        "system_info": _core.system_info(),
        "devices": [
            {"name": d.name, "description": d.description, "memory_total": d.memory_total}
            for d in _core.devices()
        ],
        "n_threads": N_THREADS,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the extremes."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }
