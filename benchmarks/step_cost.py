"""Microseconds of a step by its tokens, each with an output row, as verification needs.

usage: step_cost.py [--model FILE ...] [--sequences 1,4,16] [--depth N] [--rounds N]
       [--record NAME]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import fetch_models  # noqa: E402
from side_by_side import GPU_LAYERS, N_THREADS, ROOT, machine  # noqa: E402

from llama_crab import LlamaParams, _core  # noqa: E402
from llama_crab.tuning.bed import Bed  # noqa: E402

DEPTH = 384
ROUNDS = 9
_MORE = (*range(17), 20, 24, 28, 32)  # tokens beyond one of each sequence
_LARGEST_STEP = 256


def sizes(n_seq: int) -> list[int]:
    """Return the numbers of tokens that are measured: few sequences left, then drafts of all."""
    fewer = [n for n in (1, 2, 4, 8) if n < n_seq]
    more = {n_seq + i for i in _MORE} | {
        n_seq * (1 + i) for i in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    }
    return fewer + sorted(n for n in more if n <= max(_LARGEST_STEP, n_seq))


def step_cost(
    path: Path, n_seq: int, *, depth: int = DEPTH, rounds: int = ROUNDS, **fields: Any
) -> dict[int, float]:
    """Return the microseconds of a step by its tokens, spread evenly over `n_seq` sequences.

    Each sequence has `depth` tokens before the step. The least of all rounds: others on the machine
    only ever add to it.
    """
    totals = sizes(n_seq)
    room = -(-(depth + totals[-1] // n_seq + 1) // 256) * 256
    params = LlamaParams(
        path,
        n_ctx=n_seq * room,
        n_seq_max=n_seq,
        n_outputs_max=totals[-1],
        flash_attn_type=True,
        n_threads=N_THREADS,
        n_gpu_layers=GPU_LAYERS or None,
    ).replace(**fields)
    times: dict[int, list[float]] = {total: [] for total in totals}
    with Bed(params) as bed, _core.Batch(max(depth, totals[-1]), n_seq) as batch:
        context = bed.context
        for seq in range(n_seq):
            batch.clear()
            batch.extend([100 + i % 1000 for i in range(depth)], 0, seq, "last")
            context.decode(batch)
        for turn in range(rounds + 2):
            for total in totals:
                for seq in range(n_seq):
                    context.memory.seq_rm(seq, depth, -1)
                batch.clear()
                for seq in range(min(n_seq, total)):
                    for i in range(total // n_seq + (seq < total % n_seq)):
                        batch.add(200 + i, depth + i, (seq,), True)
                began = time.perf_counter()
                context.decode(batch)
                context.synchronize()
                if turn > 1:
                    times[total].append((time.perf_counter() - began) * 1e6)
    return {total: round(min(values), 1) for total, values in times.items()}


def interpolated(curve: Mapping[int, float]) -> Callable[[int], float]:
    """Return the curve as a function of any number of tokens, linear between its points."""
    points = sorted(curve)

    def cost(n_tokens: int) -> float:
        if n_tokens in curve:
            return curve[n_tokens]
        i = min(max(bisect_left(points, n_tokens), 1), len(points) - 1)
        low, high = points[i - 1], points[i]
        slope = (curve[high] - curve[low]) / (high - low)
        return curve[low] + slope * (n_tokens - low)

    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", type=Path, help="default: SmolLM2 Q4_1, Gemma")
    parser.add_argument("--sequences", default="1,4,16")
    parser.add_argument("--depth", type=int, default=DEPTH, help="tokens before the step")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    figures = {}
    for path in args.model or [fetch_models.fetch(model) for model in fetch_models.TEST_MODELS]:
        for n_seq in map(int, args.sequences.split(",")):
            curve = step_cost(path, n_seq, depth=args.depth, rounds=args.rounds)
            figures[f"step_cost/{n_seq}/{path.stem}"] = {"depth": args.depth, "us": curve}
            print(f"{path.stem} {n_seq}: {json.dumps(curve)}", flush=True)
    if args.record:
        out = ROOT / "benchmarks" / "results" / f"{args.record}.json"
        out.write_text(json.dumps({**machine(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
