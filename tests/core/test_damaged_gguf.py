"""A damaged GGUF gives an exception or works; it never ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("damaged_gguf_worker.py")
N_ORDINARY = 2000
N_FULL = 20000


@dataclass
class Outcomes:
    """How a range of mutations ended."""

    counts: Counter[str] = field(default_factory=Counter)
    deaths: list[str] = field(default_factory=list)


def run_range(folder: Path, first: int, last: int, sources: list[Path]) -> Outcomes:
    """Run the mutations in worker processes; a worker that dies is replaced after its culprit."""
    found = Outcomes()
    while first < last:
        command = [sys.executable, str(WORKER), str(folder), str(first), str(last)]
        done = subprocess.run(
            [*command, *map(str, sources)],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
        )
        lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
        found.counts.update(words[2] for words in lines if words[0] == "end")
        begun = [words for words in lines if words[0] == "begin"]
        if done.returncode == 0:
            break
        assert begun, f"the worker did not start: {done.stderr[-2000:]}"
        _, culprit, what = begun[-1]
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        found.deaths.append(f"mutation {culprit} ({what}): exit {done.returncode}: {reason}")
        first = int(culprit) + 1
    return found


def run_all(folder: Path, n: int, sources: list[Path]) -> Outcomes:
    n_workers = min(4, os.cpu_count() or 1)
    bounds = [n * i // n_workers for i in range(n_workers + 1)]
    total = Outcomes()
    with ThreadPoolExecutor(n_workers) as pool:
        for part in pool.map(
            lambda i: run_range(folder, bounds[i], bounds[i + 1], sources), range(n_workers)
        ):
            total.counts += part.counts
            total.deaths += part.deaths
    return total


def check(found: Outcomes, n: int) -> None:
    assert not found.deaths, "\n".join(found.deaths)
    assert found.counts.total() == n
    # The workers compute with one thread, where an assertion of llama.cpp can still be caught and
    # shows as DecodeError. With more threads the same assertion would end the process, so what
    # leads there must be refused by the load.
    assert not found.counts["DecodeError"], found.counts
    # Both ways out must occur, or the mutations do not test what they should.
    assert found.counts["works"] > n // 10, found.counts
    assert found.counts["ModelLoadError"] > n // 10, found.counts


def test_2000_mutations_never_end_the_process(
    tmp_path: Path, tiny_path: Path, tiny_swa_path: Path
) -> None:
    check(run_all(tmp_path, N_ORDINARY, [tiny_path, tiny_swa_path]), N_ORDINARY)


@pytest.mark.full
def test_20000_mutations_never_end_the_process(
    tmp_path: Path, tiny_path: Path, tiny_swa_path: Path
) -> None:
    check(run_all(tmp_path, N_FULL, [tiny_path, tiny_swa_path]), N_FULL)
