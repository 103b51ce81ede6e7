"""What is measured: llama-bench's tests, and more sequences than one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ..params import INT32_MAX, MAX_SEQUENCES, LlamaParams, require_integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .bed import Bed

_LEAST = {"depth": 0}
_MOST = {"n_seq": MAX_SEQUENCES}


@dataclass(frozen=True)
class Measured:
    """One run: its seconds, and where known what they went into (seconds or counts by name)."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload(ABC):
    """Work that is the same on every configuration.

    ``name`` is llama-bench's where it has one, ``n_tokens`` how much work a run is, in what
    ``unit`` counts per second. Raises `ParameterError` for counts that are no integers or too
    small.
    Thread-safety: immutable.
    """

    # Without annotations, or they would be fields.
    unit = "tok/s"
    end_to_end = False
    """Whether it measures `Llama`, not raw decodes."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int":
                bounds = (_LEAST.get(item.name, 1), _MOST.get(item.name, INT32_MAX))
                object.__setattr__(self, item.name, require_integer(item.name, value, bounds))

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name, unique among the workloads of a run."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """How many tokens (or what `unit` counts) one run is."""

    @abstractmethod
    def fit(self, params: LlamaParams) -> LlamaParams:
        """Return `params` with the context that a run needs; other values stay."""

    @abstractmethod
    def run(self, bed: Bed) -> float:
        """Do it once and return the seconds."""

    def measure(self, bed: Bed) -> Measured:
        """Do it once and return the seconds with what they went into."""
        return Measured(self.run(bed))


@dataclass(frozen=True)
class Prefill(Workload):
    """Decode `n_prompt` tokens in full batches behind `depth` others; llama-bench's ``pp``."""

    n_prompt: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"pp{self.n_prompt}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_prompt

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_prompt)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.prefill(self.n_prompt, self.depth)


@dataclass(frozen=True)
class Generate(Workload):
    """Decode `n_gen` tokens one after the other behind `depth` others; llama-bench's ``tg``."""

    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"tg{self.n_gen}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_gen)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.generate(self.n_gen, self.depth)


@dataclass(frozen=True)
class PrefillGenerate(Workload):
    """A prefill and the generation behind it, as one; llama-bench's ``-pg``."""

    n_prompt: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"pp{self.n_prompt}+tg{self.n_gen}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_prompt + self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_prompt + self.n_gen)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.prefill_generate(self.n_prompt, self.n_gen, self.depth)


@dataclass(frozen=True)
class Parallel(Workload):
    """Decode `n_gen` tokens of each of `n_seq` sequences, a batch a step; the rate is of all."""

    n_seq: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return _at_depth(f"tg{self.n_gen} x {self.n_seq}", self.depth)

    @property
    def n_tokens(self) -> int:  # noqa: D102
        return self.n_seq * self.n_gen

    def fit(self, params: LlamaParams) -> LlamaParams:  # noqa: D102
        return fit_context(params, self.depth + self.n_gen, self.n_seq)

    def run(self, bed: Bed) -> float:  # noqa: D102
        return bed.parallel(self.n_seq, self.n_gen, self.depth)


def fit_context(params: LlamaParams, n_per_seq: int, n_seq: int = 1) -> LlamaParams:
    """Return `params` with room for `n_seq` sequences of `n_per_seq` tokens at least.

    An ``n_ctx`` that is not set becomes just that, as in llama-bench: both pad the cache alike.
    """
    n_seq = max(n_seq, params.n_seq_max or 1)
    changes: dict[str, Any] = {"n_ctx": max(params.n_ctx or 0, n_seq * n_per_seq)}
    if params.n_ctx == 0:  # as trained, in total; Bed refuses what that is too small for
        changes.clear()
    if n_seq > 1:
        changes["n_seq_max"] = n_seq
    if params.n_outputs_max is not None and params.n_outputs_max < n_seq:
        changes["n_outputs_max"] = n_seq
    return params.replace(**changes)


def _at_depth(name: str, depth: int) -> str:
    return f"{name} @ d{depth}" if depth else name
