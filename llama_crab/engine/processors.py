"""The users' logits processors: Python code that changes a row before it is sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .histories import Histories
from .request import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from .._core import RowScratch, Stepper
    from .histories import Ids

    Rows = npt.NDArray[np.float32]
    LogitsProcessor = Callable[[Ids, Rows], None]


class BatchLogitsProcessor(Protocol):
    """Changes the rows of all sequences that use it in a step, together."""

    def process_batch(self, tokens: list[Ids], logits: Rows) -> None:
        """Change `logits` (n_rows, n_vocab) in place; `tokens` are the ids so far, per row."""


class Processors:
    """Runs the processors of one step: in a request's order, a batch processor once for its rows.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: Stepper, running: dict[int, Sequence]) -> None:
        self._running = running
        self._histories = Histories(stepper)

    def __call__(self, slots: list[int], scratch: RowScratch) -> set[int]:
        """Change the rows; return the slots whose processor raised, told in `Sequence.error`."""
        import numpy as np

        rows: Rows = np.asarray(scratch)
        tokens = [self._histories.tokens(slot, self._running[slot]) for slot in slots]
        failed: set[int] = set()

        def run(which: list[int], work: Callable[..., object], *args: object) -> None:
            try:
                if work(*args) is not None:
                    raise TypeError("a logits processor changes the row in place and returns None")
            except Exception as error:
                for at in which:
                    self._running[slots[at]].error = error
                    failed.add(slots[at])

        chains = [self._running[slot].request.logits_processors for slot in slots]
        for position in range(max(map(len, chains))):
            together: dict[int, list[int]] = {}
            for at, chain in enumerate(chains):
                if position >= len(chain) or slots[at] in failed:
                    continue
                processor = chain[position]
                if hasattr(processor, "process_batch"):
                    together.setdefault(id(processor), []).append(at)
                else:
                    run([at], processor, tokens[at], rows[at])
            for which in together.values():
                work = chains[which[0]][position].process_batch
                run(which, _run_batch, work, tokens, rows, which)
        return failed


def _run_batch(
    work: Callable[[list[Ids], Rows], object], tokens: list[Ids], rows: Rows, which: list[int]
) -> object:
    ids = [tokens[at] for at in which]
    first, last = which[0], which[-1]
    if last - first + 1 == len(which):
        return work(ids, rows[first : last + 1])
    some = rows[which]
    result = work(ids, some)
    rows[which] = some
    return result
