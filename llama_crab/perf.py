"""How fast a model answers over many requests: `Perf`, and `Measurement` of a block."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from . import _core
from .engine.tally import Tally

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True, slots=True)
class Latencies:
    """Times of one kind in seconds, from a histogram of fixed size.

    Every value is that of its bucket's middle, at most 1.6 % off (or half a microsecond);
    ``buckets`` are pairs of that and a count, shortest first. Without times all is 0.0.
    Thread-safety: immutable.
    """

    buckets: tuple[tuple[float, int], ...] = field(default=(), repr=False)

    @classmethod
    def from_counts(cls, counts: Iterable[int]) -> Latencies:
        """Return what a `_core.LatencyHistogram` has counted."""
        return cls(tuple((_middle_sec(i), n) for i, n in enumerate(counts) if n > 0))

    @property
    def n(self) -> int:
        """How many times there are."""
        return sum(n for _, n in self.buckets)

    @property
    def mean(self) -> float:
        """Their mean."""
        n = self.n
        return sum(value * count for value, count in self.buckets) / n if n else 0.0

    @property
    def p50(self) -> float:
        """The median."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """What 90 % do not exceed."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """What 99 % do not exceed."""
        return self.percentile(99)

    @property
    def max(self) -> float:
        """The longest."""
        return self.buckets[-1][0] if self.buckets else 0.0

    def percentile(self, q: float) -> float:
        """Return the smallest time that `q` percent do not exceed; ValueError outside [0, 100]."""
        if not 0 <= q <= 100:
            raise ValueError(f"q: {q!r} is no percentage")
        left = q / 100 * self.n
        for value, count in self.buckets:
            left -= count
            # What rounding leaves of a whole number of them must not ask for one more.
            if left <= 1e-9 * count:
                return value
        return self.max

    def to_dict(self) -> dict[str, int | float]:
        """Return count, mean and percentiles by name."""
        names = ("n", "mean", "p50", "p90", "p99", "max")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Perf:
    """What a `Llama` has done, since it was loaded or reset or within a block.

    Requests and their prompts count when they end, as their results report them; all else counts
    when it happens, also for requests that still run.

    Attributes
    ----------
    requests
        Requests that have ended, by ``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"``.
    prompt_n, cached_n
        Their prompts' tokens, and of those the ones that came from the prefix cache.
    predicted_n
        Tokens generated, over all choices.
    prefilled_n
        Prompt tokens computed: ``prompt_n - cached_n``, and more where a sequence was suspended, or
        where one of several answers got its slot later and computed its prompt itself.
    prefill_sec, decode_sec
        Time inside ``llama_decode`` for prompts, and for generation. A batch of both is shared out
        by its tokens.
    sample_sec
        Time spent on output rows: log-probabilities, choosing tokens, detokenising.
    wall_sec
        From the beginning to this reading, pauses included.
    n_steps
        Batches computed.
    n_drafted, n_draft_accepted
        Tokens decoded in the hope that they would be chosen, and of these the ones that were.
    draft_sec
        Time spent on making drafts, beside ``decode_sec``.
    draft_saved_sec
        What ``decode_sec`` would have had beyond this without drafts, as reckoned from the cost of
        plain batches; negative when drafts lost.
    first_token
        `Latencies` from a request's submission to its first token.
    inter_token
        `Latencies` between two tokens of an answer. Those that a grammar forces come at once;
        the gap after a pause for a reader who was behind is left out.

    Thread-safety: immutable.
    """

    requests: Mapping[str, int]
    prompt_n: int
    cached_n: int
    predicted_n: int
    prefilled_n: int
    prefill_sec: float
    decode_sec: float
    sample_sec: float
    wall_sec: float
    n_steps: int
    n_drafted: int
    n_draft_accepted: int
    draft_sec: float
    draft_saved_sec: float
    first_token: Latencies
    inter_token: Latencies

    @property
    def n_requests(self) -> int:
        """Requests that have ended."""
        return sum(self.requests.values())

    @property
    def tokens_per_sec(self) -> float:
        """Tokens generated per second of ``wall_sec``, by all requests together."""
        return self.predicted_n / self.wall_sec if self.wall_sec > 0.0 else 0.0

    @property
    def prefill_per_sec(self) -> float:
        """Prompt tokens computed per second of ``prefill_sec``."""
        return self.prefilled_n / self.prefill_sec if self.prefill_sec > 0.0 else 0.0

    @property
    def acceptance(self) -> float:
        """Of the drafted tokens the share that was chosen; 0.0 when there were none."""
        return self.n_draft_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def speculative_gain(self) -> float:
        """Time that generation would have taken without drafts, over what it took with them."""
        spent = self.decode_sec + self.draft_sec
        return (self.decode_sec + self.draft_saved_sec) / spent if spent > 0.0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the rates, as plain JSON values."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        values["requests"] = dict(self.requests)
        for name in ("first_token", "inter_token"):
            values[name] = values[name].to_dict()
        return {
            **values,
            "n_requests": self.n_requests,
            "tokens_per_sec": self.tokens_per_sec,
            "prefill_per_sec": self.prefill_per_sec,
            "acceptance": self.acceptance,
            "speculative_gain": self.speculative_gain,
        }

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.requests.items() if n)
        return (
            f"requests  {self.n_requests:6d}{f' ({reasons})' if reasons else ''}"
            f" in {self.wall_sec:.3f} s, {self.n_steps} steps\n"
            f"prompt    {self.prompt_n:6d} tokens, {self.cached_n} cached;"
            f" {self.prefilled_n} computed in {self.prefill_sec:.3f} s\n"
            f"generated {self.predicted_n:6d} tokens {self.tokens_per_sec:9.1f} tok/s;"
            f" decode {self.decode_sec:.3f} s, sampling {self.sample_sec:.3f} s\n"
            f"{self._drafts()}"
            f"first token {_milliseconds(self.first_token)}\n"
            f"inter-token {_milliseconds(self.inter_token)}"
        )

    def _drafts(self) -> str:
        if not self.n_drafted:
            return ""
        return (
            f"drafted   {self.n_drafted:6d} tokens, {100 * self.acceptance:.0f} % accepted;"
            f" {self.speculative_gain:.2f} times as fast as without\n"
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """All counts at one moment; two of them make a `Perf`."""

    at_us: int
    ended: tuple[int, ...]
    prompt_n: int
    cached_n: int
    n_cut: int
    counts: tuple[int, ...]
    first_token: list[int]
    inter_token: list[int]

    def since(self, begin: Reading) -> Perf:
        """Return what happened between `begin` and this."""
        ended = (now - before for now, before in zip(self.ended, begin.ended, strict=True))
        steps, _, prefilled, generated, decode_us, prefill_us, sample_us, *drafts = (
            now - before for now, before in zip(self.counts, begin.counts, strict=True)
        )
        drafted, accepted, drafting_us, saved_us = drafts
        return Perf(
            requests=MappingProxyType(dict(zip(_REASONS, ended, strict=True))),
            prompt_n=self.prompt_n - begin.prompt_n,
            cached_n=self.cached_n - begin.cached_n,
            # What is cut off now may have been generated before.
            predicted_n=max(0, generated - (self.n_cut - begin.n_cut)),
            prefilled_n=prefilled,
            prefill_sec=prefill_us / 1e6,
            decode_sec=(decode_us - prefill_us) / 1e6,
            sample_sec=sample_us / 1e6,
            wall_sec=(self.at_us - begin.at_us) / 1e6,
            n_steps=steps,
            n_drafted=drafted,
            n_draft_accepted=accepted,
            draft_sec=drafting_us / 1e6,
            draft_saved_sec=saved_us / 1e6,
            first_token=_latencies(self.first_token, begin.first_token),
            inter_token=_latencies(self.inter_token, begin.inter_token),
        )


class PerfMeter:
    """Reads the counts of a scheduler; waits for no step.

    Thread-safety: any thread.
    """

    def __init__(self, counters: _core.StepCounters, tally: Tally) -> None:
        self._counters = counters
        self._tally = tally
        self._begin = self.read()

    @property
    def perf(self) -> Perf:
        """What happened since it was made or `reset`."""
        begin = self._begin  # first: another thread may reset it meanwhile
        return self.read().since(begin)

    def reset(self) -> None:
        """Count from here on."""
        self._begin = self.read()

    def read(self) -> Reading:
        """Return all counts."""
        tally = self._tally
        return Reading(
            at_us=_core.time_us(),
            ended=tuple(tally.ended[reason] for reason in _REASONS),
            prompt_n=tally.prompt_n,
            cached_n=tally.cached_n,
            n_cut=tally.n_cut,
            counts=self._counters.read(),
            first_token=self._counters.first_token.counts(),
            inter_token=self._counters.inter_token.counts(),
        )


class Measurement:
    """What happens in a block of code: ``with llama.measure() as m: ...``, then ``m.perf``.

    It looks at the model and not at who asks: requests of all threads and tasks count, those that
    began before the block with what they do in it. Within the block `perf` is what happened so far,
    behind it, also after an exception, what happened in it. Blocks may overlap and nest.

    Thread-safety: any thread may read it.
    """

    def __init__(self, meter: PerfMeter) -> None:
        self._meter = meter
        self._start()

    def _start(self) -> None:
        self._end: Reading | None = None
        self._end_rss: int | None = None
        self._begin_rss = _peak_rss()
        self._begin = self._meter.read()

    @property
    def perf(self) -> Perf:
        """Counts, seconds and latencies."""
        begin = self._begin
        return (self._end or self._meter.read()).since(begin)

    @property
    def peak_rss_growth(self) -> int | None:
        """Bytes by which the process's largest resident memory so far rose; None where unknown."""
        end = self._end_rss if self._end is not None else _peak_rss()
        return None if end is None or self._begin_rss is None else end - self._begin_rss

    def __enter__(self) -> Measurement:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_rss = _peak_rss()
        self._end = self._meter.read()

    def __str__(self) -> str:
        return str(self.perf)


def _middle_sec(bucket: int) -> float:
    """Return the middle of a bucket of `_core.LatencyHistogram` in seconds."""
    shift = max(bucket // 32 - 1, 0)
    return (((bucket - 32 * shift) << shift) + ((1 << shift) - 1) / 2) / 1e6


def _latencies(now: list[int], before: list[int]) -> Latencies:
    return Latencies.from_counts(a - b for a, b in zip(now, before, strict=True))


def _milliseconds(found: Latencies) -> str:
    times = (("p50", found.p50), ("p90", found.p90), ("p99", found.p99), ("max", found.max))
    shown = "  ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in times)
    return f"{shown} ms ({found.n})"


def _peak_rss() -> int | None:
    """Return the largest resident memory of this process so far in bytes, None where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
