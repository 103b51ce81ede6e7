"""Import, load and memory, each in processes of their own."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, Native, spread

PROMPT = "The capital of France is"
# Not the checkout, where the uncompiled package would be found first.
HOME = Path.home()
_IMPORT = """
import time
start = time.perf_counter()
import {module}
print((time.perf_counter() - start) * 1e3)
"""


def import_ms(module: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT.format(module=module)],
        cwd=HOME,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


@pytest.mark.benchmark(group="import")
def test_import(benchmark: BenchmarkFixture, figures: dict[str, Any]) -> None:
    """``import llama_crab`` beside numpy's and, where installed, the peers' imports."""
    modules = ["llama_crab", "numpy", "llama_cpp", "xllamacpp"]
    times: dict[str, list[float]] = {}
    for module in modules:
        try:
            import_ms(module)  # writes the bytecode; says whether it is there
        except subprocess.CalledProcessError:
            continue
        times[module] = []

    def run() -> None:
        for module, values in times.items():
            values.append(import_ms(module))

    benchmark.pedantic(run, rounds=15)
    figure = {f"{module}_ms": spread(values) for module, values in times.items()}
    benchmark.extra_info.update(figure)
    figures["import"] = figure


_RUN = """
import sys
from llama_crab import Llama, SamplerChain
llama = Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[2]), flash_attn_type=True,
              n_gpu_layers=int(sys.argv[3]) or None)
llama.create_completion({prompt!r}, 64, sampler=SamplerChain.benchmark())
print("load_sec", llama.load_sec)
"""


def run_measured(command: list[str]) -> tuple[str, float, float]:
    """Return what a program printed, its wall time in seconds and peak resident set in MiB (Linux).

    The memory is read from the process while it runs: the figure that wait4 gives includes the
    parent's memory from before the exec.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=HOME, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        peak = 0.0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            match = re.search(r"VmHWM:\s*(\d+) kB", status)
            peak = float(match[1]) / 1024 if match else peak
            time.sleep(0.005)
        wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text
    return text, wall, peak


@pytest.mark.benchmark(group="load")
def test_process_and_memory(
    benchmark: BenchmarkFixture, native: Native, figures: dict[str, Any], model_path: Path
) -> None:
    """A whole process (start, load, 64 tokens, exit) and its peak RSS, beside llama-completion."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    loads: list[float] = []
    command = [str(native.folder / "llama-completion"), "-m", str(model_path), "-p", PROMPT]
    command += ["-n", "64", "--temp", "0", "-c", "1024", "-t", str(N_THREADS), "-fa", "on"]
    command += ["-no-cnv", "--no-warmup", "-ngl", str(GPU_LAYERS)]

    def before() -> None:
        _, wall, rss = run_measured(command)
        theirs.append((wall, rss))

    def run() -> None:
        program = [sys.executable, "-c", _RUN.format(prompt=PROMPT)]
        output, wall, rss = run_measured(
            [*program, str(model_path), str(N_THREADS), str(GPU_LAYERS)]
        )
        ours.append((wall, rss))
        loads.append(float(output.rpartition("load_sec ")[2]))

    benchmark.pedantic(run, setup=before, rounds=5)
    figure = {
        "process_sec": spread([wall for wall, _ in ours]),
        "llama_completion_process_sec": spread([wall for wall, _ in theirs]),
        "load_sec": spread(loads),
        "rss_mib": spread([rss for _, rss in ours]),
        "llama_completion_rss_mib": spread([rss for _, rss in theirs]),
        "rss_difference_mib": round(
            statistics.median(rss for _, rss in ours) - statistics.median(rss for _, rss in theirs),
            1,
        ),
    }
    benchmark.extra_info.update(figure)
    figures[f"process/{model_path.stem}"] = figure
