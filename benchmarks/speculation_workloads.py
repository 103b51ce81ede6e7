"""The texts that speculative decoding is measured with, and how their answers are chosen."""

from __future__ import annotations

import json
from pathlib import Path

from llama_crab import SamplerChain

_FOLDER = Path(__file__).resolve().parent / "speculation"
_GREEDY = SamplerChain().greedy()
# Free text of a small model runs into loops when it is greedy, and a loop is easy to look up.
_SAMPLED = SamplerChain.creative()

# name: file, sampler
WORKLOADS = {
    "copy_edits": ("copy_edits", _GREEDY),
    "retrieval": ("retrieval", _GREEDY),
    "json_lists": ("json_lists", _GREEDY),
    "creative": ("creative", _SAMPLED),
    "creative_greedy": ("creative", _GREEDY),
}


def prompts(workload: str) -> dict[str, str]:
    """Return the prompts of a workload by their ids, in the file's order."""
    lines = (_FOLDER / f"{WORKLOADS[workload][0]}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["prompt"] for row in map(json.loads, lines)}


def sampler(workload: str) -> SamplerChain:
    """Return how the answers of a workload are chosen; prompt i takes seed i."""
    return WORKLOADS[workload][1]


def is_greedy(workload: str) -> bool:
    return sampler(workload) is _GREEDY
