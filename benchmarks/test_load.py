"""Many users at once against llama-server, taking turns; the engine's own cost.

The environment chooses model and sizes (README.md), so that the same file serves a GPU machine.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from load import (
    Answer,
    LoadRequest,
    closed_loop,
    latencies,
    mixed_requests,
    prose,
    shared_prefix_requests,
    tokens_per_sec,
)
from native_server import NativeServer, batched_bench
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, ROOT, Native, spread

from llama_crab import Llama, SamplerChain


def setting(name: str, default: str) -> str:
    return os.environ.get(f"LLAMA_CRAB_BENCH_{name}") or default


ROUNDS = int(setting("ROUNDS", "5"))
SEQUENCES = [int(n) for n in setting("SEQUENCES", "1,4,8,16").split(",")]
KV = setting("KV", "split,unified").split(",")
N_USERS = int(setting("USERS", "16"))
N_PREFIX = int(setting("PREFIX", "1000"))
# Longest prompt and answer of a mixed request, rounded up to what llama.cpp pads a cache to.
N_CTX_SEQ = 512
GREEDY = SamplerChain().greedy()


@pytest.fixture(scope="module")
def load_model(request: pytest.FixtureRequest) -> Path:
    path = os.environ.get("LLAMA_CRAB_BENCH_MODEL")
    return Path(path) if path else request.getfixturevalue("smollm2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model so small that the engine's own work is seen beside its decoding."""
    folder = Path(os.environ.get("LLAMA_CPP_DIR") or ROOT / "third_party" / "llama.cpp") / "models"
    tokens = tiny_gguf.spm_tokens(folder / "ggml-vocab-llama-spm.gguf")
    (path,) = tiny_gguf.write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tokens)
    return path


def load(path: Path, **fields: Any) -> Llama:
    options = {"flash_attn_type": True, "n_threads": N_THREADS, "n_gpu_layers": GPU_LAYERS or None}
    return Llama(path, **{**options, **fields})


def asker(llama: Llama, **options: Any) -> Callable[[LoadRequest], Answer]:
    """Return what a client of ours does, as `NativeServer.ask`."""

    def ask(request: LoadRequest) -> Answer:
        submitted = time.perf_counter()
        handle = llama.submit(
            request.prompt, request.max_tokens, sampler=GREEDY, ignore_eos=True, **options
        )
        result = handle.result()
        end = time.perf_counter()
        n_tokens = result.usage.completion_tokens
        assert n_tokens == request.max_tokens
        return Answer(submitted, (submitted + result.timings.first_token_sec, end), n_tokens)

    return ask


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


