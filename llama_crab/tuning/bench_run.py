"""`bench`: every configuration in turn, round after round."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from .. import _core
from ..errors import ContextCreateError, DecodeAborted, LlamaCrabError, ModelLoadError
from ..hub import resolve_model, split_names
from ..params import INT32_MAX, LlamaParams, ParameterError, require_integer
from .bed import Bed, kv_bytes
from .bench_report import BenchReport, BenchRow
from .interrupt import abort_on_interrupt
from .probe import available_memory
from .workloads import Generate, Measured, Prefill, Workload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_WORKLOADS: tuple[Workload, ...] = (Prefill(512), Generate(128))
# Beyond this share of the free memory, weights take turns instead of sharing a run.
_WEIGHTS_SHARE = 0.6
# What stays free for compute buffers and everything else when contexts are kept.
_RESERVE_BYTES = 512 << 20


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done of all (warm-ups count), what comes next, seconds left."""

    done: int
    total: int
    name: str
    seconds_left: float | None


def bench(
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    workloads: Iterable[Workload] = DEFAULT_WORKLOADS,
    *,
    params: LlamaParams | None = None,
    axes: Mapping[str, Sequence[Any]] | None = None,
    rounds: int = 5,
    warmup: bool = True,
    progress: Callable[[Progress], object] | None = None,
) -> BenchReport:
    """Measure `workloads` on all combinations of models and parameters; return the report.

    Parameters
    ----------
    model
        A model or several, as `LlamaParams.model`; None is the demo model.
    workloads
        What to run; default: pp512 and tg128, as llama-bench.
    params
        The parameters that all configurations share.
    axes
        Values of `LlamaParams` fields to combine: ``{"n_threads": [1, 2], "type_k": ["q8_0"]}``.
        ``speculative`` is for whole answers; raw decodes draft nothing and are measured once.
    rounds
        Each round runs everything once, every other one backwards: what slows the machine for a
        while slows all configurations.
    warmup
        Run everything once before, unmeasured.
    progress
        Called before each run with a `Progress`.

    A combination that fails (no memory, values that exclude each other) is a row with its
    ``error``; the others go on. Ctrl-C ends the run early: the report has ``interrupted`` set and
    what was measured until then. As in llama-bench, raw decodes have contexts of just the
    size they need, and no full-size cache for sliding windows unless ``swa_full`` is given.

    Raises `ModelNotFoundError` for any of the models, `ParameterError`.
    Thread-safety: one run in a process at a time, or they measure each other.
    """
    require_integer("rounds", rounds, (1, INT32_MAX))
    runs = _runs(model, tuple(workloads), params or LlamaParams(), axes or {})
    bench_run = _BenchRun(runs, rounds, warmup, progress)
    interrupted = False
    try:
        with abort_on_interrupt(bench_run.abort):
            bench_run.run()
    except (KeyboardInterrupt, DecodeAborted):
        interrupted = True
    finally:
        bench_run.close()
    return BenchReport.of(tuple(run.row() for run in runs), rounds, interrupted)


@dataclass
class _Run:
    """One row while it is measured."""

    params: LlamaParams
    workload: Workload
    measured: list[tuple[int, Measured]] = field(default_factory=list)
    error: Exception | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    last_sec: float = 0.0

    @property
    def key(self) -> object:
        """Equal for what may use the same context."""
        return (repr(self.params), self.workload.end_to_end)

    def note(self, bed: Bed) -> None:
        model = bed.model
        self.params = bed.params
        self.facts = {
            "model_type": model.desc,
            "model_size": model.size,
            "model_n_params": model.n_params,
        }

    def row(self) -> BenchRow:
        return BenchRow.of(self.params, self.workload, self.measured, self.error, self.facts)


def _runs(
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    workloads: tuple[Workload, ...],
    params: LlamaParams,
    axes: Mapping[str, Sequence[Any]],
) -> list[_Run]:
    models: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
    paths = [resolve_model(params.model if item is None else item) for item in models]
    if not workloads:
        raise ParameterError("workloads: there are none")
    if not paths:
        raise ParameterError("model: there is none")
    runs = []
    seen = set()
    for path, *values in product(paths, *axes.values()):
        for workload in workloads:
            given = dict(zip(axes, values, strict=True))
            if not workload.end_to_end and "speculative" in given:
                del given["speculative"]
                key = repr((path, given, workload))
                if key in seen:
                    continue
                seen.add(key)
            run = _Run(params.replace(model=path), workload)
            try:
                chosen = run.params.replace(**given)
                if not workload.end_to_end:
                    chosen = chosen.replace(speculative=None)
                    if chosen.swa_full is None:
                        chosen = chosen.replace(swa_full=False)
                run.params = workload.fit(chosen)
            except ParameterError as error:
                if "no such parameter" in str(error):
                    raise
                run.error = error
                run.facts = given
            runs.append(run)
    return runs


