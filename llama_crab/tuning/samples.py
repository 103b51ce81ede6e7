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

    ``ratio`` is a speed: 1.1 is a tenth faster, for rates and for seconds. ``uncertainty`` is the
    relative half width around it, infinite below three rounds, which cannot tell. ``verdict`` is
    ``"same"`` whenever 1 lies within it; of two equal things, at most one comparison in eight says
    otherwise (3 to 7 rounds, normal noise), fewer the more rounds there are.
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
            return f"{self.ratio:.3f}x ± ? ({self.verdict})"
        return f"{self.ratio:.3f}x ± {self.uncertainty:.1%} ({self.verdict})"


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
        ratio = (after.median / before.median) ** sign
        widths = (_half_width(before.values), _half_width(after.values))
        return Comparison(ratio, math.hypot(widths[0] / before.median, widths[1] / after.median))
    logs = [
        sign * math.log(new / old) for old, new in zip(before.values, after.values, strict=False)
    ]
    ratio = math.exp(statistics.median(logs))
    return Comparison(ratio, _half_width(logs))


def _spread(values: Sequence[float]) -> float:
    if len(values) < _LEAST_FOR_MAD:
        return (max(values) - min(values)) / 2
    middle = statistics.median(values)
    return _MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in values)


def _half_width(values: Sequence[float]) -> float:
    """Return how far a median of these values may be off by chance."""
    if len(values) < 3:
        return math.inf
    if len(values) < _LEAST_FOR_MAD:
        return (max(values) - min(values)) / (1.0 if len(values) == 3 else 2.0)
    return 1.5 * _spread(values)
