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

        An empty slot is preferred to one whose content would be lost for nothing.
        """
        best = max(
            (
                (self._stepper.reusable_prefix(slot, prompt), -self._used[slot], slot)
                for slot in idle
            ),
        )
        return best[2], best[0]

    def evict(self, idle: Iterable[int]) -> bool:
        """Remove the least recently used content from memory; return False if there is none."""
        held = [slot for slot in idle if self._stepper.progress(slot)[2] > 0]
        if not held:
            return False
        slot = min(held, key=self._used.__getitem__)
        self._stepper.clear(slot)
        self._used[slot] = 0
        return True
