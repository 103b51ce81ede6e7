"""The users' logits processors: Python code that changes a row before it is sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .request import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from .._core import RowScratch, Stepper

    Ids = npt.NDArray[np.int32]
    Rows = npt.NDArray[np.float32]
    LogitsProcessor = Callable[[Ids, Rows], None]


class BatchLogitsProcessor(Protocol):
    """Changes the rows of all sequences that use it in a step, together."""

    def process_batch(self, tokens: list[Ids], logits: Rows) -> None:
        """Change `logits` (n_rows, n_vocab) in place; `tokens` are the ids so far, per row."""


class History:
    """The ids of a sequence as an array that grows; what was handed out stays as it was."""

    def __init__(self, stepper: Stepper, slot: int) -> None:
        import numpy as np

        self._ids = np.array(stepper.tokens(slot), np.int32)
        self._n = self._ids.size

    def __len__(self) -> int:
        return int(self._n)

    def extend(self, new: list[int]) -> Ids:
        """Append ids; return all of them, read-only."""
        import numpy as np

        if self._n + len(new) > self._ids.size:
            grown = np.empty(2 * (self._n + len(new)), np.int32)
            grown[: self._n] = self._ids[: self._n]
            self._ids = grown
        self._ids[self._n : self._n + len(new)] = new
        self._n += len(new)
        view = self._ids[: self._n]
        view.flags.writeable = False
        return view


class Processors:
    """Runs the processors of one step: in a request's order, a batch processor once for its rows.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: Stepper, running: dict[int, Sequence]) -> None:
        self._stepper = stepper
        self._running = running
        self._histories: dict[int, tuple[Sequence, History]] = {}

    def __call__(self, slots: list[int], scratch: RowScratch) -> set[int]:
        """Change the rows; return the slots whose processor raised, told in `Sequence.error`."""
        import numpy as np

        rows: Rows = np.asarray(scratch)
        tokens = [self._tokens(slot) for slot in slots]
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

    def _tokens(self, slot: int) -> Ids:
        sequence = self._running[slot]
        owner, history = self._histories.get(slot, (None, None))
        if history is None or owner is not sequence:
            history = History(self._stepper, slot)
            self._histories[slot] = (sequence, history)
        return history.extend(self._stepper.tokens(slot, len(history)))


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
