"""Restore damaged states into contexts; run by test_state in a process of its own.

usage: damaged_state_worker.py MODEL N

For each of N mutations prints ``begin i what`` and ``end i outcome``.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llama_crab import _core
from llama_crab.errors import LlamaCrabError, StateError

TOKENS = [1, 300, 301, 302, 303, 304]
FIELDS: Any = {"n_ctx": 64, "n_batch": 16, "n_seq_max": 2, "n_threads": 1, "n_threads_batch": 1}


def damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    out = bytearray(data)
    kind = rng.randrange(5)
    # Lengths and positions are at the beginning; most of the rest are numbers of the cache.
    span = len(out) if rng.random() < 0.3 else min(len(out), 200)
    if kind == 0:
        at = rng.randrange(len(out))
        del out[at:]
        return bytes(out), f"truncated at {at}"
    if kind == 1:
        at = rng.randrange(span)
        out[at] ^= 1 << rng.randrange(8)
        return bytes(out), f"bit flipped at {at}"
    if kind == 2:
        at = rng.randrange(max(1, span - 4))
        value = rng.choice((0, 1, 2, 255, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 65536))
        out[at : at + 4] = value.to_bytes(4, "little")
        return bytes(out), f"{value} at {at}"
    if kind == 3:
        at = rng.randrange(span) // 4 * 4
        value = rng.choice(((1 << 64) - 1, 1 << 62, 1 << 40, 1 << 63))
        out[at : at + 8] = value.to_bytes(8, "little")
        return bytes(out), f"{value} at {at}"
    at, n = rng.randrange(span), rng.randrange(1, 64)
    out[at : at + n] = rng.randbytes(n)
    return bytes(out), f"{n} random bytes at {at}"


def decode(context: _core.Context, tokens: list[int]) -> np.ndarray:
    with _core.Batch(16) as batch:
        batch.extend(tokens, 0, 0, "last")
        context.decode(batch)
    return np.array(context.logits())


def main() -> None:
    model = _core.Model(sys.argv[1])
    folder = Path(tempfile.mkdtemp())
    with _core.Context(model, **FIELDS) as source:
        expected = decode(source, TOKENS)
        whole, one = source.state_get(), source.state_get(0)
        source.state_save(folder / "whole", TOKENS)
        source.state_save(folder / "one", TOKENS, 0)
    originals = [whole, one, (folder / "whole").read_bytes(), (folder / "one").read_bytes()]
    context = _core.Context(model, **FIELDS)
    for i in range(int(sys.argv[2])):
        rng = random.Random(i)
        form = i % 4
        data, what = damage(originals[form], rng)
        print("begin", i, form, what, flush=True)
        outcome = "restored"
        try:
            if form < 2:
                context.state_set(data, 0 if form else None)
            else:
                (folder / "damaged").write_bytes(data)
                context.state_load(folder / "damaged", 0 if form == 3 else None)
        except StateError:
            outcome = "refused"
        # Whatever was restored, using it is a result or a typed error ...
        try:
            with _core.Batch(1) as batch:
                batch.extend([5], context.memory.seq_pos_max(0) + 1, 0, "last")
                context.decode(batch)
        except (LlamaCrabError, ValueError):
            pass
        # ... and a cleared context computes what a new one does.
        context.memory.clear()
        np.testing.assert_allclose(decode(context, TOKENS), expected, atol=5e-3)
        context.memory.clear()
        print("end", i, outcome, flush=True)


if __name__ == "__main__":
    main()
