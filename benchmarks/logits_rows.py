"""Rows of logits as a language model gives them, at any vocabulary size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama_crab import _core

Rows = npt.NDArray[np.float32]

TEXT = (
    "The tide had gone out, and the boats lay on their sides in the mud of the harbour. An old man "
    "walked along the wall with a basket on his arm; he counted the ropes as he passed them, as he "
    "had every morning for forty years, and wrote the number in a small book."
)


def recorded_rows(path: Path, n: int) -> Rows:
    """Return the last `n` rows of a text decoded by a model: (n, n_vocab)."""
    with _core.Model(path) as model:
        tokens = model.vocab.tokenize(TEXT, True, False)
        with (
            _core.Context(
                model, n_ctx=512, n_batch=512, n_ubatch=512, n_outputs_max=len(tokens),
                n_threads=2, n_threads_batch=2,
            ) as context,
            _core.Batch(len(tokens)) as batch,
        ):  # fmt: skip
            batch.extend(tokens, 0, 0, "all")
            context.decode(batch)
            out = np.empty((n, model.vocab.n_tokens), np.float32)
            for row, i in zip(out, range(len(tokens) - n, len(tokens)), strict=True):
                context.copy_logits(row, i)
    return out


def resized(rows: Rows, n_vocab: int, seed: int = 0) -> Rows:
    """Return rows of another size: the best 256 logits of each, and a sample of the others."""
    rng = np.random.default_rng(seed)
    out = np.empty((len(rows), n_vocab), np.float32)
    for row, to in zip(rows, out, strict=True):
        ordered = np.sort(row)
        n_rest = n_vocab - 256
        rest = rng.choice(ordered[:-256], n_rest, replace=n_rest > row.size - 256)
        # A vocabulary sampled more than once would have ties, which no model has.
        rest += rng.normal(0, 1e-3, n_rest)
        to[:] = rng.permutation(np.concatenate([ordered[-256:], rest]))
    return out
