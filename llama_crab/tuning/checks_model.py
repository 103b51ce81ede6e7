"""Checks of a model file on this machine: memory, disk, kernels."""

from __future__ import annotations

from . import hardware
from .checks_machine import gib
from .finding import Finding, passed
from .subject import Subject

_SLOW_DISK = 250e6  # bytes per second; a rotating disk reads up to about this
_LONG_LOAD_SEC = 5.0
# Read in ggml/src/ggml-cpu at the pin: what multiplies a weight type with many columns at once is
# in repack.cpp, llamafile/sgemm.cpp, tiled/tiled.cpp (x86 only) and amx/. These types have none
# of them and take the dot product of one row with one column each time.
_X86_SLOW = {"Q4_1", "Q5_1", "TQ1_0", "TQ2_0", "NVFP4", "Q1_0", "Q2_0"}
_X86_AMX = {"Q4_1"}
_ARM_SLOW = {
    *("Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "NVFP4", "Q2_0", "Q2_K", "Q3_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S"),
    "IQ4_XS",
}
_ARM_I8MM = {"Q4_1"}  # two rows at a time


def memory(subject: Subject) -> Finding | None:
    """Whether weights and KV cache fit into the memory that is free."""
    name, model, machine = "memory", subject.model, subject.machine
    if model is None or not machine.memory_available or not subject.on_cpu:
        return None
    needed = model.size + model.kv_bytes
    evidence = (
        f"weights {gib(model.size)} and KV cache {gib(model.kv_bytes)}; "
        f"{gib(machine.memory_available)} of {gib(machine.memory_total)} available"
    )
    if needed <= machine.memory_available:
        return passed(name, evidence)
    return Finding(
        name,
        "problem",
        "each token reads weights from the disk again, or the system ends the process",
        evidence,
        "a smaller quantisation or model"
        if model.size > machine.memory_available
        else "a smaller n_ctx, or a quantised cache (type_k, type_v)",
    )


def storage(subject: Subject, *, measure: bool = True) -> Finding | None:
    """Whether the file lies where reading it takes long."""
    name, model = "storage", subject.model
    if model is None or subject.machine.system != "linux":
        return None
    kind = hardware.file_system(model.path, root=subject.machine.root)
    rate = hardware.disk_rate(model.path) if measure else None
    where = f"{model.path.name}: {kind or 'unknown file system'}"
    if rate is not None:
        where += f", {rate / 1e6:,.0f} MB/s past the page cache"
    if hardware.is_network(kind) and rate is None:
        return Finding(
            name,
            "advice",
            "loading waits for the network, and so does every page that memory had to give up",
            f"{where} is on the network",
            "copy the file to a local disk",
        )
    if rate is not None and rate < _SLOW_DISK and model.size / rate > _LONG_LOAD_SEC:
        return Finding(
            name,
            "advice",
            f"the first load takes about {model.size / rate:,.0f} s",
            where,
            "copy the file to a faster disk",
        )
    mode = subject.given.load_mode
    if mode == "none" and subject.on_cpu and subject.build.supports_mmap:
        return Finding(
            name,
            "advice",
            "every load copies the whole file, and processes do not share it",
            f"load_mode='none', {gib(model.size)}; {where}",
            "leave load_mode out: the file is mapped",
        )
    return passed(name, where)


def multiplies_by_row(subject: Subject) -> bool | None:
    """Return whether ggml-cpu has no batched kernel for the weights; None where not known."""
    model, features = subject.model, subject.build.features
    # BLAS turns any type into floats for large batches.
    if model is None or not model.tensor_type or not subject.on_cpu or subject.build.has_blas:
        return None
    if "AVX2" in features:
        slow = _X86_SLOW - (_X86_AMX if "AMX_INT8" in features else set())
    elif "DOTPROD" in features:
        slow = _ARM_SLOW - (_ARM_I8MM if "MATMUL_INT8" in features else set())
    else:
        return None  # `instruction_set` has the word
    return model.tensor_type in slow


def kernels(subject: Subject) -> Finding | None:
    """Whether ggml-cpu multiplies this quantisation only row by row."""
    name, model, features = "kernels", subject.model, subject.build.features
    by_row = multiplies_by_row(subject)
    if model is None or by_row is None:
        return None
    kind = model.tensor_type
    if by_row:
        return Finding(
            name,
            "advice",
            "prompts and parallel requests are slow; one answer alone is not",
            f"{model.path.name} is {kind}; for {_levels(features)}, ggml-cpu has no kernel that "
            f"multiplies {kind} with several tokens at once (its repack, sgemm, tiled or amx part)",
            "use a Q4_0, Q4_K_M or Q8_0 file of this model",
        )
    if subject.given.use_extra_bufts is False and kind in ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"):
        return Finding(
            name,
            "advice",
            "prompts are read with the slower kernels",
            f"use_extra_bufts=False keeps {kind} weights from being repacked",
            "leave use_extra_bufts out",
        )
    return passed(name, f"{kind} has batched kernels ({_levels(features)})")


def _levels(features: frozenset[str]) -> str:
    known = ("AVX2", "AVX512", "AVX512_VNNI", "AMX_INT8", "DOTPROD", "MATMUL_INT8")
    return ", ".join(name for name in known if name in features)
