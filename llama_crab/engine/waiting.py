"""Sequences that wait for a slot, the most urgent first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from .request import Request, Sequence


class WaitingLine:
    """A priority queue by `Request.rank`; equal ranks keep their order of arrival.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._arrivals = itertools.count()
        self._members: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence; one that is in the line already stays where it is."""
        if sequence not in self._members:
            self._members[sequence] = None
            entry = (sequence.request.rank, next(self._arrivals), sequence)
            heapq.heappush(self._heap, entry)

    def first(self) -> Sequence | None:
        """Return the most urgent sequence, which stays in the line; None when nobody waits."""
        while self._heap:
            sequence = self._heap[0][2]
            if sequence in self._members:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; does nothing when it is not in the line."""
        self._members.pop(sequence, None)
        if self._heap and self._heap[0][2] is sequence:
            heapq.heappop(self._heap)

    def remove_request(self, request: Request) -> None:
        """Take all sequences of a request out."""
        for sequence in request.sequences:
            self.remove(sequence)