def paired(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 4)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("n", SEQUENCES)
@pytest.mark.benchmark(group="load")
def test_mixed_load(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    load_model: Path,
    n: int,
    kv: str,
) -> None:
    """`n` clients with questions and answers of many lengths, new ones each round."""
    n_ctx, kv_unified = n * N_CTX_SEQ, kv == "unified"
    speeds: dict[str, list[float]] = {"ours": [], "server": []}
    waits: dict[str, list[dict[str, float]]] = {"ours": [], "server": []}
    rounds: Iterator[int] = iter(range(ROUNDS + 1))
    requests: list[LoadRequest] = []
    with (
        NativeServer(
            native, load_model, n_ctx=n_ctx, n_parallel=n, kv_unified=kv_unified
        ) as server,
        load(load_model, n_ctx=n_ctx, n_seq_max=n, kv_unified=kv_unified) as llama,
    ):
        ask = asker(llama)
        closed_loop(server.ask, mixed_requests(llama.tokenize, n, seed=ROUNDS), n)
        closed_loop(ask, mixed_requests(llama.tokenize, n, seed=ROUNDS), n)

        def before() -> None:
            requests[:] = mixed_requests(llama.tokenize, max(8, 2 * n), seed=next(rounds))
            answers = closed_loop(server.ask, requests, n)
            speeds["server"].append(tokens_per_sec(answers))
            waits["server"].append(latencies(answers))

        def run() -> None:
            answers = closed_loop(ask, requests, n)
            speeds["ours"].append(tokens_per_sec(answers))
            waits["ours"].append(latencies(answers))

        benchmark.pedantic(run, setup=before, rounds=ROUNDS)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    figure = {
        "ratio": round(median["ours"] / median["server"], 4),
        "paired_ratio": paired(speeds["ours"], speeds["server"]),
        **{f"{name}_tok_s": spread(values) for name, values in speeds.items()},
        **{f"{name}_latency": medians(rows) for name, rows in waits.items()},
    }
    benchmark.extra_info.update(figure)
    figures[f"load/{kv}/{n}/{load_model.stem}"] = figure


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("n", SEQUENCES)
@pytest.mark.benchmark(group="generation")
def test_generation(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    load_model: Path,
    n: int,
    kv: str,
) -> None:
    """`n` equal answers whose prompts are known, against what llama-batched-bench generates."""
    n_prompt, n_gen, kv_unified = 112, 128, kv == "unified"
    n_ctx = n * (n_prompt + n_gen + 16)
    speeds: dict[str, list[float]] = {"ours": [], "batched": []}
    with load(load_model, n_ctx=n_ctx, n_seq_max=n, kv_unified=kv_unified) as llama:
        prompts = [prose(llama.tokenize, n_prompt, seed) for seed in range(n)]
        options: dict[str, Any] = {"sampler": GREEDY, "ignore_eos": True}

        def before() -> None:
            found = batched_bench(
                native,
                load_model,
                n,
                n_prompt=n_prompt,
                n_gen=n_gen,
                n_ctx=n_ctx,
                kv_unified=kv_unified,
            )
            speeds["batched"].append(found)
            for handle in [llama.submit(prompt, 1, **options) for prompt in prompts]:
                handle.result()

        def run() -> None:
            start = time.perf_counter()
            for handle in [llama.submit(prompt, n_gen, **options) for prompt in prompts]:
                handle.result()
            speeds["ours"].append(n * n_gen / (time.perf_counter() - start))

        before()
        run()
        for values in speeds.values():
            values.clear()
        benchmark.pedantic(run, setup=before, rounds=ROUNDS)
    figure = {
        "paired_ratio": paired(speeds["ours"], speeds["batched"]),
        **{f"{name}_tok_s": spread(values) for name, values in speeds.items()},
    }
    benchmark.extra_info.update(figure)
    figures[f"generation/{kv}/{n}/{load_model.stem}"] = figure


