"""Choose layers, context and split so that a model fits into the memory of the devices.

llama.cpp says what it would allocate without allocating (``no_alloc``); that is measured for one
layout after the other until the largest that leaves the margin is found (`placement`). llama-common
has such a search, too (``common_fit_params``), with the same margin. It is not used here: it swaps
the process's logger while other threads may log, never asks whether a device can serve at all, and
shrinks nothing for a context that llama_crab, not llama.cpp, chose. The tests compare with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import _core
from ..errors import BackendUnavailableError
from ..params import LlamaParams, ParameterError
from ..vector_methods import cannot_generate
from .placement import DeviceTooSmallError, Layout, Placement
from .rooms import DeviceRoom, check_rooms

# A context that nobody asked for may shrink to this many tokens per sequence, not further.
MIN_N_CTX = 2048
# The step in which it shrinks: llama.cpp rounds contexts up to it.
_CTX_STEP = 256
_MIB = 2**20

_logger = logging.getLogger("llama_crab.tuning")


@dataclass(frozen=True)
class MemoryRow:
    """Bytes on one device: what is there, and what weights, KV cache and compute buffers take."""

    device: str
    total: int
    free: int
    model: int
    context: int
    compute: int

    @property
    def used(self) -> int:
        """Bytes of the three together."""
        return self.model + self.context + self.compute


@dataclass(frozen=True)
class Fit:
    """What to load a model with, and the memory it takes then.

    ``rows`` are the devices that take part; ``host`` is main memory, which is shown and not
    limited. ``n_layer_max`` layers are all of them, the output layer included. ``tensor_split``
    and ``tensor_buft_overrides`` are None where llama.cpp's own choice is right. Sizes in bytes.
    Thread-safety: immutable.
    """

    n_gpu_layers: int
    n_layer_max: int
    n_ctx: int
    n_ctx_wanted: int
    n_seq_max: int
    margin: int
    rows: tuple[MemoryRow, ...]
    host: MemoryRow
    tensor_split: tuple[float, ...] | None = None
    tensor_buft_overrides: Mapping[str, str] | None = None
    n_host_experts: int = 0
    dropped: tuple[MemoryRow, ...] = ()
    """Devices that cannot take part: even without a layer they are too small."""

    @property
    def fits(self) -> bool:
        """Whether every device keeps the margin free."""
        return all(row.used + self.margin <= row.free for row in self.rows)

    @property
    def offloads_all(self) -> bool:
        """Whether all weights that llama.cpp can offload are on the devices."""
        return self.n_gpu_layers >= self.n_layer_max and self.n_host_experts == 0

    def apply(self, params: LlamaParams) -> LlamaParams:
        """Return `params` with what the fit chose; the context only where none was set."""
        changes: dict[str, Any] = {"n_gpu_layers": self.n_gpu_layers}
        if params.n_ctx is None and self.n_ctx < self.n_ctx_wanted:
            changes["n_ctx"] = self.n_ctx
        if self.tensor_split is not None:
            changes["tensor_split"] = self.tensor_split
        if self.tensor_buft_overrides is not None:
            changes["tensor_buft_overrides"] = self.tensor_buft_overrides
        if self.dropped:
            changes["devices"] = tuple(row.device for row in self.rows)
        return params.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        result = asdict(self)
        for name in ("rows", "dropped"):
            result[name] = list(result[name])
        split = self.tensor_split
        return {**result, "tensor_split": None if split is None else list(split), "fits": self.fits}


def fit(
    model: str | os.PathLike[str] | LlamaParams | None = None,
    *,
    devices: Sequence[DeviceRoom] | None = None,
    **fields: Any,
) -> Fit:
    """Return how many layers, and what context, fit into the memory of the devices.

    `model` and the keyword arguments are those of `Llama`, or one `LlamaParams`. `devices` are
    planned on in place of the machine's own, which it then need not have. A number in
    ``n_gpu_layers`` is measured as it is, and ``fits`` says whether it does.

    Where no device can take a layer, ``n_gpu_layers`` is 0 and ``rows`` is empty. Loads metadata
    several times, and no tensors. Raises `ParameterError`, `ModelNotFoundError`, `ModelLoadError`,
    `ContextCreateError`, `OutOfMemoryError`. Thread-safety: any thread.
    """
    from ..hub import resolve_model  # its imports cost more than ours

    if isinstance(model, LlamaParams):
        params = model.replace(**fields)
    else:
        params = LlamaParams.from_dict({**fields, "model": model})
    if params.profile is not None:
        from .profile import apply_profile

        params = apply_profile(params)
    rooms = None if devices is None else check_rooms(devices)
    return _Fitter(str(resolve_model(params.model)), params, rooms).run()


def fit_params(path: str | os.PathLike[str], params: LlamaParams) -> LlamaParams:
    """Return `params` fitted to the machine's devices, and log what was decided.

    Where nothing fits, the CPU computes, with a warning; but if `params` names devices, it raises
    `BackendUnavailableError`.
    """
    if params.devices is not None and not _name_gpus(params.devices):
        return params
    found = _Fitter(os.fspath(path), params, None).run()
    if not found.rows or found.n_gpu_layers == 0:
        needs = "; ".join(
            f"{row.device} has {row.free // _MIB} MiB free and needs {row.used // _MIB} MiB "
            f"before the first layer"
            if row in found.dropped
            else f"{row.device} has {row.free // _MIB} MiB free, too little for one layer"
            for row in (*found.rows, *found.dropped)
        )
        message = f"no layer fits with a margin of {found.margin // _MIB} MiB: {needs}"
        if params.devices is not None:
            raise BackendUnavailableError(f"devices: {message}")
        _logger.warning("n_gpu_layers='auto': %s; the CPU computes", message)
    else:
        _log(found)
    return found.apply(params)


def _log(found: Fit) -> None:
    shown = ", ".join(
        f"{row.device} {row.used // _MIB} of {row.free // _MIB} MiB" for row in found.rows
    )
    _logger.info(
        "n_gpu_layers='auto': %d of %d layers (%s)", found.n_gpu_layers, found.n_layer_max, shown
    )
    if found.n_host_experts:
        _logger.info("the experts of %d layers stay in host memory", found.n_host_experts)
    if found.n_ctx < found.n_ctx_wanted:
        _logger.warning(
            "n_ctx is %d in place of %d, so that all layers fit; set n_ctx to keep it",
            *(found.n_ctx, found.n_ctx_wanted),
        )


def _name_gpus(names: Sequence[str]) -> bool:
    kinds = {device.name: device.type for device in _core.devices()}
    # What does not exist is refused by the load, which says what does.
    return all(name in kinds for name in names) and any(
        kinds[name] in ("gpu", "igpu") for name in names
    )


class _Fitter:
    """One fit: the model's facts, the devices, and measuring."""

    def __init__(
        self, path: str, params: LlamaParams, rooms: tuple[DeviceRoom, ...] | None
    ) -> None:
        if params.split_mode in ("row", "tensor") and (
            rooms is not None or _core.supports_gpu_offload()
        ):
            raise ParameterError(
                f"n_gpu_layers: 'auto' cannot be fitted with split_mode={params.split_mode!r}; "
                "give a number of layers (-1 for all)"
            )
        self._path = path
        fixed = params.n_gpu_layers
        self._n_fixed = fixed if isinstance(fixed, int) else None
        with _core.Model(path, no_alloc=True, load_mode="none", **_overrides(params)) as model:
            if params.embeddings is None and cannot_generate(model):
                params = params.replace(embeddings=True)
            self._n_ctx_train = model.n_ctx_train
            self._n_layer = model.n_layer
            metadata = model.metadata
        architecture = metadata.get("general.architecture", "")
        self._has_experts = int(metadata.get(f"{architecture}.expert_count", "0")) > 0
        resolved = params.resolve(n_ctx_train=self._n_ctx_train, n_threads=1, offloaded=True)
        self._n_ctx = resolved.n_ctx or self._n_ctx_train
        self._params = params
        self._model_fields = params.model_params()
        self._model_fields.pop("n_gpu_layers", None)
        self._context_fields = resolved.replace(n_ctx=self._n_ctx).context_params()
        self._n_seq_max = resolved.n_seq_max or 1
        self._margin = params.fit_margin_mib * _MIB
        self._planned = rooms is not None
        self._n_layer_max = self._n_layer + 1
        # None: those that llama.cpp takes by itself.
        self._devices = None if rooms is None else self._take_part(rooms)
        self._known: dict[tuple[Layout, int], list[MemoryRow]] = {}

    def _take_part(self, rooms: tuple[DeviceRoom, ...]) -> list[MemoryRow]:
        if self._params.split_mode == "none":
            main = self._params.main_gpu or 0
            if main >= len(rooms):
                raise ParameterError(f"main_gpu: {main}, but there are {len(rooms)} devices")
            rooms = rooms[main : main + 1] if main >= 0 else ()
        return [MemoryRow(room.name, room.total, room.n_free, 0, 0, 0) for room in rooms]

    def run(self) -> Fit:
        """Search; leave out devices that cannot take part."""
        n = -1 if self._n_fixed is None else self._n_fixed
        first = self._measure(Layout(n, self._n_ctx))
        if self._devices is None:
            # Free memory as it is while a context exists: a backend's own needs are in use then.
            self._devices = first[:-1]
        if n < 0:
            n = self._n_layer_max
            self._known[Layout(n, self._n_ctx), len(self._devices)] = first
        if self._n_fixed is not None:
            return self._result(Layout(n if self._devices else 0, self._n_ctx), [])
        dropped: list[MemoryRow] = []
        while self._devices:
            try:
                return self._result(self._search(self._devices), dropped)
            except DeviceTooSmallError as error:
                # The row says what it would need without a layer.
                dropped.append(self._measure(Layout(0, self._n_ctx))[error.index])
                self._devices = [row for row in self._devices if row.device != dropped[-1].device]
        return self._result(Layout(0, self._n_ctx), dropped)

    def _search(self, devices: list[MemoryRow]) -> Layout:
        rooms = [row.free - self._margin for row in devices]
        own_overrides = self._params.tensor_buft_overrides is not None
        placement = Placement(
            lambda layout: [row.used for row in self._measure(layout)[:-1]],
            *(rooms, self._n_layer_max),
            n_expert_layers=self._n_layer if self._has_experts and not own_overrides else 0,
            own_split=self._params.tensor_split is not None,
        )
        n_ctx_min = self._n_ctx
        if self._params.n_ctx is None and not self._context_fields.get("embeddings"):
            n_ctx_min = min(self._n_ctx, MIN_N_CTX * self._n_seq_max)
        return placement.choose(self._n_ctx, n_ctx_min, _CTX_STEP * self._n_seq_max)

    def _measure(self, layout: Layout) -> list[MemoryRow]:
        """Return the rows of the devices that take part, and the host's."""
        devices = self._devices
        # Devices are only ever left out, so their number tells which ones they are.
        key = (layout, -1 if devices is None else len(devices))
        if key in self._known:
            return self._known[key]
        fields = {**self._model_fields, "n_gpu_layers": layout.n_gpu_layers}
        rooms: list[tuple[str, int, int]] = []
        if self._planned and devices is not None:
            rooms = [(row.device, row.free, row.total) for row in devices]
            # One device is left of those that split_mode="none" chooses from.
            fields |= {"devices": (), "main_gpu": 0}
        elif devices is not None:
            fields["devices"] = tuple(row.device for row in devices)
            if self._params.split_mode == "none":
                fields["main_gpu"] = 0
        if layout.split is not None:
            fields["tensor_split"] = layout.split
        if layout.n_host_experts:
            fields["tensor_buft_overrides"] = _host_experts(layout.n_host_experts)
        use = _core.measure_memory(
            self._path, fields, {**self._context_fields, "n_ctx": layout.n_ctx}, rooms
        )
        self._n_layer_max = use["n_layer_max"]
        self._known[key] = [MemoryRow(**row) for row in use["rows"]]
        return self._known[key]

    def _result(self, layout: Layout, dropped: list[MemoryRow]) -> Fit:
        measured = self._measure(layout)
        # Free memory as the search saw it, which may have moved since.
        rows = tuple(
            MemoryRow(row.device, room.total, room.free, row.model, row.context, row.compute)
            for row, room in zip(measured, self._devices or (), strict=False)
        )
        experts = layout.n_host_experts
        return Fit(
            n_gpu_layers=layout.n_gpu_layers,
            n_layer_max=self._n_layer_max,
            n_ctx=layout.n_ctx,
            n_ctx_wanted=self._n_ctx,
            n_seq_max=self._n_seq_max,
            margin=self._margin,
            rows=rows,
            host=measured[-1],
            tensor_split=None if layout.split is None else tuple(map(float, layout.split)),
            tensor_buft_overrides=_host_experts(experts) if experts else None,
            n_host_experts=experts,
            dropped=tuple(dropped),
        )


def _overrides(params: LlamaParams) -> dict[str, Any]:
    return {} if params.kv_overrides is None else {"kv_overrides": params.kv_overrides}


def _host_experts(n_layers: int) -> dict[str, str]:
    """Return the override that leaves the experts of the first layers in host memory."""
    layers = "|".join(str(layer) for layer in range(n_layers))
    return {rf"blk\.({layers})\.ffn_(up|down|gate_up|gate)_(ch|)exps": "CPU"}
