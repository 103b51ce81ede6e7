"""Requests over a tiny random model, and the loop that runs them; used by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llama_crab.engine import Request, Scheduler
from llama_crab.sampling import SamplerChain

GREEDY = SamplerChain().greedy()
MakeScheduler = Callable[..., Scheduler]


def prompt_of(n: int, seed: int = 0) -> list[int]:
    """Return `n` ordinary tokens of the tiny vocabulary."""
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(260, 700, n)]


def ask(n_prompt: int = 20, n_tokens: int | None = 8, *, seed: int = 0, **fields: Any) -> Request:
    fields = {"sampler": GREEDY, "ignore_eos": True, **fields}
    prompt = fields.pop("prompt", None) or prompt_of(n_prompt, seed)
    return Request(prompt=prompt, seed=1, max_tokens=n_tokens, **fields)


def run(scheduler: Scheduler, *requests: Request, limit: int = 2000) -> int:
    """Submit the requests, step until all are done, and return the number of steps."""
    for request in requests:
        scheduler.submit(request)
    return finish(scheduler, *requests, limit=limit)


def finish(scheduler: Scheduler, *requests: Request, limit: int = 2000) -> int:
    for n in range(limit):
        if all(request.done for request in requests):
            return n
        scheduler.step()
    raise AssertionError(f"not done after {limit} steps")


def answers(request: Request) -> list[list[int]]:
    return [sequence.tokens for sequence in request.sequences]


def answer(request: Request) -> list[int]:
    assert request.error is None
    (sequence,) = request.sequences
    return sequence.tokens


def slot_of(request: Request) -> int:
    slot = request.sequences[0].slot
    assert slot is not None
    return slot
