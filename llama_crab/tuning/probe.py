"""The machine as this process may use it: cores, quota, memory.

ggml gives every thread an equal share of each operation and waits for the slowest, so a thread on
an efficiency core or on the second half of a busy core costs more than it brings. The default is
therefore one thread per performance core, within affinity and the CPU quota of the control group.

On Linux everything is read below ``root``, so that tests can show another machine.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

# A core slower than this share of the fastest one counts as an efficiency core. Preferred cores
# of one kind differ by up to 14 % in their top frequency, kinds by a quarter and more.
_SAME_KIND = 0.8
_CPU = "sys/devices/system/cpu"
_V1_CPU = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
# cgroup v1 says "no limit" by the largest multiple of the page size.
_V1_NO_LIMIT = 2**62


@dataclass(frozen=True)
class ThreadChoice:
    """The default number of threads, and ``why`` in words."""

    n_threads: int
    why: str


@dataclass(frozen=True)
class _Cores:
    """Cores this process may run on: all of them, and those of the fastest kind."""

    allowed: int
    fast: int


def default_n_threads(
    *, root: str | os.PathLike[str] = "/", affinity: Collection[int] | None = None
) -> int:
    """Return how many threads to use by default; at least 1. See `thread_choice`."""
    return thread_choice(root=root, affinity=affinity).n_threads


def thread_choice(
    *, root: str | os.PathLike[str] = "/", affinity: Collection[int] | None = None
) -> ThreadChoice:
    """Return the default number of threads and the reason for it.

    It is the number of performance cores that the affinity mask allows, cut to the CPU quota of
    the control group (rounded up). ``root`` and ``affinity`` replace the machine's own.
    """
    base = Path(root)
    cores = _cores(base, affinity)
    n_threads = cores.fast
    why = "physical cores" if cores.fast == cores.allowed else "performance cores"
    why = f"{cores.fast} {why} usable"
    if cores.fast != cores.allowed:
        why += f" (of {cores.allowed} cores)"
    quota = cpu_quota(root=base)
    if quota is not None and math.ceil(quota) < n_threads:
        n_threads = math.ceil(quota)
        why += f", cut to the CPU quota of {quota:g}"
    return ThreadChoice(max(1, n_threads), why)


def usable_cores(
    *, root: str | os.PathLike[str] = "/", affinity: Collection[int] | None = None
) -> int:
    """Return the physical cores of every kind that the affinity mask allows; at least 1."""
    return max(1, _cores(Path(root), affinity).allowed)


def physical_cores(*, root: str | os.PathLike[str] = "/") -> int:
    """Return the number of physical cores that are online, of every kind; at least 1."""
    base = Path(root)
    if _is_linux(base):
        return max(1, len(set(_core_of(base, _online(base)).values())))
    return _cores(base, None).allowed


def cpu_quota(*, root: str | os.PathLike[str] = "/") -> float | None:
    """Return the CPU quota of this process's control group in cores, or None without one."""
    base = Path(root)
    quotas: list[float] = []
    for folder in _groups(base, "cpu", _V1_CPU):
        limit = (_read(folder / "cpu.max") or "").split()
        if len(limit) == 2 and limit[0] != "max":
            quotas.append(int(limit[0]) / int(limit[1]))
        quota = _read_int(folder / "cpu.cfs_quota_us")
        period = _read_int(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def total_memory(*, root: str | os.PathLike[str] = "/") -> int:
    """Return the memory this process may use at most, in bytes (0: not known)."""
    base = Path(root)
    if _is_linux(base):
        limits = [limit for limit, _ in _memory_limits(base)]
        return min([_meminfo(base).get("MemTotal", 0), *limits])
    if sys.platform == "win32":
        return _windows_memory()[0]
    return sysctl("hw.memsize") or 0


def available_memory(*, root: str | os.PathLike[str] = "/") -> int:
    """Return the memory that can be taken without swapping, in bytes (0: not known)."""
    base = Path(root)
    if _is_linux(base):
        rooms = [max(0, limit - used) for limit, used in _memory_limits(base)]
        return min([_meminfo(base).get("MemAvailable", 0), *rooms])
    if sys.platform == "win32":
        return _windows_memory()[1]
    return _darwin_available()


def _is_linux(base: Path) -> bool:
    return sys.platform.startswith("linux") or base != Path("/")


def _cores(base: Path, affinity: Collection[int] | None) -> _Cores:
    if _is_linux(base):
        return _linux_cores(base, affinity)
    if sys.platform == "darwin":
        count = sysctl("hw.physicalcpu") or os.cpu_count() or 1
        return _Cores(count, sysctl("hw.perflevel0.physicalcpu") or count)
    if sys.platform == "win32":
        return _windows_cores()
    count = os.cpu_count() or 1
    return _Cores(count, count)


# Linux


def _linux_cores(base: Path, affinity: Collection[int] | None) -> _Cores:
    online = _online(base)
    if affinity is None and base == Path("/"):
        affinity = _affinity()
    allowed = [cpu for cpu in online if affinity is None or cpu in affinity]
    # An affinity of CPUs that /sys does not list: trust the scheduler, it runs us there.
    cpus = allowed or sorted(affinity or [0])
    core_of = _core_of(base, cpus)
    speed = _speeds(base, cpus)
    fastest = max(speed.values())
    fast = {core_of[cpu] for cpu in cpus if speed[cpu] >= _SAME_KIND * fastest}
    return _Cores(len(set(core_of.values())), len(fast))


def _affinity() -> set[int] | None:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return None


def _online(base: Path) -> list[int]:
    text = _read(base / _CPU / "online")
    if text:
        return _parse_cpu_list(text)
    listed = [int(block["processor"]) for block in _cpuinfo(base) if "processor" in block]
    if listed:
        return listed
    return list(range(os.cpu_count() or 1)) if base == Path("/") else []


def _core_of(base: Path, cpus: Collection[int]) -> dict[int, object]:
    """Name the core of each CPU: CPUs of one core get equal names."""
    blocks = {block["processor"]: block for block in _cpuinfo(base) if "processor" in block}
    names: dict[int, object] = {}
    for cpu in cpus:
        topology = base / _CPU / f"cpu{cpu}" / "topology"
        # core_id alone repeats between packages, dies and (on Arm) clusters; the list of a core's
        # CPUs cannot.
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        core = _read(topology / "core_id")
        block = blocks.get(str(cpu), {})
        if siblings:
            names[cpu] = siblings
        elif core:
            names[cpu] = (_read(topology / "physical_package_id"), core)
        elif "core id" in block:
            names[cpu] = (block.get("physical id"), block["core id"])
        else:
            names[cpu] = cpu
    return names


def _speeds(base: Path, cpus: Collection[int]) -> dict[int, float]:
    """Rate each CPU on any scale; only the ratios count."""
    # Intel's hybrid parts name the kinds outright.
    performance = _read(base / "sys/devices/cpu_core/cpus")
    if performance and _read(base / "sys/devices/cpu_atom/cpus"):
        fast = set(_parse_cpu_list(performance))
        return {cpu: 1.0 if cpu in fast else 0.5 for cpu in cpus}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        rates = {cpu: _read_int(base / _CPU / f"cpu{cpu}" / name) for cpu in cpus}
        known = {cpu: float(rate) for cpu, rate in rates.items() if rate}
        if len(known) == len(rates):
            return known
    return dict.fromkeys(cpus, 1.0)


def _parse_cpu_list(text: str) -> list[int]:
    cpus: list[int] = []
    for part in text.split(","):
        if part.strip():
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _cpuinfo(base: Path) -> Iterator[dict[str, str]]:
    for block in (_read(base / "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        yield {key.strip(): value.strip() for key, _, value in pairs}


def _groups(base: Path, controller: str, v1_mounts: Collection[str]) -> Iterator[Path]:
    """Yield the folders of this process's control group and of its ancestors, v2 and v1.

    A limit of an ancestor binds too. Inside a container the path may be the host's while the
    mount shows the container's own group at its top: folders that do not exist are harmless.
    """
    mount = base / "sys/fs/cgroup"
    for line in (_read(base / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            tops = [mount / name for name in v1_mounts]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth])


def _memory_limits(base: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use that cannot be dropped) of each control group with a limit."""
    for folder in _groups(base, "memory", ("memory",)):
        limit, used = _read_int(folder / "memory.max"), _read_int(folder / "memory.current")
        cache_key = "inactive_file"
        if limit is None:
            limit = _read_int(folder / "memory.limit_in_bytes")
            used = _read_int(folder / "memory.usage_in_bytes")
            cache_key = "total_inactive_file"
        if limit is None or limit >= _V1_NO_LIMIT:
            continue
        pairs = (line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
        yield limit, max(0, (used or 0) - stat.get(cache_key, 0))


def _meminfo(base: Path) -> dict[str, int]:
    result: dict[str, int] = {}
    for line in (_read(base / "proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words:
            result[key] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return result


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _read_int(path: Path) -> int | None:
    text = _read(path)
    try:
        return int(text) if text else None
    except ValueError:  # "max"
        return None


# macOS


def sysctl(name: str) -> int | None:
    """Return a number that macOS names so, or None."""
    if sys.platform != "darwin":
        return None
    import ctypes

    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    status = ctypes.CDLL(None).sysctlbyname(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return value.value if status == 0 else None


def _darwin_available() -> int:
    import subprocess

    try:
        shown = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return parse_vm_stat(shown)


def parse_vm_stat(shown: str) -> int:
    """Return the bytes that macOS's ``vm_stat`` output reports as free or easily freed."""
    header, _, rows = shown.partition("\n")
    digits = "".join(char for char in header if char.isdigit())
    pages = Counter[str]()
    for line in rows.splitlines():
        key, _, count = line.partition(":")
        if count.strip(" .").isdigit():
            pages[key] = int(count.strip(" ."))
    kinds = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    return int(digits or 0) * sum(pages[kind] for kind in kinds)


# Windows


def parse_processor_cores(data: bytes) -> list[tuple[int, list[tuple[int, int]]]]:
    """Decode GetLogicalProcessorInformationEx's processor cores.

    Returns (efficiency class, [(group, CPU mask), ...]) per core; a higher class is faster.
    """
    cores = []
    offset = 0
    while offset < len(data):
        relation, size = struct.unpack_from("<II", data, offset)
        if relation == 0:
            efficiency = data[offset + 9]
            (n_groups,) = struct.unpack_from("<H", data, offset + 30)
            masks = [struct.unpack_from("<QH", data, offset + 32 + 16 * i) for i in range(n_groups)]
            cores.append((efficiency, [(group, mask) for mask, group in masks]))
        offset += size
    return cores


def choose_windows_cores(
    cores: list[tuple[int, list[tuple[int, int]]]], affinity: int
) -> tuple[int, int]:
    """Return (allowed, fastest) cores under the process mask of group 0 (0: no mask)."""
    kept = [
        efficiency
        for efficiency, masks in cores
        if not affinity or any(group != 0 or mask & affinity for group, mask in masks)
    ]
    return len(kept), kept.count(max(kept, default=0))


def _windows_cores() -> _Cores:
    count = os.cpu_count() or 1
    if sys.platform != "win32":
        return _Cores(count, count)
    import ctypes

    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    size = ctypes.c_ulong(0)
    kernel32.GetLogicalProcessorInformationEx(0, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    if not kernel32.GetLogicalProcessorInformationEx(0, buffer, ctypes.byref(size)):
        return _Cores(count, count)
    mask, system = ctypes.c_size_t(0), ctypes.c_size_t(0)
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.GetProcessAffinityMask(process, ctypes.byref(mask), ctypes.byref(system))
    cores = parse_processor_cores(buffer.raw[: size.value])
    allowed, fast = choose_windows_cores(cores, mask.value)
    return _Cores(allowed or count, fast or count)


def _windows_memory() -> tuple[int, int]:
    if sys.platform != "win32":
        return 0, 0
    import ctypes

    # MEMORYSTATUSEX: two 32-bit fields, then seven 64-bit ones; total and available come first.
    status = ctypes.create_string_buffer(64)
    struct.pack_into("<I", status, 0, 64)
    if not ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(status):
        return 0, 0
    total, available = struct.unpack_from("<QQ", status, 8)
    return int(total), int(available)
