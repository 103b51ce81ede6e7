"""Two settings measured in turn until it is known which one is faster.

The speed of a shared machine drifts by a quarter within the hour, so only what was measured side by
side is compared: each round measures both, in alternating order, and gives one ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Verdict = Literal["faster", "slower", "same", "open"]

# Below it a difference is not worth a setting of its own.
MIN_GAIN = 0.01
# Standard errors that decide. Every round is a look, and each look may err, so it is more than 2.
_DECIDES = 2.6
# It takes less to give up: the loss is what the candidate would have gained, which is small then.
_GIVES_UP = 1.3
# The median of normal values has a standard error that is larger than the mean's by this factor.
_MEDIAN = 1.2533
_MAD = 1.4826
# What a pair of measurements differs by before any was seen: 3 %, as much as a quiet machine shows.
_PRIOR = (0.02,) * 4
# A first round that says "half as fast" is believed, so that hopeless candidates cost one round.
_HOPELESS = math.log(2.0)


class Noise:
    """The spread of the paired ratios of all races so far.

    One race has too few rounds to know its own spread, but all races run on the same machine. It is
    taken from differences of neighbouring rounds by their median: a burst of other work moves it
    little, and neither does drift.
    """

    def __init__(self) -> None:
        self._moves = list(_PRIOR)

    def add(self, before: float, after: float) -> None:
        """Take note of two neighbouring log ratios of one race."""
        self._moves.append(abs(after - before) / math.sqrt(2.0))

    @property
    def sigma(self) -> float:
        """The standard deviation of one log ratio."""
        return max(_MAD * statistics.median(self._moves), 1e-6)


@dataclass(frozen=True)
class Standing:
    """What a race says so far: the candidate's gain in speed and its uncertainty, both relative."""

    verdict: Verdict
    gain: float
    uncertainty: float


def standing(log_ratios: Sequence[float], noise: Noise, *, last: bool = False) -> Standing:
    """Judge a race from the log ratios of its rounds, incumbent's seconds over candidate's.

    "open" asks for another round; with `last` there is none, and what is not decided is "same".
    """
    n = len(log_ratios)
    middle = statistics.median(log_ratios)
    error = noise.sigma * (_MEDIAN if n > 2 else 1.0) / math.sqrt(n)
    # Of two rounds one may be a burst: they count for what both of them say.
    cautious = middle if n > 2 else _nearest_zero(log_ratios)
    verdict: Verdict = "same" if last else "open"
    if n == 1:
        if middle < -max(_HOPELESS, 4 * error):
            verdict = "slower"
    elif cautious > max(_DECIDES * error, MIN_GAIN):
        verdict = "faster"
    elif cautious < -_DECIDES * error:
        verdict = "slower"
    elif n >= 3 and middle + _GIVES_UP * error < MIN_GAIN:
        verdict = "same"
    return Standing(verdict, math.expm1(middle), _DECIDES * error)


def _nearest_zero(values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return 0.0 if low <= 0.0 <= high else min(low, high, key=abs)
