"""What is built into the machine and how it is set: GPUs, instruction sets, power, disks.

No vendor's library is asked, since the question is often why one is missing: everything is read
from /proc, /sys and /dev, below ``root``, so that tests can show another machine.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .probe import sysctl

_PCI = "sys/bus/pci/devices"
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
# An integrated AMD GPU shows what the firmware took from the host's memory: mostly 0.5 to 2 GiB.
_LEAST_VRAM = 4 * 2**30
# SMBIOS 7.4.1: portable, laptop, notebook, hand held, sub notebook, tablet, convertible, detachable
_PORTABLE = {"8", "9", "10", "11", "14", "30", "31", "32"}
_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"),
    *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.blobfuse2"),
    *("fuse.glusterfs", "fuse.ceph-fuse"),
}
_READ_BYTES, _READ_BLOCK = 64 << 20, 4 << 20
# Names of macOS for what Linux lists in /proc/cpuinfo.
_DARWIN_FLAGS = {
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "avx2": "hw.optional.avx2_0",
    "fma": "hw.optional.fma",
    "avx512f": "hw.optional.avx512f",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU with memory of its own. ``usable``: this process has the device node of its driver."""

    vendor: str
    name: str
    usable: bool


@dataclass(frozen=True)
class Frequency:
    """How the CPU's clock is governed; frequencies in kHz, empty or 0 where not known."""

    driver: str
    governor: str
    preference: str
    limit: int
    highest: int


def gpus(root: str | os.PathLike[str] = "/") -> list[Gpu]:
    """Return the GPUs that could compute: NVIDIA's, and discrete ones of AMD and Intel."""
    base = Path(root)
    found = []
    for folder in sorted(_children(base / _PCI)):
        vendor = _VENDORS.get(read(folder / "vendor"))
        if vendor is None or not read(folder / "class").startswith("0x03"):
            continue
        if vendor == "AMD" and _number(folder / "mem_info_vram_total") < _LEAST_VRAM:
            continue
        # Intel's integrated GPU is always on bus 0.
        if vendor == "Intel" and folder.name.split(":")[-2:-1] == ["00"]:
            continue
        found.append(Gpu(vendor, _gpu_name(base, folder, vendor), _has_node(base, folder, vendor)))
    if not any(gpu.vendor == "NVIDIA" for gpu in found):
        # A container may have the node without the bus; WSL has neither, but the library.
        library = base / "usr/lib/wsl/lib/libcuda.so.1"
        if _nvidia_nodes(base) or (library.exists() and (base / "dev/dxg").exists()):
            found.append(Gpu("NVIDIA", "NVIDIA GPU", True))
    return found


def cpu_flags(root: str | os.PathLike[str] = "/") -> frozenset[str]:
    """Return the instruction sets of the CPU by Linux's names; empty where not known."""
    for line in read(Path(root) / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    if sys.platform == "darwin" and Path(root) == Path("/"):
        return frozenset(flag for flag, name in _DARWIN_FLAGS.items() if sysctl(name))
    return frozenset()


def frequencies(root: str | os.PathLike[str] = "/") -> list[Frequency]:
    """Return how each group of CPUs is governed."""
    return [
        Frequency(
            driver=read(folder / "scaling_driver"),
            governor=read(folder / "scaling_governor"),
            preference=read(folder / "energy_performance_preference"),
            limit=_number(folder / "scaling_max_freq"),
            highest=_number(folder / "cpuinfo_max_freq"),
        )
        for folder in sorted(_children(Path(root) / "sys/devices/system/cpu/cpufreq"))
        if folder.name.startswith("policy")
    ]


def laptop_on_battery(root: str | os.PathLike[str] = "/") -> bool:
    """Return whether this is a portable machine that runs on its battery now."""
    base = Path(root)
    chassis = read(base / "sys/class/dmi/id/chassis_type")
    if chassis and chassis not in _PORTABLE:  # a battery may also be a UPS
        return False
    discharging = False
    for supply in _children(base / "sys/class/power_supply"):
        if read(supply / "scope") == "Device":  # a mouse's
            continue
        if read(supply / "type") == "Battery":
            discharging |= read(supply / "status") == "Discharging"
        elif _number(supply / "online") == 1:
            return False
    return discharging


def meminfo(root: str | os.PathLike[str] = "/") -> dict[str, int]:
    """Return the rows of /proc/meminfo in bytes."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", read(Path(root) / "proc/meminfo"), re.MULTILINE)
    return {key: int(value) * 1024 for key, value in rows}


def memory_stall(root: str | os.PathLike[str] = "/") -> float | None:
    """Return the share of the last minute in which something waited for memory, or None."""
    match = re.search(r"^some .*avg60=([\d.]+)", read(Path(root) / "proc/pressure/memory"))
    return float(match[1]) / 100 if match else None


def file_system(path: str | os.PathLike[str], *, root: str | os.PathLike[str] = "/") -> str:
    """Return the type of the file system that holds a file, or an empty text."""
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in read(Path(root) / "proc/mounts").splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[1])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point the later one is seen.
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def is_network(kind: str) -> bool:
    """Return whether a type of file system keeps its files on another machine."""
    return kind in _NETWORK


def disk_rate(path: str | os.PathLike[str], budget_sec: float = 0.3) -> float | None:
    """Return the bytes per second at which a file is read past the page cache, or None.

    Reads at most 64 MiB from its middle. None where the file is too small to tell, or the system
    cannot read so.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return None
    import mmap

    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError:
        return None
    try:
        size = os.fstat(descriptor).st_size
        if size < 4 * _READ_BLOCK:
            return None
        start = at = size // 4 // _READ_BLOCK * _READ_BLOCK
        with mmap.mmap(-1, _READ_BLOCK) as block:  # aligned, as direct reads need it
            began = time.perf_counter()
            elapsed = 0.0
            while at - start < _READ_BYTES and at + _READ_BLOCK <= size and elapsed < budget_sec:
                n_read = os.preadv(descriptor, [block], at)
                if n_read < _READ_BLOCK:
                    return None
                at += n_read
                elapsed = time.perf_counter() - began
        return (at - start) / elapsed if elapsed else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read(path: Path) -> str:
    """Return the text of a file of /proc or /sys, or an empty text."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = read(path)
    return int(text) if text.isdecimal() else 0


def _children(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return


def _nvidia_nodes(base: Path) -> bool:
    return any(re.fullmatch(r"nvidia\d+", node.name) for node in _children(base / "dev"))


def _has_node(base: Path, folder: Path, vendor: str) -> bool:
    if vendor == "NVIDIA":
        return _nvidia_nodes(base)
    nodes = [node.name for node in _children(folder / "drm") if node.name.startswith("renderD")]
    return any((base / "dev/dri" / node).exists() for node in nodes)


def _gpu_name(base: Path, folder: Path, vendor: str) -> str:
    shown = read(base / "proc/driver/nvidia/gpus" / folder.name / "information")
    match = re.search(r"^Model:\s*(.+)$", shown, re.MULTILINE)
    device = read(folder / "device").removeprefix("0x")
    return match[1].strip() if match else f"{vendor} GPU {device} at {folder.name}".strip()
