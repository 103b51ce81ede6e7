"""Find the fastest settings for a model on this machine: `tune`."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import DecodeAborted
from ..hub import resolve_model
from ..params import LlamaParams, ParameterError
from .bed import Bed
from .goals import Plan, plan
from .interrupt import abort_on_interrupt, raise_interrupt
from .probe import thread_choice
from .profile import GOALS, Profile, build_facts, identity_of, machine_facts
from .race import MIN_GAIN
from .search import InfeasibleError, SearchResult, Step, search
from .surface import KV_TYPE, BedSurface, Rates, label
from .workloads import fit_context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .surface import Point

MAX_BUDGET_SEC = 86400.0
# A first look at the model: enough to plan with, and at most this share of the budget per rate.
_LOOK_PROMPT, _LOOK_GEN, _LOOK_SHARE = 64, 4, 0.05


@dataclass(frozen=True)
class LeverRow:
    """A row of the table: what a lever was, what it is now, and what its races gained."""

    lever: str
    before: Any
    after: Any
    gain: float
    candidates: tuple[Any, ...] = ()
    """all the values that it could have taken"""


@dataclass(frozen=True)
class TuneReport:
    """What `tune` did and found. Thread-safety: immutable."""

    model: str
    goal: str
    workloads: tuple[str, ...]
    unit: str
    steps: tuple[Step, ...]
    rows: tuple[LeverRow, ...]
    before: tuple[float, ...]
    """rates of the defaults in the final check, one per round; empty where none was made"""
    after: tuple[float, ...]
    """rates of the result, measured in turn with `before`"""
    gain: float
    uncertainty: float
    ended: str
    """converged, budget (time was up) or interrupted"""
    confirmed: bool
    reverted: bool
    """whether the final check did not find what the races had found"""
    profile: Profile
    notes: tuple[str, ...]
    budget_sec: float
    elapsed_sec: float
    n_measured: int
    part_rates: dict[str, dict[str, float]]
    """median tokens/s by workload and settings"""
    machine: str
    profile_path: str | None = None

    @property
    def defaults_are_best(self) -> bool:
        """Whether nothing was found that is faster than the defaults."""
        return not self.profile.params


def tune(
    model: str | os.PathLike[str] | None = None,
    *,
    goal: str = "latency",
    budget_sec: float = 60.0,
    depth: int | None = None,
    allow_quantised_kv: bool = False,
    params: LlamaParams | None = None,
    save: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TuneReport:
    """Search for the fastest settings of `model` within `budget_sec` seconds, loading included.

    ``goal``: "latency" is the speed of one generation, a short one and one behind 2,000 tokens in
    equal shares, or at ``depth``; "ttft" the time of a prefill; "throughput" the tokens/s of all of
    ``n_seq_max`` sequences. ``params`` gives fields of the load that are to stay as they are; those
    that are levers are where the search begins. Quantised KV caches change answers, so they are
    tried with ``allow_quantised_kv`` only. The result is saved as a profile, unless the search was
    interrupted before anything was found; ``progress`` is told each step in words.

    Raises `ParameterError` for wrong arguments, and what `Llama` raises.
    Thread-safety: run nothing else meanwhile, it would be measured too.
    """
    began = time.monotonic()
    budget_sec = _checked(goal, budget_sec, depth)
    base = (params or LlamaParams()).replace(profile=None)
    if model is not None:
        base = base.replace(model=model)
    path = resolve_model(base.model)
    base = base.replace(model=path)
    tell = progress or (lambda _: None)
    tell(f"{path.name}: {goal}, at most {budget_sec:g} s; {thread_choice().why}")
    first, load_sec, rates = _look(base, budget_sec)
    surface: BedSurface | None = None
    try:
        wanted = plan(
            goal,
            first.params.replace(n_ctx=base.n_ctx, n_outputs_max=base.n_outputs_max),
            first.model,
            rates,
            budget_sec,
            depth=depth,
            allow_quantised_kv=allow_quantised_kv,
        )
        surface = BedSurface(base, wanted.parts, wanted.start)
        surface.adopt(first, load_sec, rates)
        tell(
            f"loaded in {load_sec:.1f} s; measured: {', '.join(p.name for p in wanted.parts)}; "
            f"levers: {', '.join(lever.name for lever in wanted.levers)}"
        )
        with abort_on_interrupt(surface.abort):
            result = search(
                wanted.levers,
                wanted.start,
                surface,
                clock=time.monotonic,
                deadline=began + budget_sec,
                listener=lambda step: tell(explain(step)),
            )
    except InfeasibleError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
    finally:
        first.close()
        if surface is not None:
            surface.close()
    return _report(
        path.name, goal, base, wanted, result, surface, budget_sec, began, allow_quantised_kv, save
    )


def explain(step: Step) -> str:
    """Return a step in words: ``n_threads 4 -> 8: +3.0 %, kept``."""
    head = f"{step.lever} {step.before} -> {step.after}"
    note = f" ({step.note})" if step.note else ""
    if step.verdict == "infeasible":
        return f"{head}: not possible{note}"
    change = f"{100 * step.gain:+.1f} %"
    if step.verdict == "same":
        small = abs(step.gain) > step.uncertainty
        why = f"less than {100 * MIN_GAIN:g} %" if small else "within the spread"
        return f"{head}{note}: {change}, {why}, left as it was"
    return f"{head}{note}: {change}, {'kept' if step.kept else 'slower'}"


def _checked(goal: str, budget_sec: float, depth: int | None) -> float:
    from ..params import INT32_MAX, require_integer

    if goal not in GOALS:
        raise ParameterError(f"goal: {goal!r} is not one of {', '.join(GOALS)}")
    if isinstance(budget_sec, (bool, str)) or not isinstance(budget_sec, (int, float)):
        raise ParameterError(f"budget_sec: expected seconds, not {budget_sec!r}")
    if not (math.isfinite(budget_sec) and 0 < budget_sec <= MAX_BUDGET_SEC):
        raise ParameterError(f"budget_sec: {budget_sec} is not above 0 and at most a day")
    if depth is not None:
        require_integer("depth", depth, (0, INT32_MAX))
    return float(budget_sec)


def _look(base: LlamaParams, budget_sec: float) -> tuple[Bed, float, Rates]:
    """Load the model, and measure roughly how fast it is."""
    began = time.monotonic()
    bed = Bed(fit_context(base, _LOOK_PROMPT + _LOOK_GEN))
    try:
        load_sec = time.monotonic() - began
        limit_sec = _LOOK_SHARE * budget_sec
        with abort_on_interrupt(bed.abort):
            bed.prefill(2)  # the first decode pages the weights in
            prefill = _rate(bed.prefill, 2, _LOOK_PROMPT, limit_sec)
            generate = _rate(bed.generate, 1, _LOOK_GEN, limit_sec)
    except DecodeAborted as error:
        bed.close()
        raise_interrupt(error)
    except BaseException:
        bed.close()
        raise
    return bed, load_sec, Rates(prefill, generate)


def _rate(run: Callable[[int], float], least: int, most: int, limit_sec: float) -> float:
    """Return tokens/s of the longest run up to `most` tokens for which there is time."""
    n, seconds = least, run(least)
    while n < most and 4 * seconds < limit_sec:
        n *= 2
        seconds = run(n)
    if seconds < limit_sec:
        # The better of two: a burst of other work would leave no room for a long context.
        seconds = min(seconds, run(n))
    return n / seconds


def _report(
    name: str,
    goal: str,
    base: LlamaParams,
    wanted: Plan,
    result: SearchResult,
    surface: BedSurface,
    budget_sec: float,
    began: float,
    allow_quantised_kv: bool,
    save: bool,
) -> TuneReport:
    found = result.found if result.found is not None else result.best
    reverted = result.best is result.start and found != result.start
    interrupted = result.ended == "interrupted"
    before = tuple(wanted.n_per_unit / seconds for seconds in result.before)
    after = tuple(wanted.n_per_unit / seconds for seconds in result.after)
    notes = [wanted.note] if wanted.note else []
    if allow_quantised_kv and KV_TYPE in wanted.start:
        notes.append("a quantised KV cache changes what the model answers")
    if interrupted:
        notes.append("interrupted: unfinished, the best so far")
    elif result.ended == "budget":
        notes.append(f"the budget of {budget_sec:g} s ended the search before all was tried")
    if result.best != result.start and not result.confirmed:
        notes.append("no final check was made: the gains are those of the single races")
    profile = Profile(
        goal=goal,
        model=identity_of(base.model),
        machine=machine_facts(),
        build=build_facts(),
        params=_changed(result.start, result.best, base),
        model_name=name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        unfinished=interrupted,
        measured={
            "unit": wanted.unit,
            "before": list(before),
            "after": list(after),
            "gain": result.gain,
            "uncertainty": result.uncertainty,
        },
    )
    saved = None
    if save and (profile.params or not interrupted):
        try:
            saved = str(profile.save())
        except OSError as error:  # what minutes have found is not thrown away for that
            notes.append(f"the profile could not be saved: {error}")
    rates = {
        part: {where: statistics.median(values) for where, values in by_point.items()}
        for part, by_point in surface.rates.items()
    }
    used = {label(result.start), label(found)}
    return TuneReport(
        model=name,
        goal=goal,
        workloads=tuple(part.name for part in wanted.parts),
        unit=wanted.unit,
        steps=tuple(result.steps),
        rows=_rows(wanted, result),
        before=before,
        after=after,
        gain=result.gain,
        uncertainty=result.uncertainty,
        ended=result.ended,
        confirmed=result.confirmed,
        reverted=reverted,
        profile=profile,
        notes=tuple(notes),
        budget_sec=budget_sec,
        elapsed_sec=time.monotonic() - began,
        n_measured=result.n_measured,
        part_rates={
            part: {k: v for k, v in values.items() if k in used} for part, values in rates.items()
        },
        machine=", ".join(item[1] for item in machine_facts()["devices"]),
        profile_path=saved,
    )


def _changed(start: Point, best: Point, base: LlamaParams) -> dict[str, Any]:
    """Return the fields to save: what differs from the defaults, and what would follow it."""
    changed: dict[str, Any] = {}
    for name, value in best.items():
        if value != start[name]:
            changed.update(dict.fromkeys(name.split(", "), value))
    if "n_threads" in changed and base.n_threads_batch is None:
        # It follows n_threads, which was chosen for single tokens; prefills are another matter.
        changed["n_threads_batch"] = base.n_threads or thread_choice().n_threads
    return changed


def _rows(wanted: Plan, result: SearchResult) -> tuple[LeverRow, ...]:
    rows = []
    for lever in wanted.levers:
        gain = math.prod(
            1.0 + step.gain for step in result.steps if step.lever == lever.name and step.kept
        )
        found = result.found if result.found is not None else result.best
        if len(lever.candidates) > 1:
            values = (result.start[lever.name], found[lever.name])
            rows.append(LeverRow(lever.name, *values, gain - 1.0, lever.candidates))
    return tuple(rows)
