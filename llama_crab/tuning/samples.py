"""Repeated measurements of one thing, and whether two of them differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Kind = Literal["rate", "seconds"]
    Verdict = Literal["faster", "slower", "same"]

# Makes the median absolute deviation of a normal distribution its standard deviation.
_MAD_TO_SIGMA = 1.4826
# The MAD of fewer values is often small by luck: then half of their range stands for the spread.
_LEAST_FOR_MAD = 6
# What a median may miss on one side, for both sides together.
_MISSED = 0.05


@dataclass(frozen=True)
class Samples:
    """Values of one point, one per round, in the order of the rounds.

    ``kind`` says which way is better: ``"rate"`` (per second, the default) or ``"seconds"``.
    Raises ValueError without values, or for one that is not finite and above 0.
    """

    values: tuple[float, ...]
    kind: Kind = "rate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if not self.values:
            raise ValueError("values: none were measured")
        for value in self.values:
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"values: {value} is not a finite number above 0")
        if self.kind not in ("rate", "seconds"):
            raise ValueError(f"kind: {self.kind!r} is not 'rate' or 'seconds'")

    @property
    def n(self) -> int:
        """Number of rounds."""
        return len(self.values)

    @property
    def median(self) -> float:
        """The median, in the values' unit."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Robust standard deviation in the values' unit: 1.4826 x MAD, half the range below 6."""
        return _spread(self.values)


@dataclass(frozen=True)
class Comparison:
    """How much faster the second of two `Samples` is.

    ``ratio`` is a speed: 1.1 is a tenth faster, for rates and for seconds. ``uncertainty`` is how
    far it may be off in the direction of 1, relatively; it is infinite below three rounds, which
    cannot tell. ``verdict`` is ``"same"`` whenever 1 lies within it; of two equal things, at most
    one comparison in nine says otherwise (3 or 4 rounds), from 5 rounds one in twenty.
    """

    ratio: float
    uncertainty: float

    @property
    def verdict(self) -> Verdict:
        """``"faster"``, ``"slower"`` or ``"same"``."""
        if abs(math.log(self.ratio)) <= self.uncertainty:
            return "same"
        return "faster" if self.ratio > 1.0 else "slower"

    def __str__(self) -> str:
        if not math.isfinite(self.uncertainty):
            return "? (fewer than 3 rounds)"
        if self.verdict == "same":
            return f"same within {self.uncertainty:.1%}"
        return f"{self.ratio:.3f}x ± {self.uncertainty:.1%} {self.verdict}"


def compare(before: Samples, after: Samples, *, paired: bool = True) -> Comparison:
    """Compare two measurements that took turns, round by round.

    Round i of one is compared with round i of the other, so that what slows a whole round (another
    program, heat) cancels out; a round that only one has is left out. With ``paired=False``, for
    runs at different times, the medians are compared and both spreads count.
    Raises ValueError for samples of different kinds.
    """
    if before.kind != after.kind:
        raise ValueError(f"kind: {before.kind} cannot be compared with {after.kind}")
    sign = 1.0 if before.kind == "rate" else -1.0
    if not paired:
        old, new = ([sign * math.log(value) for value in item.values] for item in (before, after))
        gain = statistics.median(new) - statistics.median(old)
        return Comparison(math.exp(gain), math.hypot(_reach(old, gain), _reach(new, -gain)))
    logs = [
        sign * math.log(new / old) for old, new in zip(before.values, after.values, strict=False)
    ]
    gain = statistics.median(logs)
    return Comparison(math.exp(gain), _reach(logs, -gain))


def _spread(values: Sequence[float]) -> float:
    if len(values) < _LEAST_FOR_MAD:
        return (max(values) - min(values)) / 2
    middle = statistics.median(values)
    return _MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in values)


def _reach(values: Sequence[float], towards: float) -> float:
    """Return how far the median of what gave `values` may lie on one side: the sign of `towards`.

    It is never less than the spread explains, which suits noise with a single peak. A machine that
    is now slow and now fast has two; then only the order of the values says something about their
    median (the interval of a sign test).
    """
    n, ordered, middle = len(values), sorted(values), statistics.median(values)
    if n < 3:
        return math.inf
    if n < _LEAST_FOR_MAD:
        width = (ordered[-1] - ordered[0]) / (1.0 if n == 3 else 2.0)
    else:
        width = 1.5 * _spread(values)
    bound = ordered[-1 - _n_beyond(n)] if towards > 0.0 else ordered[_n_beyond(n)]
    return max(width, abs(bound - middle))


def _n_beyond(n: int) -> int:
    """Return how many of `n` sorted values lie outside the interval of their median on a side."""
    # As logarithms: 2 ** n is beyond the floats for many rounds.
    log_p, missed = -n * math.log(2.0), 0.0
    for i in range(n // 2):
        missed += 2.0 * math.exp(log_p)
        if missed > _MISSED:
            return max(0, i - 1)
        log_p += math.log((n - i) / (i + 1))
    return max(0, n // 2 - 1)
