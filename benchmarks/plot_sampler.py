"""Draw what chains cost against the vocabulary, from the record of `test_sampler.py`.

usage: plot_sampler.py RESULTS.json OUT.svg
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "llama_crab"  # the same file for the same figures

import matplotlib.pyplot as plt  # noqa: E402

TITLES = {
    "greedy": "greedy",
    "top_k_first": "top_k 40, top_p, min_p, temp",
    "chat": "SamplerChain.chat()",
    "creative": "SamplerChain.creative()",
    "temp_dist": "temp, dist",
    "mirostat_v2": "mirostat_v2",
}


def main(results: Path, out: Path) -> None:
    """Write one small plot a chain."""
    record: dict[str, Any] = json.loads(results.read_text())
    points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for name, figure in record["figures"].items():
        group, chain, n_vocab = name.split("/")
        if group == "sampler" and chain in TITLES:
            points[chain].append((int(n_vocab), figure["fused_us"], figure["reference_us"]))
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True)
    for axis, (chain, title) in zip(axes.flat, TITLES.items(), strict=True):
        sizes, fused, reference = zip(*sorted(points[chain]), strict=True)
        axis.plot(sizes, reference, "o-", color="#8a8a8a", label="reference (llama.cpp)")
        axis.plot(sizes, fused, "o-", color="#c8452f", label="fused")
        axis.set(xscale="log", yscale="log", title=title)
        axis.set_xticks(sizes, [f"{n // 1000}k" for n in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.supxlabel("vocabulary")
    figure.supylabel("µs per token")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