class _BenchRun:
    """The beds of a run and the order of things."""

    def __init__(
        self,
        runs: Sequence[_Run],
        rounds: int,
        warmup: bool,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self._runs = [run for run in runs if run.error is None]
        self._rounds = rounds
        self._warmup = warmup
        self._progress = progress
        self._beds: dict[object, Bed] = {}
        self._keys = {id(run): run.key for run in self._runs}
        self._current: Bed | None = None
        self._done = 0

    def abort(self) -> None:
        """End the decode that is running. From any thread."""
        if self._current is not None:
            self._current.abort()

    def run(self) -> None:
        for group in self._groups():
            for number in range(-1 if self._warmup else 0, self._rounds):
                for run in group if number % 2 == 0 else reversed(group):
                    self._visit(run, number)
            self.close()

    def close(self) -> None:
        while self._beds:
            self._beds.popitem()[1].close()

    def _groups(self) -> list[list[_Run]]:
        """Return what takes turns: all, where all weights fit in memory together."""
        by_weights: dict[object, list[_Run]] = {}
        sizes: dict[object, int] = {}
        for run in self._runs:
            key = repr((run.params.model, run.params.model_params()))
            by_weights.setdefault(key, []).append(run)
            path = Path(str(run.params.model))
            parts = [path.with_name(name) for name in split_names(path.name)] or [path]
            sizes[key] = sum(part.stat().st_size for part in parts)
        room = available_memory()
        gpus = [device for device in _core.devices() if device.type in ("gpu", "igpu")]
        if gpus:
            free = sum(device.memory_free for device in gpus)
            room = min(room or free, free)
        if len(by_weights) > 1 and sum(sizes.values()) > _WEIGHTS_SHARE * room:
            return list(by_weights.values())
        return [self._runs]

    def _visit(self, run: _Run, number: int) -> None:
        if run.error is not None:
            self._done += 1
            return
        if self._progress is not None:
            self._progress(self._state(run, number))
        began = time.perf_counter()
        try:
            measured = self._measure(run, number < 0)
        except DecodeAborted:
            raise
        except (LlamaCrabError, OSError, MemoryError, ValueError, RuntimeError) as error:
            # What it has taken up must be free before the next one starts.
            run.error = error.with_traceback(None)
            gc.collect()
        else:
            if number >= 0:
                # Not a warm-up's time: it loads, and generates a single token.
                run.last_sec = time.perf_counter() - began
                run.measured.append((number, measured))
        self._done += 1

    def _measure(self, run: _Run, warming: bool) -> Measured:
        try:
            return self._once(run, warming)
        except (ContextCreateError, ModelLoadError):
            others = [bed for bed in self._beds.values() if not bed.resting]
            if not others:
                raise
        for bed in others:
            bed.rest()
        return self._once(run, warming)

    def _once(self, run: _Run, warming: bool) -> Measured:
        bed = self._bed(run)
        self._current = bed
        if bed.resting:
            self._make_room(bed, bed.model, bed.params)
        if warming:
            run.workload.warm_up(bed)
            return Measured(0.0)
        return run.workload.measure(bed)

    def _bed(self, run: _Run) -> Bed:
        key = self._keys[id(run)]
        if key not in self._beds:
            sharing = [bed for bed in self._beds.values() if bed.shares_weights(run.params)]
            if sharing:
                self._make_room(None, sharing[0].model, run.params)
            self._beds[key] = Bed(run.params, weights_of=sharing[0] if sharing else None)
        bed = self._beds[key]
        if not run.facts:
            run.note(bed)
        return bed

    def _make_room(self, keep: Bed | None, model: _core.Model, params: LlamaParams) -> None:
        """Have contexts rest where one more might not fit."""
        room = available_memory()
        if room and room < kv_bytes(model, params) + _RESERVE_BYTES:
            for bed in self._beds.values():
                if bed is not keep:
                    bed.rest()

    def _state(self, run: _Run, number: int) -> Progress:
        n_rounds = self._rounds + self._warmup
        total = n_rounds * len(self._runs)
        left = None
        if all(other.last_sec or other.error for other in self._runs):
            rounds_left = (total - self._done) / len(self._runs)
            left = rounds_left * sum(item.last_sec for item in self._runs if item.error is None)
        return Progress(self._done, total, run.workload.name, left)
