"""What each sampler stage means, in float64 numpy: the definition the executors are tested against.

Written from the papers and from what `SamplerChain` documents, not ported: logits are the exact
values of the float32 row, parameters the float32 values that C receives, everything after that is
double precision. Only the use of random numbers copies libstdc++, so that draws can be compared.

A float32 executor may decide differently where a value lies on a threshold. Each truncation reports
such candidates (`Draw.doubtful`), with the tolerances below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_crab.sampling_stages import Stage

Ids = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

# A decision is in doubt within this of a cumulative threshold, or (relatively) of a logit one.
TOLERANCE = 1e-6
# Relative error of a float32 logit that went through a few operations.
ROUNDING = 3e-7


class NoCandidateError(ValueError):
    """The row has no candidate, or a value that is no logit."""


class Mt19937:
    """`std::mt19937` with libstdc++'s `generate_canonical`."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def word(self) -> int:
        return int.from_bytes(self._state.bytes(4), "little")

    def double(self) -> float:
        """Return a number in [0, 1) from two words, the low one first."""
        low, high = float(self.word()), float(self.word())
        return min((low + high * 2.0**32) / 2.0**64, float(np.nextafter(1.0, 0.0)))

    def single(self) -> float:
        """Return a float32 number in [0, 1) from one word."""
        value = np.float32(self.word()) / np.float32(2.0**32)
        return min(float(value), float(np.nextafter(np.float32(1), np.float32(0))))


@dataclass
class Candidates:
    """The state between stages: candidates in their order, -inf ("dead") ones included.

    `keys` is what the order was made by, ascending up to `slack`, the error a float32 executor may
    make. `scale` bounds the logits that rounding acts on: 0 while they are the row's own.
    """

    ids: Ids
    logits: Reals
    keys: Reals
    slack: Reals
    is_sorted: bool = False
    scale: float = 0.0

    @classmethod
    def of_row(cls, row: Any) -> Candidates:
        logits = np.asarray(row, np.float32).astype(np.float64)
        if np.isnan(logits).any() or not logits.max() < np.inf or logits.max() == -np.inf:
            raise NoCandidateError("the row is all -inf, or has NaN or +inf")
        ids = np.arange(logits.size)
        return cls(ids, logits, ids.astype(np.float64), np.zeros(logits.size))

    @property
    def n(self) -> int:
        return int(self.ids.size)

    @property
    def best(self) -> float:
        return float(self.logits.max())

    def log_p(self) -> Reals:
        shifted = self.logits - self.best
        result: Reals = shifted - np.log(np.exp(shifted).sum())
        return result

    def p(self) -> Reals:
        weights = np.exp(self.logits - self.best)
        result: Reals = weights / weights.sum()
        return result

    def keep(self, index: npt.NDArray[Any] | slice) -> None:
        self.ids, self.logits = self.ids[index], self.logits[index]
        self.keys, self.slack = self.keys[index], self.slack[index]

    def sort(self) -> None:
        """Order by logit, descending; of equal ones the smaller id first."""
        if not self.is_sorted:
            self.keep(np.lexsort((self.ids, -self.logits)))
            self.keys = -self.logits
            self.slack = np.abs(self.logits) * (TOLERANCE if self.scale else 0.0)
            self.slack[np.isinf(self.slack) | np.isnan(self.slack)] = 0.0
            self.is_sorted = True

    def reweigh(self, logits: Reals, factor: float = 1.0) -> None:
        """Replace the logits by computed ones."""
        self.logits = logits
        seen = np.abs(logits[logits > self.best - 80.0])
        self.scale = max(self.scale, factor * float(seen.max())) if seen.size else self.scale

    @property
    def cumulative_tolerance(self) -> float:
        return TOLERANCE + ROUNDING * self.scale

    def logit_tolerance(self, *values: float) -> float:
        size = max((abs(value) for value in values if np.isfinite(value)), default=0.0)
        return TOLERANCE * max(size, self.scale)


