"""Search for fast settings one lever at a time; pure: it knows a clock and something to measure.

Coordinate search: each lever's values race against the best settings so far, in order, until it
gets slower; then the next lever, and again from the first one until nothing changes. Nothing is
measured that would not fit before the deadline together with the final check.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .race import Noise, Standing, standing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Protocol

    Point = Mapping[str, Any]
    Ended = Literal["converged", "budget", "interrupted"]

    class Surface(Protocol):
        """What is searched: settings with a speed."""

        def setup_sec(self, point: Point) -> float:
            """Return what preparing `point` will take by what is known, 0.0 if it is ready."""

        def prepare(self, point: Point) -> None:
            """Make `point` ready; raise `InfeasibleError` where that cannot be done."""

        def measure(self, point: Point) -> float:
            """Return the seconds of a unit of work, less is better."""

        def repair(self, point: Point, lever: str) -> Point | None:
            """Return `point` with what the new value of `lever` needs, None if it cannot be."""


MAX_ROUNDS = 15
_FINAL_ROUNDS = (3, 7)
_MAX_PASSES = 4
# Who lost by less races once more when all else is done, and for that many rounds at least: first
# races are short, and know least of the machine's noise.
_CLOSE = -0.1
_SECOND_LOOK = 7
# A candidate that was never measured may well be slower than the best settings.
_UNSEEN = 1.5
# Neighbours in a row that may be no different before a walk ends; a clear loss ends it at once.
_PATIENCE = 3


class InfeasibleError(Exception):
    """These settings cannot be measured; the message says why in a few words."""


@dataclass(frozen=True)
class Lever:
    """Something that can be set, with the values to try.

    Where `ordered`, neighbours behave alike, so that a walk can stop where it gets slower.
    """

    name: str
    candidates: tuple[Any, ...]
    ordered: bool = True


@dataclass(frozen=True)
class Step:
    """One race: the value of a lever against another one, and what came of it."""

    lever: str
    before: Any
    after: Any
    verdict: str
    """kept, slower, same (the difference is within the spread) or infeasible"""
    gain: float = 0.0
    uncertainty: float = 0.0
    n_rounds: int = 0
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the new value was kept."""
        return self.verdict == "kept"


@dataclass
class SearchResult:
    """Where the search began and what is best, with the way there and the final check."""

    start: Point
    best: Point
    """the settings to use: `start` again where the final check does not find them faster"""
    steps: list[Step] = field(default_factory=list)
    ended: Ended = "converged"
    before: tuple[float, ...] = ()
    """seconds of `start` in the final check, one per round"""
    after: tuple[float, ...] = ()
    """seconds of what the races found best, measured in turn with `before`"""
    found: Point | None = None
    """what the races found best"""
    confirmed: bool = False
    """whether the final check was made, so that `best` rests on it"""
    gain: float = 0.0
    uncertainty: float = 0.0
    n_measured: int = 0


def search(
    levers: Sequence[Lever],
    start: Point,
    surface: Surface,
    *,
    clock: Callable[[], float],
    deadline: float,
    listener: Callable[[Step], None] | None = None,
) -> SearchResult:
    """Return the fastest settings that races from `start` find before `deadline`.

    `deadline` is a time of `clock`, in seconds. It is passed by one measurement at most: each is
    planned by what those before it took, the first one by the surface's `setup_sec`. Ctrl-C ends
    the search with what is best so far.
    Raises InfeasibleError where `start` cannot be measured.
    """
    return _Search(levers, start, surface, clock, deadline, listener).run()


class _OutOfTime(Exception):
    pass


