"""What `tune` can make fast: per goal its levers, their values, and what is measured.

Sizes follow the time: every choice is to be measured a few dozen times within the budget.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .. import _core
from ..llama import offloads
from ..params import LlamaParams, ParameterError
from .search import Lever
from .surface import KV_TYPE, Part, Rates
from .workloads import Generate, Parallel, Prefill

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Point = Mapping[str, Any]

_DEPTH = 2000
_LEAST_DEPTH = 250
# Shares of the budget: one measurement, and the two fills that flash attention needs.
_PART_SHARE, _FILL_SHARE = 1 / 120, 0.25
_THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_UBATCHES = (64, 128, 256, 512, 1024, 2048)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_SEQUENCES_CPU = 32
# A request of the throughput goal.
_PROMPT, _ANSWER = 128, 64


@dataclass(frozen=True)
class Plan:
    """A goal for one model and machine: what to set, what to measure, in what unit to report."""

    levers: tuple[Lever, ...]
    start: Point
    parts: tuple[Part, ...]
    unit: str
    n_per_unit: float
    """divided by the seconds of a measurement it gives the rate"""
    note: str = ""


def plan(
    goal: str,
    params: LlamaParams,
    model: _core.Model,
    rates: Rates,
    budget_sec: float,
    *,
    depth: int | None,
    allow_quantised_kv: bool,
) -> Plan:
    """Return what to search for `goal`; `params` are resolved.

    Raises `ParameterError` for a depth that the model or the budget has no room for.
    """
    n_ctx_train = model.n_ctx_train or 1 << 30
    part_sec = min(0.5, budget_sec * _PART_SHARE)
    note = ""
    if depth is not None:
        if depth + 64 > n_ctx_train:
            raise ParameterError(f"depth: {depth} does not fit in the {n_ctx_train} tokens trained")
        fill_sec = 1.3 * depth / rates.prefill
        if fill_sec > budget_sec / 2:
            raise ParameterError(
                f"depth: {depth} tokens take about {fill_sec:.0f} s to compute, which is more "
                f"than half of the budget of {budget_sec:g} s"
            )
    if goal == "latency":
        n_gen = _size(rates.generate * part_sec, 4, 64)
        depths = [0, _deep(rates, budget_sec, n_ctx_train)] if depth is None else [depth]
        if depths[-1] == 0 and depth is None:
            depths.pop()
            note = "no time in the budget for a long context: measured at its beginning only"
        parts = tuple(_generate(max(4, n_gen // (2 if at else 1)), at, depths) for at in depths)
        unit, n_per_unit = "tok/s", 1.0
    elif goal == "ttft":
        n_prompt = _size(rates.prefill * budget_sec / 25, 64, 512, n_ctx_train // 2)
        parts = (_prefill(n_prompt, depth or 0),)
        unit, n_per_unit = "tok/s", float(n_prompt)
    else:
        n_prompt = _size(rates.prefill * budget_sec / 60, 64, 512, n_ctx_train // 2)
        at = depth or _size(rates.prefill * budget_sec / 200, 16, 256, n_ctx_train // 4)
        parts = _requests(n_prompt, _size(rates.generate * part_sec / 4, 2, 16), at)
        unit, n_per_unit = "tok/s", float(_PROMPT + _ANSWER)
    start, levers = _levers(goal, params, model, parts, allow_quantised_kv)
    return Plan(levers, start, parts, unit, n_per_unit, note)


def _generate(n_gen: int, depth: int, depths: list[int]) -> Part:
    workload = Generate(n_gen, depth)
    share = 1.0 / (len(depths) * n_gen)
    ignores = ("n_batch", "n_ubatch")
    return Part(workload.name, lambda _: workload, lambda _: share, ignores)


def _prefill(n_prompt: int, depth: int) -> Part:
    workload = Prefill(n_prompt, depth)
    return Part(workload.name, lambda _: workload, lambda _: 1.0)


def _requests(n_prompt: int, n_gen: int, depth: int) -> tuple[Part, ...]:
    """Return the parts of a request: a question of 128 tokens and an answer of 64.

    Questions of many requests fill micro-batches together, so they are one long prefill.
    """
    prompt = Prefill(n_prompt)
    return (
        Part(prompt.name, lambda _: prompt, lambda _: _PROMPT / n_prompt, ("n_seq_max",)),
        Part(
            f"tg{n_gen} x n_seq_max @ d{depth}",
            lambda point: Parallel(point["n_seq_max"], n_gen, depth),
            lambda point: _ANSWER / (n_gen * point["n_seq_max"]),
            ("n_batch", "n_ubatch"),
        ),
    )


def _levers(
    goal: str,
    params: LlamaParams,
    model: _core.Model,
    parts: tuple[Part, ...],
    allow_quantised_kv: bool,
) -> tuple[dict[str, Any], tuple[Lever, ...]]:
    gpu = offloads(params)
    found: list[tuple[Any, Lever]] = []

    def add(name: str, value: Any, candidates: tuple[Any, ...], *, ordered: bool = True) -> None:
        if ordered:
            candidates = tuple(sorted({*candidates, value}))
        elif value not in candidates:
            candidates = (value, *candidates)
        if len(candidates) > 1:
            found.append((value, Lever(name, candidates, ordered)))

    if _core.supports_gpu_offload():
        every = model.n_layer + 1
        layers = params.n_gpu_layers
        value = layers if isinstance(layers, int) and 0 <= layers < every else every
        add("n_gpu_layers", value, tuple(every * i // 4 for i in range(5)))
    threads = tuple(n for n in _THREADS if n <= _logical_cpus())
    if goal == "throughput":
        most = _SEQUENCES[-1] if gpu else _MOST_SEQUENCES_CPU
        add("n_seq_max", params.n_seq_max or 1, tuple(n for n in _SEQUENCES if n <= most))
    # llama.cpp takes n_threads for a batch of one token, and n_threads_batch for all others.
    if goal == "latency":
        add("n_threads", params.n_threads, threads)
    else:
        add("n_threads_batch", params.n_threads_batch, threads)
    add(
        "flash_attn_type",
        params.flash_attn_type or "auto",
        ("auto", "disabled"),
        ordered=False,
    )
    if goal != "latency":
        longest = parts[0].workload({}).n_tokens
        batch, ubatch = params.n_batch or 2048, params.n_ubatch or min(512, params.n_batch or 2048)
        # Beyond the prompt a larger batch is the same batch.
        add("n_ubatch", ubatch, tuple(n for n in _UBATCHES if n <= max(longest, ubatch)))
        add("n_batch", batch, tuple(n for n in (256, 512, 1024) if n < longest))
        if not any(lever.name == "n_batch" for _, lever in found):
            found.append((batch, Lever("n_batch", (batch,))))
    if allow_quantised_kv and params.type_k == params.type_v:
        add(KV_TYPE, params.type_k or "f16", ("f16", "q8_0", "q4_0"), ordered=False)
    return {lever.name: value for value, lever in found}, tuple(lever for _, lever in found)


def _deep(rates: Rates, budget_sec: float, n_ctx_train: int) -> int:
    room = rates.prefill * budget_sec * _FILL_SHARE / 1.3
    deep = min(_DEPTH, int(room), n_ctx_train - 64) // _LEAST_DEPTH * _LEAST_DEPTH
    return max(0, deep)


def _size(wanted: float, least: int, most: int, cap: int | None = None) -> int:
    """Return the largest power of two within all bounds, or the least where there is none."""
    most = most if cap is None else min(most, cap)
    size = least
    while 2 * size <= min(wanted, most):
        size *= 2
    return size


def _logical_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
