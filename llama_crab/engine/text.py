"""Bytes of tokens to text: whole characters only, and stop strings across token borders."""

from __future__ import annotations

import codecs


class TextStream:
    """The text of one sequence as it grows.

    Bytes come in as tokens give them; text goes out when it is certain: complete UTF-8 characters
    that cannot become part of a stop string. Bytes that are no UTF-8 become U+FFFD.
    """

    __slots__ = (
        "_decoder",
        "_firsts",
        "_include_stop",
        "_longest",
        "_pending",
        "_stops",
        "end",
        "stop",
    )

    def __init__(self, stops: tuple[str, ...], include_stop: bool = False) -> None:
        self._stops = tuple(stop.encode() for stop in stops)
        self._longest = max(map(len, self._stops), default=0)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = b""
        self.stop: str | None = None
        """The stop string that was met."""
        self.end = 0
        """Bytes of the answer that were given out or are certain; final once `stop` is set."""

    def push(self, data: bytes) -> str:
        """Take more bytes; return the text that is certain now."""
        if self.stop is not None:
            return ""
        if not self._stops:
            self.end += len(data)
            return self._decoder.decode(data)
        self._pending += data
        hit = self._find_stop()
        if hit is not None:
            at, stop = hit
            self.stop = stop.decode()
            sure = self._pending[: at + len(stop) if self._include_stop else at]
            self._pending = b""
            self.end += len(sure)
            return self._decoder.decode(sure, final=True)
        keep = self._possible_stop()
        sure, self._pending = self._pending[:keep], self._pending[keep:]
        self.end += len(sure)
        return self._decoder.decode(sure)

    def flush(self) -> str:
        """Return what was held back; nothing more will come."""
        if self.stop is not None:
            return ""
        rest, self._pending = self._pending, b""
        self.end += len(rest)
        return self._decoder.decode(rest, final=True)

    def n_tokens(self, start: int, ends: list[int]) -> int:
        """Return how many tokens gave at least one byte of the certain text.

        The tokens follow each other from byte `start`; `ends` are the offsets behind them.
        """
        return sum(begin < self.end for begin in [start, *ends[:-1]][: len(ends)])

    def _find_stop(self) -> tuple[int, bytes] | None:
        """Return the stop string that is complete first; of several that end together, the longest.

        So the answer does not depend on where the tokens' borders are.
        """
        hits = [(self._pending.find(stop), stop) for stop in self._stops]
        complete = [hit for hit in hits if hit[0] >= 0]
        return min(complete, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)

    def _possible_stop(self) -> int:
        """Return where a stop string may have begun that later bytes complete; else the end."""
        pending = self._pending
        for at in range(max(0, len(pending) - self._longest + 1), len(pending)):
            if pending[at] in self._firsts:
                tail = pending[at:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return at
        return len(pending)
