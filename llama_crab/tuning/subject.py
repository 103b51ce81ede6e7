"""What the checks look at: the machine, the build, a configuration and a model, as plain values."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .. import _core
from ..params import LlamaParams
from . import hardware
from .probe import (
    ThreadChoice,
    available_memory,
    thread_choice,
    total_memory,
    usable_cores,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True)
class Machine:
    """The machine as this process may use it; memory in bytes, 0 where not known."""

    root: Path
    system: str
    is_arm: bool
    flags: frozenset[str]
    gpus: tuple[hardware.Gpu, ...]
    n_cores: int
    threads: ThreadChoice
    memory_total: int
    memory_available: int

    @classmethod
    def read(
        cls,
        root: str | os.PathLike[str] = "/",
        *,
        affinity: Collection[int] | None = None,
    ) -> Machine:
        """Look at this machine, or at the one whose /proc, /sys and /dev are below `root`."""
        base = Path(root)
        here = base == Path("/")
        flags = hardware.cpu_flags(base)
        arm = platform.machine().lower() in ("arm64", "aarch64") if here else "asimd" in flags
        return cls(
            root=base,
            system=sys.platform if here else "linux",
            is_arm=arm,
            flags=flags,
            gpus=tuple(hardware.gpus(base)),
            n_cores=usable_cores(root=base, affinity=affinity),
            threads=thread_choice(root=base, affinity=affinity),
            memory_total=total_memory(root=base),
            memory_available=available_memory(root=base),
        )


@dataclass(frozen=True)
class Build:
    """What is compiled in: the backend, its GPUs, and the instruction sets that ggml-cpu uses."""

    backend: str
    features: frozenset[str]
    gpu_names: tuple[str, ...] = ()
    gpu_free: int = 0
    has_blas: bool = False
    supports_mmap: bool = True

    @classmethod
    def read(cls) -> Build:
        """Look at the build that is loaded."""
        devices = _core.devices()
        gpus = [device for device in devices if device.type in ("gpu", "igpu")]
        return cls(
            backend=_core.build_backend(),
            features=cpu_features(_core.system_info()),
            gpu_names=tuple(f"{device.name} ({device.description.strip()})" for device in gpus),
            gpu_free=sum(device.memory_free for device in gpus),
            has_blas=any(device.type == "accel" for device in devices),
            supports_mmap=_core.supports_mmap(),
        )


@dataclass(frozen=True)
class ModelFacts:
    """What a GGUF says about itself; sizes in bytes."""

    path: Path
    size: int
    kv_bytes: int
    ftype: str
    n_layer: int
    n_ctx_train: int
    has_chat_template: bool = False
    embeds: bool = False

    @property
    def tensor_type(self) -> str:
        """The type of most weights, such as ``"Q4_K"``; empty where the file does not say."""
        match = re.search(r"\b(?:I?Q\d+_\w+|TQ\d_\d|BF16|F16|F32|MXFP4|NVFP4)\b", self.ftype)
        return match[0] if match else ""


@dataclass(frozen=True)
class Subject:
    """All that is examined. ``given`` are the parameters as written, ``params`` the resolved."""

    machine: Machine
    build: Build
    given: LlamaParams = field(default_factory=LlamaParams)
    params: LlamaParams = field(default_factory=LlamaParams)
    model: ModelFacts | None = None

    @property
    def n_gpu_layers(self) -> int | None:
        """The number of layers that was asked for, None for "auto"."""
        layers = self.given.n_gpu_layers
        return layers if isinstance(layers, int) else None

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes every layer."""
        return not self.build.gpu_names or self.given.n_gpu_layers == 0


def cpu_features(system_info: str) -> frozenset[str]:
    """Return the switches that are on in the CPU's part of ``llama_print_system_info``."""
    _, _, after = system_info.partition("CPU : ")
    names = set()
    for part in after.split("|"):
        name, equals, value = part.partition("=")
        if " : " in f"{part} ":  # the next backend
            break
        if equals and value.strip() not in ("", "0"):
            names.add(name.strip())
    return frozenset(names)
