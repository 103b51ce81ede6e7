"""The token ids of running sequences as arrays, for Python code that looks at them each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .._core import Stepper
    from .request import Sequence

    Ids = npt.NDArray[np.int32]


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


class Histories:
    """The ids of each slot, of which only new ones are taken from the core.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._known: dict[int, tuple[Sequence, History]] = {}

    def tokens(self, slot: int, sequence: Sequence) -> Ids:
        """Return the ids of `sequence`, which runs in `slot`, as int32 of shape (n_tokens,)."""
        owner, history = self._known.get(slot, (None, None))
        if history is None or owner is not sequence:
            history = History(self._stepper, slot)
            self._known[slot] = (sequence, history)
        return history.extend(self._stepper.tokens(slot, len(history)))
