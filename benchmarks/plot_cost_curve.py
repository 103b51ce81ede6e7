"""Draw what a step of several tokens costs against a step of one, from records of `step_cost.py`.

usage: plot_cost_curve.py RESULTS.json ... OUT.{svg,png} [--sequences N] [--most TOKENS]

Records of `test_speculation.py` have the same curves. A step of k tokens pays when more than its
ratio of them is accepted, so the flatter a curve, the fewer drafts must be right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
matplotlib.rcParams["svg.hashsalt"] = "llama_crab"  # the same file for the same figures

import matplotlib.pyplot as plt  # noqa: E402


def curves(record: dict[str, Any], n_seq: int) -> dict[str, dict[int, float]]:
    """Return the microseconds by tokens of each model in a record, for that many sequences."""
    found: dict[str, dict[int, float]] = {}
    for name, figure in record["figures"].items():
        group, *_, sequences, model = name.split("/")
        if group == "step_cost":
            us = figure["us"]
        elif group == "speculation":
            us = figure["step_cost"]["us"]
        else:
            continue
        if int(sequences) == n_seq:
            found[model] = {int(n): value for n, value in us.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, default=1, help="that share the step (default 1)")
    parser.add_argument("--most", type=int, default=33, help="tokens of a sequence to show")
    args = parser.parse_args()
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for path in args.results:
        record = json.loads(path.read_text())
        gpus = [device["description"] for device in record["devices"] if device["name"] != "CPU"]
        place = gpus[0] if gpus else f"CPU, {record['n_threads']} threads"
        for model, us in curves(record, args.sequences).items():
            sizes = [n for n in sorted(us) if args.sequences <= n <= args.most * args.sequences]
            axis.plot(
                [n / args.sequences for n in sizes],
                [us[n] / us[args.sequences] for n in sizes],
                "o-",
                markersize=3,
                label=f"{model} ({place})",
            )
    axis.axline((1, 1), slope=1, color="#8a8a8a", linestyle=":", label="as dear as single steps")
    axis.set_ylim(0, axis.get_ylim()[1])
    axis.set(xlabel="tokens of each sequence in the step", ylabel="cost, step of one token = 1")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
