"""What is counted once per request; the rest is counted by the core, see `_core.StepCounters`."""

from __future__ import annotations

from collections import Counter

from .request import Request


class Tally:
    """Counts of requests that have ended, as their results report them.

    `ended` counts them by finish reason, ``"error"`` for those that raise; `n_cut` the tokens that
    were generated and then left out, because they spelt a stop string.

    Thread-safety: one thread counts, any thread reads.
    """

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.prompt_n = 0
        self.cached_n = 0
        self.n_cut = 0

    def count(self, request: Request) -> None:
        """Count a request that has ended just now."""
        if request.error is not None:
            reason = "error"
        else:
            reason = request.chosen()[0].finish_reason or "cancelled"
        self.ended[reason] += 1
        self.prompt_n += len(request.prompt)
        self.cached_n += request.sequences[0].n_cached