@pytest.mark.benchmark(group="prefix")
def test_shared_prefix(
    benchmark: BenchmarkFixture, native: Native, figures: dict[str, Any], load_model: Path
) -> None:
    """Users behind one long text: all at once when it is new, again when it is known, no reuse.

    llama-server runs as it does by default here, with its cache of prompts.
    """
    n_ctx = N_USERS * -(-(N_PREFIX + 64) // 256) * 256
    names = ("ours_new", "ours_known", "ours_no_reuse", "server_new", "server_known")
    waits: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    rounds: Iterator[int] = iter(range(2 * ROUNDS))
    with (
        NativeServer(
            native, load_model, n_ctx=n_ctx, n_parallel=N_USERS, kv_unified=True, cache_ram=8192
        ) as server,
        load(load_model, n_ctx=n_ctx, n_seq_max=N_USERS, kv_unified=True) as llama,
    ):

        def wait(name: str, ask: Callable[[LoadRequest], Answer], seed: int) -> None:
            for name_of_time in (f"{name}_new", f"{name}_known"):
                requests = shared_prefix_requests(llama.tokenize, N_USERS, seed, N_PREFIX)
                waits[name_of_time].append(latencies(closed_loop(ask, requests, N_USERS)))

        def run() -> None:
            seed = next(rounds)
            wait("server", server.ask, seed)
            wait("ours", asker(llama), seed)
            requests = shared_prefix_requests(llama.tokenize, N_USERS, seed, N_PREFIX)
            answers = closed_loop(asker(llama, cache_prompt=False), requests, N_USERS)
            waits["ours_no_reuse"].append(latencies(answers))

        benchmark.pedantic(run, rounds=ROUNDS)
    figure = {name: medians(rows) for name, rows in waits.items()}
    benchmark.extra_info.update(figure)
    figures[f"shared_prefix/{N_USERS}x{N_PREFIX}/{load_model.stem}"] = figure


@pytest.mark.parametrize("size", ["real", "tiny"])
@pytest.mark.benchmark(group="async")
def test_latency_of_submit(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, figures: dict[str, Any], size: str
) -> None:
    """One request alone: `submit` and `result` beside `create_completion`, taking turns.

    Beside a tiny model the way to the engine's thread and back is seen by itself.
    """
    path = request.getfixturevalue("load_model" if size == "real" else "tiny")
    times: dict[str, list[float]] = {"sync_us": [], "async_us": []}
    options: dict[str, Any] = {"sampler": GREEDY, "ignore_eos": True, "cache_prompt": False}
    prompt = list(range(300, 316))
    fields: dict[str, Any] = {"n_ctx": N_CTX_SEQ}
    if size == "tiny":
        fields |= {"n_threads": 1, "n_gpu_layers": None}
    # Two, because the first `submit` starts a thread that then serves every call.
    with load(path, **fields) as own, load(path, **fields) as served:

        def run() -> None:
            start = time.perf_counter()
            own.create_completion(prompt, 16, **options)
            middle = time.perf_counter()
            served.submit(prompt, 16, **options).result()
            end = time.perf_counter()
            times["sync_us"].append((middle - start) * 1e6)
            times["async_us"].append((end - middle) * 1e6)

        for _ in range(5):
            run()
        for values in times.values():
            values.clear()
        benchmark.pedantic(run, rounds=300 if size == "tiny" else 10 * ROUNDS)
    figure = {
        "paired_ratio": paired(times["async_us"], times["sync_us"]),
        **{name: spread(values) for name, values in times.items()},
    }
    benchmark.extra_info.update(figure)
    figures[f"latency_of_submit/{path.stem}"] = figure


@pytest.mark.benchmark(group="overhead")
def test_overhead_of_a_step(
    benchmark: BenchmarkFixture, figures: dict[str, Any], tiny: Path
) -> None:
    """Microseconds of a step of 32 sequences beside `llama_decode`; and beside sampling too."""
    n = 32
    beside_decode: list[float] = []
    beside_sampling: list[float] = []
    with load(tiny, n_ctx=n * N_CTX_SEQ, n_seq_max=n, n_threads=1, n_gpu_layers=None) as llama:
        stepper = llama._engine.scheduler.stepper

        def run() -> None:
            n_steps, decode_us, sample_us = stepper.n_steps, stepper.decode_us, stepper.sample_us
            start = time.perf_counter()
            handles = [
                llama.submit([300 + i] * 8, 256, sampler=GREEDY, ignore_eos=True) for i in range(n)
            ]
            for handle in handles:
                handle.result()
            spent = (time.perf_counter() - start) * 1e6 - (stepper.decode_us - decode_us)
            n_steps = stepper.n_steps - n_steps
            beside_decode.append(spent / n_steps)
            beside_sampling.append((spent - (stepper.sample_us - sample_us)) / n_steps)

        run()
        beside_decode.clear()
        beside_sampling.clear()
        benchmark.pedantic(run, rounds=ROUNDS)
    figure = {
        "beside_decode_us": spread(beside_decode),
        "beside_decode_and_sampling_us": spread(beside_sampling),
    }
    benchmark.extra_info.update(figure)
    figures[f"overhead/step_of_{n}"] = figure
