"""Which slot a new sequence gets: the one that already holds most of its prompt."""

from __future__ import annotations

from collections.abc import Iterable

from .._core import Stepper


class PrefixCache:
    """What idle slots keep in memory, by recency of use.

    Each slot of the context keeps the tokens of its last request. A request with the same
    beginning takes that slot and prefills the difference only.
    """

    __slots__ = ("_clock", "_stepper", "_used")

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._used = [0] * stepper.n_slots
        self._clock = 0

    def touch(self, slot: int) -> None:
        """Note that `slot` was used just now."""
        self._clock += 1
        self._used[slot] = self._clock

    def best(self, idle: Iterable[int], prompt: list[int]) -> tuple[int, int]:
        """Return ``(slot, n_keep)``: the longest reusable prefix, else the least recently used.

        A prefix counts when it is most of the slot's content or of the prompt: sharing only a BOS
        is no reason to give up a long conversation while another slot is free.
        """
        n_keep = {slot: self._stepper.reusable_prefix(slot, prompt) for slot in idle}

        def worth(slot: int) -> tuple[int, int]:
            n_held = self._stepper.progress(slot)[2]
            counts = 2 * n_keep[slot] > min(n_held, len(prompt))
            return n_keep[slot] if counts else 0, -self._used[slot]

        slot = max(n_keep, key=worth)
        return slot, n_keep[slot]

    def evict(self, idle: Iterable[int]) -> bool:
        """Remove the least recently used content from memory; return False if there is none."""
        held = [slot for slot in idle if self._stepper.progress(slot)[2] > 0]
        if not held:
            return False
        slot = min(held, key=self._used.__getitem__)
        self._stepper.clear(slot)
        self._used[slot] = 0
        return True