class _Search:
    def __init__(
        self,
        levers: Sequence[Lever],
        start: Point,
        surface: Surface,
        clock: Callable[[], float],
        deadline: float,
        listener: Callable[[Step], None] | None,
    ) -> None:
        self._levers = levers
        self._surface = surface
        self._clock = clock
        self._deadline = deadline
        self._listener = listener
        self._noise = Noise()
        self._costs: dict[Any, list[float]] = {}
        # Only ever replaced by what is faster: who lost once need not race again.
        self._best = start
        self._lost: dict[Any, Step] = {}
        self._least_rounds = 1
        self._result = SearchResult(start, start)

    def run(self) -> SearchResult:
        result = self._result
        try:
            try:
                self._measure(result.start, reserve=False)
                self._passes()
                self._lost = {key: step for key, step in self._lost.items() if step.gain < _CLOSE}
                self._least_rounds = _SECOND_LOOK
                self._passes()
            except _OutOfTime:
                result.ended = "budget"
            result.best = result.found = self._best
            if _key(self._best) != _key(result.start):
                self._confirm()
        except KeyboardInterrupt:
            result.ended = "interrupted"
            result.best = result.found = self._best
        return result

    def _passes(self) -> None:
        for _ in range(_MAX_PASSES):
            before = _key(self._best)
            for lever in self._levers:
                self._examine(lever)
            if _key(self._best) == before:
                return

    def _examine(self, lever: Lever) -> None:
        if not lever.ordered:
            for value in lever.candidates:
                self._try(lever, value)
            return
        home = lever.candidates.index(self._best[lever.name])
        for direction in (1, -1):
            misses, i = 0, home + direction
            while 0 <= i < len(lever.candidates) and misses < _PATIENCE:
                verdict = self._try(lever, lever.candidates[i])
                if verdict in ("slower", "infeasible"):
                    break
                misses = 0 if verdict == "kept" else misses + 1
                i += direction
            # What grew in one direction need not be looked for in the other one.
            if self._best[lever.name] != lever.candidates[home]:
                return

    def _try(self, lever: Lever, value: Any) -> str:
        """Race one value of a lever against the best settings; return the step's verdict."""
        current = self._best[lever.name]
        if value == current:
            return "same"
        point = self._surface.repair({**self._best, lever.name: value}, lever.name)
        if point is None:
            return "same"
        known = self._lost.get(_key(point))
        if known is not None:
            return known.verdict
        try:
            step = self._race(lever.name, current, point)
        except _OutOfTime:
            # Another lever's value may cost less: a thread count needs no new context.
            self._result.ended = "budget"
            return "same"
        except InfeasibleError as error:
            step = Step(lever.name, current, value, "infeasible", -1.0, note=str(error))
        if step.kept:
            self._best = point
        else:
            self._lost[_key(point)] = step
        self._result.steps.append(step)
        if self._listener is not None:
            self._listener(step)
        return step.verdict

    def _race(self, name: str, current: Any, point: Point) -> Step:
        ratios: list[float] = []
        while True:
            self._round(self._best, point, ratios)
            found = standing(ratios, self._noise, last=len(ratios) >= MAX_ROUNDS)
            if found.verdict == "faster":
                break
            if found.verdict != "open" and (
                len(ratios) >= self._least_rounds or found.gain < 2 * _CLOSE
            ):
                break
        verdict = "kept" if found.verdict == "faster" else found.verdict
        changed = [key for key in point if point[key] != self._best[key] and key != name]
        note = ", ".join(f"with {key} {point[key]}" for key in changed)
        return Step(
            name, current, point[name], verdict, found.gain, found.uncertainty, len(ratios), note
        )

    def _round(
        self, one: Point, other: Point, ratios: list[float], *, reserve: bool = True
    ) -> tuple[float, float]:
        # Whoever comes second finds the caches and the clock rate as the first one left them.
        if len(ratios) % 2:
            after = self._measure(other, reserve=reserve)
            before = self._measure(one, reserve=reserve)
        else:
            before = self._measure(one, reserve=reserve)
            after = self._measure(other, reserve=reserve)
        ratios.append(math.log(before / after))
        if len(ratios) > 1:
            self._noise.add(*ratios[-2:])
        return before, after

    def _confirm(self) -> None:
        """Measure where we began against where we are, in turn, and believe that."""
        result = self._result
        least, most = _FINAL_ROUNDS
        ratios: list[float] = []
        pairs: list[tuple[float, float]] = []
        found: Standing | None = None
        try:
            while len(ratios) < most:
                pairs.append(self._round(result.start, self._best, ratios, reserve=False))
                found = standing(ratios, self._noise, last=len(ratios) == most)
                # A gain that the races have found is not given up on three rounds.
                if len(ratios) >= least and found.verdict == "faster":
                    break
        except _OutOfTime:
            if result.ended == "converged":
                result.ended = "budget"
            if ratios:
                found = standing(ratios, self._noise, last=True)
        if found is None or len(ratios) < 2:
            return
        result.before, result.after = zip(*pairs, strict=True)
        result.gain, result.uncertainty = found.gain, found.uncertainty
        result.confirmed = True
        if found.verdict != "faster":
            result.best = result.start

    def _measure(self, point: Point, *, reserve: bool = True) -> float:
        """Measure `point` once if that still fits; to `reserve`, with the final check behind it."""
        planned = self._surface.setup_sec(point) + self._cost(point)
        if reserve:
            start = self._result.start
            planned += self._surface.setup_sec(start)
            planned += _FINAL_ROUNDS[0] * (self._cost(start) + self._cost(point))
        if self._clock() + planned > self._deadline:
            raise _OutOfTime
        self._surface.prepare(point)
        started = self._clock()
        seconds = self._surface.measure(point)
        self._costs.setdefault(_key(point), []).append(self._clock() - started)
        self._result.n_measured += 1
        return seconds

    def _cost(self, point: Point) -> float:
        known = self._costs.get(_key(point))
        if known:
            return statistics.median(known)
        best = self._costs.get(_key(self._best))
        return _UNSEEN * statistics.median(best) if best else 0.0


def _key(point: Point) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))
