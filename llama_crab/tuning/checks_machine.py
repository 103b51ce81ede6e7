"""Checks of the machine and of the build, with no model in sight."""

from __future__ import annotations

from . import hardware
from .finding import Finding, passed
from .subject import Subject

_BACKENDS = {"NVIDIA": "cuda", "AMD": "rocm (or vulkan)", "Intel": "vulkan"}
_REBUILD = "build from source on this machine, with LLAMA_CRAB_ISA=native (the default)"
# ggml's name, Linux's flag. With the first group missing, everything is several times slower.
_X86_BASE = (("AVX", "avx"), ("AVX2", "avx2"), ("FMA", "fma"), ("F16C", "f16c"))
_X86_MORE = (
    ("AVX512", "avx512f"),
    ("AVX512_VNNI", "avx512_vnni"),
    ("AVX512_BF16", "avx512_bf16"),
    ("AVX_VNNI", "avx_vnni"),
    ("AMX_INT8", "amx_int8"),
)
_ARM_BASE = (("DOTPROD", "asimddp"),)
_ARM_MORE = (("MATMUL_INT8", "i8mm"),)
_PSTATE_DRIVERS = ("intel_pstate", "amd-pstate-epp")
_LOW_CLOCK = 0.7
_LITTLE_MEMORY = 0.1
_STALLED = 0.1


def gpu_backend(subject: Subject) -> Finding | None:
    """Whether a GPU of this machine lies idle because the build cannot use it."""
    name, build, machine = "gpu-backend", subject.build, subject.machine
    if build.gpu_names:
        return passed(name, f"{build.backend}: {', '.join(build.gpu_names)}")
    if machine.system == "darwin" and machine.is_arm:
        return Finding(
            name,
            "problem",
            "everything runs on the CPU although this Mac has a GPU",
            f"Apple silicon; the build is for {build.backend} and has no Metal device",
            "pip install with -C backend=metal (the default when built on Apple silicon)",
        )
    usable = [gpu for gpu in machine.gpus if gpu.usable]
    if usable and build.backend == "cpu":
        kinds = dict.fromkeys(_BACKENDS[gpu.vendor] for gpu in usable)
        return Finding(
            name,
            "problem",
            "everything runs on the CPU although there is a GPU",
            f"{', '.join(gpu.name for gpu in usable)}; the build is for cpu",
            f"pip install with -C backend={' or '.join(kinds)}",
        )
    if build.backend != "cpu":
        seen = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU that it could use is in sight"
        return Finding(
            name,
            "problem",
            f"the build is for {build.backend}, but everything runs on the CPU",
            f"the backend finds no device; {seen}",
            "check the driver, CUDA_VISIBLE_DEVICES and its kin, and what the container may see",
        )
    if machine.gpus:
        return Finding(
            name,
            "advice",
            "a GPU is on the bus, but this process cannot use it",
            f"{', '.join(gpu.name for gpu in machine.gpus)}: no device node in /dev",
            "install its driver or give the container access, then build for its backend",
        )
    return passed(name, "no GPU in sight")


def instruction_set(subject: Subject) -> Finding | None:
    """Whether ggml-cpu was compiled for the instructions that this CPU has."""
    name, flags, features = "instruction-set", subject.machine.flags, subject.build.features
    if not flags or not features:
        return None
    base, more = (_ARM_BASE, _ARM_MORE) if subject.machine.is_arm else (_X86_BASE, _X86_MORE)
    if subject.machine.system == "linux":
        pairs = (*base, *more)
        absent = [ours for ours, theirs in pairs if ours in features and theirs not in flags]
        if absent:
            return Finding(
                name,
                "problem",
                "the process may end with an illegal instruction",
                f"compiled for {', '.join(absent)}, which this CPU does not list",
                f"{_REBUILD}, or for a lower level",
            )
    unused = [ours for ours, theirs in base if theirs in flags and ours not in features]
    if unused:
        return Finding(
            name,
            "problem",
            "prompts and answers are several times slower than this CPU allows",
            f"the CPU has {', '.join(unused)}, the build does not use it",
            _REBUILD,
        )
    unused = [ours for ours, theirs in more if theirs in flags and ours not in features]
    if "AVX512_VNNI" in features and "AVX_VNNI" in unused:
        unused.remove("AVX_VNNI")  # the same dot products, wider
    if "AVX512_BF16" in unused and not _is_bf16(subject):
        unused.remove("AVX512_BF16")
    if unused:
        return Finding(
            name,
            "advice",
            "prompts may be read slower than this CPU allows",
            f"the CPU has {', '.join(unused)}, the build does not use it",
            _REBUILD,
        )
    return passed(name, f"the build uses {', '.join(sorted(features))}")