@dataclass
class Draw:
    """One draw: the live candidates in their order, with their final probabilities."""

    ids: Ids
    p: Reals
    selected: int
    keys: Reals
    slack: Reals
    # Relative error that float32 logits may cause in p.
    rtol: float
    # Ids that a decision on a threshold kept or dropped, and whether later stages build on one.
    doubtful: frozenset[int]
    is_blurred: bool


@dataclass
class _Doubts:
    ids: set[int] = field(default_factory=set)
    stages: list[int] = field(default_factory=list)
    stage: int = 0

    def add(self, ids: Iterable[int]) -> None:
        found = {int(token) for token in ids}
        if found:
            self.ids |= found
            self.stages.append(self.stage)


# After a doubt these only carry the set on; every other stage decides by it.
_CARRIERS = frozenset({"temp", "dist", "greedy", "logit_bias", "penalties", "dry"})


class Oracle:
    """The stages with their state, like a compiled chain; `n_vocab` is mirostat's.

    `breakers` gives the token ids that contain one of a dry stage's strings (one byte each).
    """

    def __init__(
        self,
        stages: Iterable[Stage],
        n_vocab: int,
        seed: int,
        breakers: Mapping[tuple[str, ...], frozenset[int]] | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self._n_vocab = n_vocab
        self._seed = seed
        self._breakers = breakers or {}
        self._doubts = _Doubts()
        self.reset()

    def reset(self) -> None:
        self._history: list[int] = []
        self._rng: dict[int, Mt19937] = {}
        self._mu: dict[int, float] = {}
        self._average: dict[int, tuple[float, float]] = {}
        self._pending: dict[int, tuple[int, float]] = {}
        for index, stage in enumerate(self.stages):
            params = _params(stage)
            if "seed" in params:
                own = stage.params["seed"]
                self._rng[index] = Mt19937(self._seed if own is None else own)
            if "tau" in params:
                self._mu[index] = 2.0 * params["tau"]
            if stage.name == "adaptive_p":
                rest = 1.0 - params["decay"]
                self._average[index] = (params["target"] / rest, 1.0 / rest)

    def clone(self) -> Oracle:
        return copy.deepcopy(self)

    def accept(self, token: int) -> None:
        self._history.append(token)
        for index, (chosen, p) in self._pending.items():
            if chosen == token:
                weighted, total = self._average[index]
                decay = _params(self.stages[index])["decay"]
                self._average[index] = (p + decay * weighted, 1.0 + decay * total)
        self._pending.clear()

    def select(self, row: Any) -> int:
        """Apply, take the token, accept it."""
        token = self.apply(row).selected
        self.accept(token)
        return token

    def apply(self, row: Any) -> Draw:
        """Run all stages over a row; the selector draws. Raises NoCandidateError."""
        state = Candidates.of_row(row)
        self._doubts = _Doubts()
        with np.errstate(all="ignore"):
            for index, stage in enumerate(self.stages[:-1]):
                self._doubts.stage = index
                getattr(self, f"_{stage.name}")(state, index, **_params(stage))
                if state.best == -np.inf:
                    raise NoCandidateError("no candidate is left")
            index, stage = len(self.stages) - 1, self.stages[-1]
            self._doubts.stage = index
            choose: Callable[..., tuple[int, Reals]] = getattr(self, f"_{stage.name}")
            position, p = choose(state, index, **_params(stage))
        live = state.logits > -np.inf
        first = min(self._doubts.stages, default=len(self.stages))
        return Draw(
            ids=state.ids[live],
            p=p[live],
            selected=int(state.ids[position]),
            keys=state.keys[live],
            slack=state.slack[live],
            rtol=10 * TOLERANCE + ROUNDING * state.scale,
            doubtful=frozenset(self._doubts.ids),
            is_blurred=any(later.name not in _CARRIERS for later in self.stages[first + 1 :]),
        )

    # Truncation.

    def _top_k(self, state: Candidates, index: int, k: int) -> None:
        if k == 0:
            return
        state.sort()
        if k < state.n and state.scale:
            cut = float(state.logits[k - 1])
            self._doubt_near(state, cut, state.logit_tolerance(cut), 2)
        state.keep(slice(k))

    def _top_p(self, state: Candidates, index: int, p: float, min_keep: int) -> None:
        if p >= 1.0:
            return
        state.sort()
        mass = np.cumsum(state.p())
        self._keep_mass(state, mass, mass >= p, p, min_keep)

    def _keep_mass(
        self, state: Candidates, mass: Reals, reached: npt.NDArray[Any], p: float, min_keep: int
    ) -> None:
        """Keep the prefix that ends with the first reached mass, of at least `min_keep`."""
        count = np.arange(1, state.n + 1)
        ends = np.flatnonzero(reached & (count >= min_keep))
        near = np.flatnonzero((np.abs(mass - p) <= state.cumulative_tolerance)[:-1]) + 1
        self._doubts.add(state.ids[near[near >= min_keep]])
        state.keep(slice(int(ends[0]) + 1 if ends.size else state.n))

    def _min_p(self, state: Candidates, index: int, p: float, min_keep: int) -> None:
        if p <= 0.0:
            return
        threshold = state.best + float(np.log(p))
        tolerance = state.logit_tolerance(state.best, np.log(p))
        if p < 1.0 or state.scale:
            self._doubt_near(state, threshold, tolerance, 1)
        passing = state.logits >= threshold
        if not state.is_sorted and passing.sum() >= max(1, min_keep):
            state.keep(passing)
        else:
            state.sort()
            state.keep(slice(max(int(passing.sum()), min_keep)))

    def _typical(self, state: Candidates, index: int, p: float, min_keep: int) -> None:
        if p >= 1.0:
            return
        log_p, probabilities = state.log_p(), state.p()
        live = state.logits > -np.inf
        entropy = -float((probabilities[live] * log_p[live]).sum())
        score = np.full(state.n, np.inf)
        score[live] = np.abs(-log_p[live] - entropy)
        order = np.lexsort((state.ids, -probabilities, score))
        state.keep(order)
        state.keys = score[order]
        size = np.where(live, np.abs(log_p), 0.0)[order]
        state.slack = 2 * TOLERANCE * (1.0 + size + state.scale + entropy)
        state.is_sorted = False
        mass = np.cumsum(probabilities[order])
        last = int(np.flatnonzero(np.append(mass > p, True))[0])
        if last < state.n:
            # Candidates that rounding may put to the other side of the last one kept.
            close = np.abs(state.keys - state.keys[last]) <= state.slack
            if close.sum() > 1:
                self._doubts.add(state.ids[close])
        self._keep_mass(state, mass, mass > p, p, max(min_keep, 1))

    def _xtc(
        self, state: Candidates, index: int, p: float, t: float, min_keep: int, seed: float
    ) -> None:
        if p <= 0.0 or t > 0.5 or state.n < 2:
            return
        if self._rng[index].single() > p:
            return
        state.sort()
        probabilities = state.p()
        drop = max(int((probabilities >= t).sum()) - 1, 0)
        near = np.flatnonzero(np.abs(probabilities - t) <= t * state.cumulative_tolerance)
        self._doubts.add(state.ids[np.union1d(near, np.maximum(near - 1, 0))])
        if drop and state.n - drop >= min_keep:
            state.keep(slice(drop, None))

    def _top_n_sigma(self, state: Candidates, index: int, n: float) -> None:
        if n <= 0.0 or state.n <= 1:
            return
        finite = state.logits[state.logits > -np.inf]
        sigma = float(finite.std())
        threshold = state.best - n * sigma
        tolerance = state.logit_tolerance(state.best, finite.mean(), n * sigma)
        self._doubt_near(state, threshold, tolerance, 1)
        if sigma > 0.0 and not 1e-30 < sigma**2 * finite.size < 1e37:
            self._doubts.add(state.ids)  # in float32 the variance is 0 or infinite
        state.logits = np.where(state.logits < threshold, -np.inf, state.logits)

    def _doubt_near(self, state: Candidates, value: float, tolerance: float, least: int) -> None:
        near = np.abs(state.logits - value) <= tolerance
        if near.sum() >= least:
            self._doubts.add(state.ids[near])

    # Reweighting.

    def _temp(self, state: Candidates, index: int, t: float) -> None:
        if t > 0.0:
            if t != 1.0:
                state.reweigh(state.logits / t)
            return
        best = int(state.logits.argmax())
        logits = np.full(state.n, -np.inf)
        logits[best] = state.logits[best]
        if state.scale:
            self._doubt_near(state, float(logits[best]), state.logit_tolerance(logits[best]), 2)
        state.logits = logits

    def _temp_ext(
        self, state: Candidates, index: int, t: float, delta: float, exponent: float
    ) -> None:
        if delta <= 0.0:
            self._temp(state, index, t)
            return
        if state.n <= 1:
            return
        state.sort()
        log_p, p = state.log_p(), state.p()
        live = p > 0.0
        entropy = -float((p[live] * log_p[live]).sum())
        low, high = max(0.0, t - delta), t + delta
        actual = low + (high - low) * max(entropy / np.log(state.n), 0.0) ** exponent
        if actual < TOLERANCE:
            self._doubts.add(state.ids[1:])  # float32 may round to 0, or overflow
        if actual <= 0.0:
            self._temp(state, index, 0.0)
        else:
            # float32 knows 1 - p to 6e-8 only, which is much of a small entropy.
            state.reweigh(state.logits / actual, 1.0 + exponent * (1.0 + 0.5 / (entropy + 1e-9)))

    def _penalties(
        self,
        state: Candidates,
        index: int,
        penalty_last_n: int,
        penalty_repeat: float,
        penalty_freq: float,
        penalty_present: float,
    ) -> None:
        if self.stages[index].is_noop:
            return
        counts: dict[int, int] = {}
        for token in self._history[-penalty_last_n:]:
            counts[token] = counts.get(token, 0) + 1
        logits = state.logits.copy()
        for token, count in counts.items():
            for position in np.flatnonzero(state.ids == token):
                logit = logits[position]
                logit = logit * penalty_repeat if logit <= 0.0 else logit / penalty_repeat
                logits[position] = logit - count * penalty_freq - penalty_present
        if counts:
            state.reweigh(logits)
        state.is_sorted = False

    def _dry(
        self,
        state: Candidates,
        index: int,
        dry_multiplier: float,
        dry_base: float,
        dry_allowed_length: int,
        dry_penalty_last_n: int,
        seq_breakers: tuple[str, ...],
    ) -> None:
        if self.stages[index].is_noop:
            return
        breakers = self._breakers[seq_breakers] if seq_breakers else frozenset[int]()
        text = self._history[-dry_penalty_last_n:]
        # A repetition does not reach back over a breaker.
        limit = next((i for i, token in enumerate(reversed(text)) if token in breakers), len(text))
        longest: dict[int, int] = {}
        for end in range(len(text) - 1):
            length = 0
            while length < min(end + 1, limit) and text[end - length] == text[-1 - length]:
                length += 1
            if length >= dry_allowed_length and text[end + 1] not in breakers:
                longest[text[end + 1]] = max(length, longest.get(text[end + 1], 0))
        state.is_sorted = False
        if not longest:
            return
        most = int(88.7228391 / np.log(dry_base)) if dry_base > 1.000001 else 1 << 30
        logits = state.logits.copy()
        for token, length in longest.items():
            power = min(length - dry_allowed_length, most)
            logits[state.ids == token] -= dry_multiplier * dry_base**power
        state.reweigh(logits)

    def _logit_bias(
        self, state: Candidates, index: int, logit_bias: tuple[tuple[int, float], ...]
    ) -> None:
        was_sorted = state.is_sorted
        logits = state.logits.copy()
        for token, bias in logit_bias:
            logits[state.ids == token] += float(np.float32(bias))
        state.reweigh(logits)
        if was_sorted:
            state.is_sorted = False
            state.sort()

    # Selectors: the position chosen and the probabilities it was drawn from.

    def _greedy(self, state: Candidates, index: int) -> tuple[int, Reals]:
        return int(state.logits.argmax()), state.p()

    def _dist(self, state: Candidates, index: int, seed: float) -> tuple[int, Reals]:
        u = self._rng[index].double()
        weights = np.exp(state.logits - state.best)
        running = np.cumsum(weights)
        position = int(np.searchsorted(running, running[-1] * u, side="left"))
        return position, weights / running[-1]

    def _discrete(self, p: Reals, index: int) -> int:
        """Draw like `std::discrete_distribution`, which draws nothing for one candidate."""
        if p.size < 2:
            return 0
        running = np.cumsum(p / p.sum())
        running[-1] = 1.0
        return int(np.searchsorted(running, self._rng[index].double(), side="left"))

    def _observe(self, state: Candidates, index: int, tau: float, eta: float) -> tuple[int, Reals]:
        """Draw, and move mu by how far the surprise was from tau."""
        p = state.p()
        position = self._discrete(p, index)
        self._mu[index] -= eta * (-float(np.log2(p[position])) - tau)
        return position, p

    def _mirostat(
        self, state: Candidates, index: int, seed: float, tau: float, eta: float, m: int
    ) -> tuple[int, Reals]:
        state.sort()
        n = min(m - 1, state.n - 1)
        rank = np.arange(1, n + 1)
        t, b = np.log((rank + 1) / rank), state.logits[:n] - state.logits[1 : n + 1]
        s = np.float64((t * b).sum()) / np.float64((t * t).sum())
        epsilon = s - 1.0
        x = epsilon * np.power(2.0, self._mu[index]) / (1.0 - np.power(self._n_vocab, -epsilon))
        k = float(np.power(x, 1.0 / s))
        # A value beyond int32 becomes its smallest number, so one candidate is kept.
        kept = max(int(k), 1) if k < 2.0**31 else 1
        if 0.0 < s < np.inf:
            error = 10 * TOLERANCE * (1.0 + state.scale)
            error = min(error * (1.0 + (1.0 + abs(float(np.log(x)))) / float(s)), 1.0)
            least, most = k * (1.0 - error), k * (1.0 + error)
            if most < 2.0**31:
                self._doubts.add(state.ids[max(int(least), 1) : max(int(most), 1)])
            elif least < 2.0**31:
                self._doubts.add(state.ids[1:])
            if b.sum() > 80.0:
                self._doubts.add(state.ids[1:])  # float32 has p = 0 there, and an infinite step
        state.keep(slice(kept))
        return self._observe(state, index, tau, eta)

    def _mirostat_v2(
        self, state: Candidates, index: int, seed: float, tau: float, eta: float
    ) -> tuple[int, Reals]:
        state.sort()
        surprise = -state.log_p() / np.log(2.0)
        mu = self._mu[index]
        tolerance = 10 * TOLERANCE * (1.0 + abs(mu)) + 2 * state.cumulative_tolerance
        near = np.flatnonzero(np.abs(surprise - mu) <= tolerance)
        self._doubts.add(state.ids[near[near > 0]])
        state.keep(slice(max(int((surprise <= mu).sum()), 1)))
        return self._observe(state, index, tau, eta)

    def _adaptive_p(
        self, state: Candidates, index: int, target: float, decay: float, seed: float
    ) -> tuple[int, Reals]:
        before = state.p()
        if target < 0.0:
            return self._discrete(before, index), before
        weighted, total = self._average[index]
        wanted = min(max(2.0 * target - weighted / total, 0.0), 1.0)
        state.scale = 34.0 * (2.0 + state.scale)  # the transform is that steep
        distance = np.abs(before - wanted) / np.float64(np.float32(0.3))
        logits = 5.0 - 10.0 * distance * distance / (1.0 + distance)
        state.logits = np.where(state.logits > -np.inf, logits, -np.inf)
        after = state.p()
        position = self._discrete(after, index)
        self._pending[index] = (int(state.ids[position]), float(before[position]))
        return position, after


def _params(stage: Stage) -> dict[str, Any]:
    """Return the parameters as C receives them: floats rounded to float32."""
    return {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in stage.items
    }
