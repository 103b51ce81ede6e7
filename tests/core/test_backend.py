"""Facts about the build and the machine; the log sink."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llama_crab import _core


def test_there_is_a_cpu_device_with_this_machines_memory() -> None:
    devices = _core.devices()
    cpu = [device for device in devices if device.type == "cpu"]
    assert len(cpu) == 1
    if hasattr(os, "sysconf"):
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert cpu[0].memory_total == pytest.approx(installed, rel=0.02)
    assert 0 < cpu[0].memory_free <= cpu[0].memory_total
    assert cpu[0].name in repr(cpu[0])
    assert len({device.name for device in devices}) == len(devices)


def test_gpu_offload_is_supported_exactly_when_a_gpu_is_listed() -> None:
    has_gpu = any(device.type in ("gpu", "igpu") for device in _core.devices())
    assert _core.supports_gpu_offload() == has_gpu


def test_system_info_names_the_cpu_backend() -> None:
    assert "CPU" in _core.system_info()


def test_versions_are_those_of_the_tree(llama_cpp_tree: Path) -> None:
    text = (llama_cpp_tree / "ggml" / "CMakeLists.txt").read_text(encoding="utf-8")
    parts = [
        next(line for line in text.splitlines() if line.startswith(f"set(GGML_VERSION_{part} "))
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    expected = ".".join(part.rstrip(")").split()[1] for part in parts)
    assert _core.ggml_version().startswith(expected)
    assert _core.llama_version()


def test_limits_are_positive() -> None:
    assert _core.max_devices() >= 1
    assert _core.max_parallel_sequences() >= 1
    assert _core.supports_mmap() in (True, False)
    assert _core.supports_mlock() in (True, False)
    assert _core.supports_rpc() in (True, False)


def test_time_us_runs_with_the_clock() -> None:
    before, start = _core.time_us(), time.monotonic()
    time.sleep(0.05)
    gone = _core.time_us() - before
    assert gone == pytest.approx((time.monotonic() - start) * 1e6, rel=0.5)


def test_log_is_silent_below_the_level_and_kept_from_it_on(tiny_path: Path) -> None:
    _core.set_log_level(3)
    _core.drain_log()
    _core.Model(tiny_path).close()
    quiet = _core.drain_log()
    assert all(level >= 3 for level, _ in quiet)
    try:
        _core.set_log_level(1)
        _core.Model(tiny_path).close()
        assert _core.log_pending()
        loud = _core.drain_log()
    finally:
        _core.set_log_level(3)
    assert any(level < 3 and "llama_model_loader" in text for level, text in loud)
    assert not _core.log_pending()
    assert _core.drain_log() == []
