"""`tune` against the best point of an exhaustive grid over the same levers, and how long it took.

usage: tune_against_grid.py [--model FILE ...] [--budget SEC] [--rounds N] [--record NAME]

For each model and depth: `tune` runs first, then every point of the grid of its levers is measured
in turn, round by round; the ratio is the speed of what `tune` chose to the grid's best, in the same
rounds. The best of many noisy medians is flattered by chance: the ratio errs against `tune`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import fetch_models  # noqa: E402
from side_by_side import ROOT, machine  # noqa: E402

from llama_crab import LlamaParams  # noqa: E402
from llama_crab.tuning import Bed, tune  # noqa: E402
from llama_crab.tuning.workloads import Generate  # noqa: E402

DEPTHS = (0, 2000)
N_GEN = 24


def grid(report: Any) -> list[dict[str, Any]]:
    """Return every combination of the values that the levers could take."""
    names = [row.lever for row in report.rows]
    products = itertools.product(*(row.candidates for row in report.rows))
    return [dict(zip(names, point, strict=True)) for point in products]


def measure_grid(path: Path, points: list[dict[str, Any]], depth: int, rounds: int) -> list[float]:
    """Return the median tokens/s of each point, measured in turn."""
    workload = Generate(N_GEN, depth)
    beds: dict[str, Bed] = {}
    rates: list[list[float]] = [[] for _ in points]
    try:
        for turn in range(rounds + 1):
            for i, point in enumerate(points):
                fields = {name: value for name, value in point.items() if name != "n_threads"}
                key = json.dumps(fields, sort_keys=True)
                if key not in beds:
                    params = workload.fit(LlamaParams(path, **fields))
                    beds[key] = Bed(params, weights_of=next(iter(beds.values()), None))
                bed = beds[key]
                n_threads = point.get("n_threads", bed.params.n_threads)
                bed.context.set_n_threads(n_threads, bed.params.n_threads_batch or n_threads)
                seconds = workload.run(bed)
                if turn:  # the first one fills the caches
                    rates[i].append(N_GEN / seconds)
    finally:
        for bed in beds.values():
            bed.close()
    return [statistics.median(values) for values in rates]


def compare(path: Path, depth: int, budget: float, rounds: int) -> dict[str, Any]:
    """Tune one model at one depth and look where the result stands in the grid."""
    began = time.monotonic()
    report = tune(path, budget_sec=budget, depth=depth, save=False)
    tune_sec = time.monotonic() - began
    points = grid(report)
    chosen = {
        row.lever: row.after if row.lever in report.profile.params else row.before
        for row in report.rows
    }
    rates = measure_grid(path, points, depth, rounds)
    best = max(range(len(points)), key=rates.__getitem__)
    mine = points.index(chosen)
    return {
        "ratio": round(rates[mine] / rates[best], 4),
        "tune_sec": round(tune_sec, 1),
        "budget_sec": budget,
        "ended": report.ended,
        "chosen": chosen,
        "best": points[best],
        "tok_per_sec": dict(
            zip(map(json.dumps, points), (round(r, 1) for r in rates), strict=True)
        ),
        "gain_found": round(report.gain, 4),
        "n_measured": report.n_measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", type=Path, help="default: SmolLM2 Q4_1, Gemma")
    parser.add_argument("--depth", action="append", type=int, help="default: 0 and 2000")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds per model and depth")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    models = args.model or [fetch_models.fetch(model) for model in fetch_models.TEST_MODELS]
    figures = {}
    for path in models:
        for depth in args.depth or DEPTHS:
            figure = compare(path, depth, args.budget, args.rounds)
            figures[f"tune/{path.stem}/d{depth}"] = figure
            print(f"{path.stem} d{depth}: {json.dumps(figure)}", flush=True)
    if args.record:
        out = ROOT / "benchmarks" / "results" / f"{args.record}.json"
        out.write_text(json.dumps({**machine(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
