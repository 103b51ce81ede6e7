"""LoRA adapters of one model, and the sets of them that requests ask for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from weakref import WeakSet

from . import _core
from .errors import AdapterError
from .model_identity import file_identity
from .params import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .engine import Engine, Scheduler

    LoraChoice = _core.LoraAdapter | Mapping[_core.LoraAdapter, float]

# A set stays known, with its part of the prefix cache, as long as the model is loaded.
_MOST_SETS = 4096


class LoraSets:
    """Gives each set of adapters and scales a number, which equal sets share.

    Sequences with the same number run in the same batches and may share cells.

    Thread-safety: any thread.
    """

    def __init__(self, model: _core.Model, engine: Engine[Scheduler]) -> None:
        self._model = model
        self._engine = engine
        self._indices: dict[frozenset[tuple[_core.LoraAdapter, float]], int] = {frozenset(): 0}
        self._loaded: WeakSet[_core.LoraAdapter] = WeakSet()

    def load(self, path: str | os.PathLike[str]) -> _core.LoraAdapter:
        """Load an adapter for the model. Raises `ModelNotFoundError`, `AdapterError`."""
        adapter = _core.LoraAdapter(self._model, path)
        self._loaded.add(adapter)
        return adapter

    def close(self) -> None:
        """Close the adapters, which keep the model in memory."""
        for adapter in list(self._loaded):
            adapter.close()

    def index(self, choice: LoraChoice | None) -> int:
        """Return the number of a set; 0 is the model alone."""
        if choice is None:
            return 0
        scales = self._scales(choice)
        known = self._indices.get(frozenset(scales.items()))
        if known is not None:
            return known
        return self._engine.exclusively(self._add, scales)

    def _scales(self, choice: LoraChoice) -> dict[_core.LoraAdapter, float]:
        pairs = choice.items() if isinstance(choice, Mapping) else [(choice, 1.0)]
        scales: dict[_core.LoraAdapter, float] = {}
        for adapter, scale in pairs:
            if not isinstance(adapter, _core.LoraAdapter):
                raise ParameterError(
                    f"lora: expected adapters of load_lora with their scales, not {adapter!r}"
                )
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise ParameterError(f"lora: expected a number as scale, not {scale!r}")
            if not math.isfinite(scale):
                raise ParameterError(f"lora: expected a finite scale, not {scale!r}")
            if adapter.closed:
                raise AdapterError(f"lora: the adapter {adapter.path} is closed")
            if adapter.model is not self._model:
                raise AdapterError("lora: the adapter was loaded for another model")
            if scale:
                scales[adapter] = float(scale)
        return scales

    def _add(self, scales: dict[_core.LoraAdapter, float]) -> int:
        key = frozenset(scales.items())
        if key in self._indices:  # another thread came first
            return self._indices[key]
        if len(self._indices) >= _MOST_SETS:
            raise AdapterError(f"lora: more than {_MOST_SETS - 1} different sets are in use")
        index = len(self._indices)
        scheduler = self._engine.scheduler
        scheduler.stepper.set_adapters(index, scales)
        scheduler.cache.namespaces[index] = _namespace(scales)
        self._indices[key] = index
        return index


def _namespace(scales: Mapping[_core.LoraAdapter, float]) -> str:
    """Return a name for states that were computed with these adapters, whatever process does it."""
    import hashlib

    parts = sorted(
        f"{file_identity([adapter.path])}@{scale!r}" for adapter, scale in scales.items()
    )
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
