"""Settings of a model as something `search` can measure: a goal's workloads on beds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ContextCreateError, DecodeAborted, DecodeError, ModelLoadError
from ..params import LlamaParams, ParameterError
from .bed import Bed
from .interrupt import raise_interrupt
from .search import InfeasibleError
from .workloads import Prefill, Workload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Point = Mapping[str, Any]

# Threads change on a bed that is there; everything else is another context.
_THREADS = ("n_threads", "n_threads_batch")
# The cache's types go together: one lever for both.
KV_TYPE = "type_k, type_v"
_NATIVE = {"flash_attn_type": "auto", KV_TYPE: "f16"}


@dataclass(frozen=True)
class Rates:
    """What a first look at the model showed: tokens/s of a prefill and of generating."""

    prefill: float
    generate: float


@dataclass(frozen=True)
class Part:
    """A workload that counts for a goal.

    ``workload`` may depend on the settings, as the number of sequences does; ``scale`` makes the
    part's share of a unit of the goal from its seconds. ``ignores`` names levers that do not
    change it, so that settings which differ only there share a bed.
    """

    name: str
    workload: Callable[[Point], Workload]
    scale: Callable[[Point], float]
    ignores: tuple[str, ...] = ()


class BedSurface:
    """Measures settings, a bed for each kind of context; see `search.Surface`."""

    def __init__(self, base: LlamaParams, parts: Sequence[Part], start: Point) -> None:
        self._base = base
        self.parts = parts
        self._start = start
        # In the order of use, the latest last.
        self._beds: dict[Any, Bed] = {}
        self._threads: dict[Any, tuple[int, int]] = {}
        self._load_sec = 0.0
        self._look = Rates(0.0, 0.0)
        self._running: Bed | None = None
        self.rates: dict[str, dict[str, list[float]]] = {}
        """tokens/s of each part, by part and by settings, for the report"""

    def adopt(self, bed: Bed, load_sec: float, rates: Rates) -> None:
        """Take the weights of `bed`; what loading took, and how fast it looked."""
        self._beds[None] = bed
        self._load_sec = load_sec
        self._look = rates

    def abort(self) -> None:
        """End the decode that is running by a KeyboardInterrupt. From any thread."""
        bed = self._running
        if bed is not None:
            bed.abort()

    def params_of(self, point: Point, ignores: Sequence[str] = ()) -> LlamaParams:
        """Return the parameters of some settings."""
        changes: dict[str, Any] = {}
        for name, value in point.items():
            if name in ignores:
                continue
            for lever in name.split(", "):
                changes[lever] = None if value == _NATIVE.get(name) else value
        return self._base.replace(**changes)

    def setup_sec(self, point: Point) -> float:
        """Return what loading, filling contexts and a first run, unmeasured, will take."""
        total = 0.0
        for part in self.parts:
            key, params, workload = self._bed_of(part, point)
            if key in self._beds:
                continue
            if not any(bed.shares_weights(params) for bed in self._beds.values()):
                total += self._load_sec
            n_seq, depth = getattr(workload, "n_seq", 1), getattr(workload, "depth", 0)
            # Deeper tokens cost more: a fill is slower than the prefill that was timed.
            if depth:
                total += 1.3 * n_seq * depth / self._look.prefill
            total += self._run_sec(part, workload)
        return total

    def _run_sec(self, part: Part, workload: Workload) -> float:
        known = self.rates.get(part.name)
        if known:
            rate = min(values[-1] for values in known.values())
        elif isinstance(workload, Prefill):
            rate = self._look.prefill
        else:
            rate = self._look.generate
        return workload.n_tokens / rate

    def prepare(self, point: Point) -> None:
        """Make and fill the contexts."""
        for part in self.parts:
            key, params, workload = self._bed_of(part, point)
            if key in self._beds:
                continue
            self._make_room()
            try:
                bed = Bed(params, weights_of=self._sharing(params))
                self._beds[key] = bed
                self._set_threads(key, bed, point)
                self._run(workload, bed)
            except (ContextCreateError, ModelLoadError, DecodeError, ParameterError) as error:
                broken = self._beds.pop(key, None)
                if broken is not None:
                    broken.close()
                raise InfeasibleError(str(error.args[0]).partition("\n")[0]) from error

    def measure(self, point: Point) -> float:
        """Return the seconds of a unit of the goal: the sum of its parts."""
        total = 0.0
        for part in self.parts:
            key, _, workload = self._bed_of(part, point)
            bed = self._beds.pop(key)
            self._beds[key] = bed
            self._set_threads(key, bed, point)
            seconds = self._run(workload, bed)
            self.rates.setdefault(part.name, {}).setdefault(label(point), []).append(
                workload.n_tokens / seconds
            )
            total += part.scale(point) * seconds
        return total

    def repair(self, point: Point, lever: str) -> Point | None:
        """Return `point` as llama.cpp can take it: a micro-batch within a batch."""
        fixed = dict(point)
        if "n_ubatch" in fixed and "n_batch" in fixed and fixed["n_batch"] < fixed["n_ubatch"]:
            other = "n_ubatch" if lever == "n_batch" else "n_batch"
            fixed[other] = fixed[lever] if lever in ("n_batch", "n_ubatch") else fixed["n_ubatch"]
        try:
            self.params_of(fixed)
        except ParameterError:
            return None
        return fixed

    def close(self) -> None:
        """Free everything. Idempotent."""
        for bed in self._beds.values():
            bed.close()
        self._beds.clear()

    def _run(self, workload: Workload, bed: Bed) -> float:
        self._running = bed
        try:
            return workload.run(bed)
        except DecodeAborted as error:
            raise_interrupt(error)

    def _bed_of(self, part: Part, point: Point) -> tuple[Any, LlamaParams, Workload]:
        workload = part.workload(point)
        params = workload.fit(self.params_of(point, part.ignores))
        shared = params.replace(**{name: getattr(self._base, name) for name in _THREADS})
        return (part.name, repr(shared)), shared, workload

    def _set_threads(self, key: Any, bed: Bed, point: Point) -> None:
        params = bed.params
        n_threads = point.get("n_threads", params.n_threads)
        wanted = (n_threads, point.get("n_threads_batch", params.n_threads_batch))
        if self._threads.get(key) != wanted or bed.context.n_threads != n_threads:
            bed.context.set_n_threads(*wanted)
            self._threads[key] = wanted

    def _sharing(self, params: LlamaParams) -> Bed | None:
        fitting = (bed for bed in self._beds.values() if bed.shares_weights(params))
        return next(fitting, None)

    def _make_room(self) -> None:
        """Close what was used longest ago; where the search began is needed again at its end."""
        kept = {self._bed_of(part, self._start)[0] for part in self.parts}
        old = [key for key in self._beds if key not in kept]
        while len(old) > 2 * len(self.parts):
            self._beds.pop(old.pop(0)).close()


def label(point: Point) -> str:
    """Return settings as one line."""
    return ", ".join(f"{name}={value}" for name, value in sorted(point.items()))
