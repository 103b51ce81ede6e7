"""Drafters that are Python callables: asked once per batch for all sequences that have one."""

from __future__ import annotations

from .histories import Histories
from .request import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._core import Stepper


class Drafters:
    """Asks the drafters of running sequences what may follow.

    `failed` has the sequences whose drafter raised; the scheduler ends their requests.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: Stepper, running: dict[int, Sequence]) -> None:
        self._stepper = stepper
        self._running = running
        self._histories = Histories(stepper)
        self.failed: dict[Sequence, Exception] = {}

    def __call__(self, slots: list[int]) -> dict[int, list[int]]:
        """Return what may follow, by slot."""
        drafts: dict[int, list[int]] = {}
        for slot in slots:
            sequence = self._running[slot]
            request = sequence.request
            if request.drafter is None or sequence in self.failed:
                continue
            tokens = self._histories.tokens(slot, sequence)
            try:
                ids = request.drafter(tokens, request.n_draft_max)
                drafts[slot] = [int(token) for token in ids][: request.n_draft_max]
            except Exception as error:
                self.failed[sequence] = error
                self._stepper.pause()  # after this batch the request ends
        return drafts
