"""What the models answer to the workloads of speculative decoding, and how much lookup foretells.

usage: speculation_answers.py [--model FILE ...] [--workload NAME ...] [--tokens N] [--show]
       [--record NAME]

No drafts are made: the answers are plain, and read afterwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import fetch_models  # noqa: E402
from draft_replay import latest_bigram  # noqa: E402
from side_by_side import GPU_LAYERS, N_THREADS, ROOT, machine  # noqa: E402
from speculation_workloads import WORKLOADS, prompts, sampler  # noqa: E402

from llama_crab import Llama  # noqa: E402

N_CTX = 1024
_RUN = 8


def repeated(answer: Sequence[int]) -> float:
    """Return the share of runs of 8 tokens that the answer has had before: near 1, a loop."""
    runs = [tuple(answer[i : i + _RUN]) for i in range(len(answer) - _RUN + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def read(llama: Llama, workload: str, n_tokens: int, show: bool) -> dict[str, Any]:
    """Answer a workload; return its figures."""
    n_prompt, n_answer, loops = [], [], {}
    n_known = n_right = 0
    for seed, (name, text) in enumerate(prompts(workload).items()):
        tokens = llama.tokenize(text)
        result = llama.create_completion(tokens, n_tokens, sampler=sampler(workload), seed=seed)
        known, right = latest_bigram(tokens, result.tokens)
        n_prompt.append(len(tokens))
        n_answer.append(len(result.tokens))
        n_known += known
        n_right += right
        loops[name] = round(repeated(result.tokens), 2)
        if show:
            share = f"{right}/{len(result.tokens)} foretold, {loops[name]} repeated"
            print(f"--- {name}: {len(tokens)} + {share}\n{text[-80:]}|>{result.text}\n")
    return {
        "prompt_tokens": [min(n_prompt), round(statistics.mean(n_prompt)), max(n_prompt)],
        "answer_tokens": sum(n_answer),
        "known": round(n_known / sum(n_answer), 3),
        "acceptance": round(n_right / n_known, 3),
        "foretold": round(n_right / sum(n_answer), 3),
        "repeated": round(statistics.mean(loops.values()), 3),
        "loops": sorted(name for name, share in loops.items() if share > 0.3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", type=Path, help="default: SmolLM2 Q4_1, Gemma")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="default: all")
    parser.add_argument("--show", action="store_true", help="print the answers too")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    figures = {}
    for path in args.model or [fetch_models.fetch(model) for model in fetch_models.TEST_MODELS]:
        fields: dict[str, Any] = {"n_threads": N_THREADS, "n_gpu_layers": GPU_LAYERS or None}
        with Llama(path, n_ctx=N_CTX, flash_attn_type=True, **fields) as llama:
            for workload in args.workload or WORKLOADS:
                figure = read(llama, workload, args.tokens, args.show)
                figures[f"answers/{workload}/{path.stem}"] = figure
                print(f"{path.stem} {workload}: {json.dumps(figure)}", flush=True)
    if args.record:
        out = ROOT / "benchmarks" / "results" / f"{args.record}.json"
        out.write_text(json.dumps({**machine(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
