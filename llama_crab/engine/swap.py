"""Sequences that leave their slot for a while, and come back to go on where they were."""

from __future__ import annotations

from array import array

from .._core import Stepper
from ..errors import StateError
from .prefix_cache import MIN_SHARED, Placement
from .request import Sequence, Suspension

# Host memory for the states of suspended sequences; beyond it they are computed again.
_SWAP_BYTES = 1 << 30


class Swap:
    """Moves running sequences out of the context and back.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self.n_bytes_left = _SWAP_BYTES
        self.n_suspended = 0

    def out(self, sequence: Sequence, slot: int) -> None:
        """Take a sequence out of `slot`, with its state where there is memory for it."""
        ids = array("i", self._stepper.tokens(slot))
        n_past = self._stepper.progress(slot)[2]
        state = self._stepper.save(slot) if n_past >= MIN_SHARED else None
        if state is not None and len(state) > self.n_bytes_left:
            state = None
        self.n_bytes_left -= len(state or b"")
        sequence.suspension = Suspension(self._stepper.suspend(slot), ids, n_past, state)
        self.n_suspended += 1

    def back(self, sequence: Sequence, place: Placement) -> None:
        """Go on in a slot with the state that was saved, or with what the cache has of it."""
        suspension = sequence.suspension
        assert suspension is not None
        if suspension.state is not None and suspension.n_past > place.n_keep:
            tokens = suspension.ids[: suspension.n_past]
            adapters = sequence.request.adapters
            try:
                if self._stepper.restore(place.slot, tokens, suspension.state, adapters):
                    place.source, place.n_keep = -1, suspension.n_past
            except StateError:  # it has emptied the slot; what is missing is computed again
                if place.source < 0:
                    place.n_keep = 0
        self._stepper.resume(place.slot, suspension.slot, place.source, place.n_keep)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget what a sequence would go on from."""
        if sequence.suspension is not None:
            self.n_bytes_left += len(sequence.suspension.state or b"")
            sequence.suspension = None