def cpu_frequency(subject: Subject) -> Finding | None:
    """Whether a governor or a limit keeps the CPU's clock down."""
    name, root = "cpu-frequency", subject.machine.root
    if subject.machine.system != "linux":
        return None
    policies = hardware.frequencies(root)
    for policy in policies:
        # The p-state drivers' own "powersave" is the ordinary one, which follows the load.
        if policy.governor == "powersave" and policy.driver not in _PSTATE_DRIVERS:
            return Finding(
                name,
                "problem",
                "the CPU stays at its lowest clock",
                f"governor powersave of the driver {policy.driver or '(unknown)'}",
                "sudo cpupower frequency-set -g schedutil (or performance)",
            )
        if policy.governor == "powersave" and policy.preference == "power":
            return Finding(
                name,
                "advice",
                "the CPU prefers a low clock",
                f"energy_performance_preference is power ({policy.driver})",
                "choose the balanced or the performance profile",
            )
        if 0 < policy.limit < _LOW_CLOCK * policy.highest:
            return Finding(
                name,
                "advice",
                "the CPU is held below its clock",
                f"scaling_max_freq {policy.limit / 1e6:.1f} GHz of {policy.highest / 1e6:.1f} GHz",
                "raise it: sudo cpupower frequency-set -u, or another power profile",
            )
    if not policies:
        return None
    return passed(name, f"governor {policies[0].governor} ({policies[0].driver})")


def battery(subject: Subject) -> Finding | None:
    """Whether all cores of a laptop would run on its battery."""
    if subject.machine.system != "linux" or not hardware.laptop_on_battery(subject.machine.root):
        return None
    n_threads = subject.params.n_threads or subject.machine.threads.n_threads
    half = max(1, subject.machine.n_cores // 2)
    if n_threads <= half:
        return passed("battery", f"on battery, {n_threads} threads")
    return Finding(
        "battery",
        "advice",
        "the CPU gets hot, lowers its clock, and the battery drains",
        f"a laptop on battery, {n_threads} threads on {subject.machine.n_cores} cores",
        f"n_threads={half}, half of the cores",
    )


def memory_pressure(subject: Subject) -> Finding | None:
    """Whether the system is already short of memory."""
    name, machine = "memory-pressure", subject.machine
    if machine.system != "linux" or not machine.memory_total:
        return None
    info = hardware.meminfo(machine.root)
    limited = machine.memory_total < info.get("MemTotal", 0)
    swapped = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    stall = hardware.memory_stall(machine.root)
    room = (
        f"{gib(machine.memory_available)} of {gib(machine.memory_total)} available"
        f"{' below the limit of the control group' if limited else ''}"
        f"{f', {gib(swapped)} in swap' if swapped > 0 else ''}"
    )
    if stall is not None and stall > _STALLED:
        return Finding(
            name,
            "problem",
            "programs wait for memory: the system swaps or reads its caches again",
            f"in {stall:.0%} of the last minute something waited for memory; {room}",
            "end other programs, or use a smaller model or context",
        )
    if machine.memory_available < _LITTLE_MEMORY * machine.memory_total:
        return Finding(
            name,
            "advice",
            "little memory is left; the next allocation may swap or end a process",
            room,
            "raise the limit of the control group" if limited else "end other programs",
        )
    return passed(name, room)


def gib(n_bytes: int) -> str:
    """Return a size for people."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.0f} MiB"


def _is_bf16(subject: Subject) -> bool:
    return subject.model is not None and subject.model.tensor_type == "BF16"
