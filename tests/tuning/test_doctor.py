"""Each check of the doctor fires on a machine or configuration with the pitfall, and on no other.

Machines are small trees of the files that Linux shows below /proc, /sys and /dev.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_crab import LlamaParams, SamplerChain, _core
from llama_crab.errors import ModelNotFoundError
from llama_crab.tuning import examine, hardware
from llama_crab.tuning.doctor import diagnose
from llama_crab.tuning.finding import Finding
from llama_crab.tuning.subject import Build, Machine, ModelFacts, Subject, cpu_features

GIB = 2**30
PCI = "sys/bus/pci/devices"
POLICY = "sys/devices/system/cpu/cpufreq/policy0"
AVX2_FLAGS = "fpu sse sse2 pni ssse3 avx avx2 fma f16c bmi2"
AVX2 = frozenset({"SSE3", "SSSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2", "LLAMAFILE", "REPACK"})
Files = dict[str, Any]


def cpuinfo(flags: str = AVX2_FLAGS, n_cpus: int = 8, key: str = "flags") -> str:
    return "\n\n".join(f"processor\t: {i}\ncore id\t: {i}\n{key}\t: {flags}" for i in range(n_cpus))


def sound() -> Files:
    """Return a desktop of 8 cores with 32 GiB and nothing wrong."""
    return {
        "proc/cpuinfo": cpuinfo(),
        "proc/meminfo": f"MemTotal: {32 << 20} kB\nMemAvailable: {24 << 20} kB\n"
        "SwapTotal: 1000000 kB\nSwapFree: 900000 kB",
        "proc/pressure/memory": "some avg10=0.00 avg60=0.50 avg300=0.00 total=1",
        "proc/mounts": "/dev/sda / ext4 rw 0 0",
        "sys/class/dmi/id/chassis_type": 3,
        f"{POLICY}/scaling_driver": "intel_pstate",
        f"{POLICY}/scaling_governor": "powersave",
        f"{POLICY}/energy_performance_preference": "balance_performance",
        f"{POLICY}/scaling_max_freq": 4_600_000,
        f"{POLICY}/cpuinfo_max_freq": 5_000_000,
    }


def pci(address: str, vendor: str, kind: str = "0x030000", **more: Any) -> Files:
    folder = f"{PCI}/{address}"
    files = {f"{folder}/vendor": vendor, f"{folder}/class": kind, f"{folder}/device": "0x2330"}
    return files | {f"{folder}/{name}": value for name, value in more.items()}


NVIDIA = pci("0000:01:00.0", "0x10de", "0x030200")
AMD = pci("0000:03:00.0", "0x1002", mem_info_vram_total=16 * GIB) | {
    f"{PCI}/0000:03:00.0/drm/renderD128/dev": "226:128"
}
ARC = pci("0000:03:00.0", "0x8086") | {f"{PCI}/0000:03:00.0/drm/renderD129/dev": "226:129"}


def model(**changes: Any) -> ModelFacts:
    facts = ModelFacts(
        path=Path("/models/chat.gguf"),
        size=4 * GIB,
        kv_bytes=GIB // 2,
        ftype="Q4_K - Medium",
        n_layer=32,
        n_ctx_train=8192,
        has_chat_template=True,
    )
    return replace(facts, **changes)


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Return a function that examines a machine and returns the findings by name."""

    def run(
        files: Files | None = None,
        *,
        build: Build | None = None,
        facts: ModelFacts | None = None,
        **given: Any,
    ) -> dict[str, Finding]:
        for name, text in (sound() | (files or {})).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        params = LlamaParams(**given)
        machine = Machine.read(tmp_path)
        resolved = params.resolve(
            n_ctx_train=facts.n_ctx_train if facts else 0, n_threads=machine.threads.n_threads
        )
        subject = Subject(machine, build or Build("cpu", AVX2), params, resolved, facts)
        return {finding.name: finding for finding in diagnose(subject).findings}

    return run


def severities(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.severity for name, finding in found.items() if finding.severity != "ok"}


CUDA = Build("cuda", AVX2, ("CUDA0 (NVIDIA H100)",), 80 * GIB)


def test_a_sound_machine_and_configuration_pass_every_check(check: Any) -> None:
    found = check(facts=model(), n_threads=8, sampler=SamplerChain.chat())
    assert severities(found) == {}
    assert set(found) >= {"gpu-backend", "instruction-set", "threads", "kernels", "storage"}
    assert all(finding.evidence and not finding.fix for finding in found.values())


@pytest.mark.parametrize(
    ("files", "backend"),
    [
        (NVIDIA | {"dev/nvidia0": ""}, "cuda"),
        ({"dev/nvidia3": ""}, "cuda"),  # a container without the bus
        ({"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}, "cuda"),
        (AMD | {"dev/dri/renderD128": ""}, "rocm"),
        (ARC | {"dev/dri/renderD129": ""}, "vulkan"),
    ],
)
def test_a_gpu_that_a_cpu_build_leaves_idle(check: Any, files: Files, backend: str) -> None:
    finding = check(files)["gpu-backend"]
    assert finding.severity == "problem"
    assert f"backend={backend}" in finding.fix


def test_a_gpu_without_its_device_node_is_no_problem_of_the_build(check: Any) -> None:
    files = NVIDIA | {
        "dev/nvidiactl": "",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA H100 80GB HBM3",
    }
    finding = check(files)["gpu-backend"]
    assert finding.severity == "advice"
    assert "NVIDIA H100 80GB HBM3" in finding.evidence


@pytest.mark.parametrize(
    "files",
    [
        pci("0000:00:02.0", "0x8086") | {"dev/dri/renderD128": ""},  # integrated Intel
        pci("0000:04:00.0", "0x1002", mem_info_vram_total=GIB // 2),  # integrated AMD
        pci("0000:02:00.0", "0x1a03"),  # a server's console
        pci("0000:01:00.1", "0x10de", "0x040300"),  # a graphics card's sound
        {"dev/nvidiactl": "", "dev/nvidia-uvm": ""},
    ],
)
def test_what_is_no_gpu_to_compute_on(check: Any, files: Files) -> None:
    assert check(files)["gpu-backend"].severity == "ok"


def test_a_gpu_build_with_its_gpu_passes_and_without_one_does_not(check: Any) -> None:
    assert check(NVIDIA, build=CUDA)["gpu-backend"].severity == "ok"
    assert check(build=Build("cuda", AVX2))["gpu-backend"].severity == "problem"


def test_apple_silicon_without_metal(check: Any) -> None:
    mac = Subject(
        replace(Machine.read("/"), system="darwin", is_arm=True, gpus=()), Build("cpu", frozenset())
    )
    found = {finding.name: finding for finding in diagnose(mac).findings}
    assert found["gpu-backend"].severity == "problem"
    assert "storage" not in found


def test_layers_on_the_cpu_beside_a_gpu(check: Any) -> None:
    assert check(build=CUDA, n_gpu_layers=0)["offload"].severity == "problem"
    assert check(build=CUDA, facts=model(), n_gpu_layers=20)["offload"].severity == "advice"
    for layers in (None, -1, 33, 99):
        assert check(build=CUDA, facts=model(), n_gpu_layers=layers)["offload"].severity == "ok"
    # What does not fit has to stay.
    found = check(build=CUDA, facts=model(size=90 * GIB), n_gpu_layers=20)
    assert found["offload"].severity == "ok"


def test_layers_for_a_gpu_that_is_not_there(check: Any) -> None:
    assert check(n_gpu_layers=20)["offload"].severity == "problem"
    assert "offload" not in check(n_gpu_layers=0)


@pytest.mark.parametrize("field", ["n_threads", "n_threads_batch"])
def test_more_threads_than_cores(check: Any, field: str) -> None:
    assert check(**{field: 8})["threads"].severity == "ok"
    finding = check(**{field: 9})["threads"]
    assert finding.severity == "problem"
    assert f"{field}=9" in finding.evidence


def test_more_threads_than_the_quota(check: Any) -> None:
    quota = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}
    assert check(quota, n_threads=3)["threads"].severity == "ok"
    assert check(quota, n_threads=4)["threads"].severity == "problem"


def test_threads_on_efficiency_cores_are_advice(check: Any) -> None:
    hybrid = {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"}
    assert check(hybrid, n_threads=4)["threads"].severity == "ok"
    assert check(hybrid, n_threads=6)["threads"].severity == "advice"
    assert check(hybrid, n_threads=9)["threads"].severity == "problem"


@pytest.mark.parametrize(
    ("flags", "features", "severity"),
    [
        (AVX2_FLAGS, AVX2, "ok"),
        (AVX2_FLAGS, frozenset({"SSE3", "SSSE3"}), "problem"),
        ("fpu sse sse2 pni ssse3", AVX2, "problem"),  # would crash
        (AVX2_FLAGS + " avx512f avx512_vnni", AVX2, "advice"),
        (AVX2_FLAGS + " avx512f avx512_vnni avx_vnni", AVX2 | {"AVX512", "AVX512_VNNI"}, "ok"),
        (AVX2_FLAGS + " avx512f avx512_bf16", AVX2 | {"AVX512"}, "ok"),  # no BF16 model
        (AVX2_FLAGS + " amx_int8", AVX2, "advice"),
        ("fp asimd asimddp i8mm", frozenset({"NEON", "DOTPROD", "MATMUL_INT8"}), "ok"),
        ("fp asimd asimddp i8mm", frozenset({"NEON", "DOTPROD"}), "advice"),
        ("fp asimd asimddp", frozenset({"NEON"}), "problem"),
        ("fp asimd", frozenset({"NEON", "DOTPROD"}), "problem"),  # would crash
    ],
)
def test_instruction_sets(check: Any, flags: str, features: frozenset[str], severity: str) -> None:
    key = "Features" if "asimd" in flags else "flags"
    files = {"proc/cpuinfo": cpuinfo(flags, key=key)}
    assert check(files, build=Build("cpu", features))["instruction-set"].severity == severity


def test_an_unknown_cpu_gets_no_word_about_instructions(check: Any) -> None:
    assert "instruction-set" not in check({"proc/cpuinfo": "processor: 0"})


def test_features_are_those_of_the_cpu_backend_that_are_on() -> None:
    text = "CUDA : ARCHS = 900 | USE_GRAPHS = 1 | CPU : SSE3 = 1 | AVX = 0 | SVE_CNT = 32 | "
    assert cpu_features(text) == {"SSE3", "SVE_CNT"}
    assert cpu_features("CPU : NEON = 1 | RPC : X = 1 | ") == {"NEON"}
    assert "" not in cpu_features(_core.system_info())
    assert cpu_features(_core.system_info())


@pytest.mark.parametrize(
    ("policy", "severity"),
    [
        ({"scaling_driver": "acpi-cpufreq"}, "problem"),
        ({"scaling_driver": "amd-pstate-epp"}, "ok"),
        ({"energy_performance_preference": "power"}, "advice"),
        ({"scaling_max_freq": 2_000_000}, "advice"),
        ({"scaling_driver": "acpi-cpufreq", "scaling_governor": "schedutil"}, "ok"),
    ],
)
def test_clock(check: Any, policy: Files, severity: str) -> None:
    files = {f"{POLICY}/{name}": value for name, value in policy.items()}
    assert check(files)["cpu-frequency"].severity == severity


def test_a_laptop_on_battery(check: Any) -> None:
    supply = "sys/class/power_supply"
    laptop = {
        "sys/class/dmi/id/chassis_type": 10,
        f"{supply}/BAT0/type": "Battery",
        f"{supply}/BAT0/status": "Discharging",
        f"{supply}/AC/type": "Mains",
        f"{supply}/AC/online": 0,
    }
    finding = check(laptop)["battery"]
    assert finding.severity == "advice"
    assert "n_threads=4" in finding.fix
    assert check(laptop, n_threads=4)["battery"].severity == "ok"
    assert "battery" not in check(laptop | {f"{supply}/AC/online": 1})
    assert "battery" not in check(laptop | {"sys/class/dmi/id/chassis_type": 3})  # a UPS
    assert "battery" not in check(laptop | {f"{supply}/BAT0/scope": "Device"})  # a mouse


def test_memory_pressure(check: Any) -> None:
    stalled = {"proc/pressure/memory": "some avg10=9.0 avg60=25.00 avg300=1.0 total=1"}
    assert check(stalled)["memory-pressure"].severity == "problem"
    limit = {
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/box/memory.max": 8 * GIB,
        "sys/fs/cgroup/box/memory.current": 15 * GIB // 2,
        "sys/fs/cgroup/box/memory.stat": "inactive_file 0",
    }
    finding = check(limit)["memory-pressure"]
    assert finding.severity == "advice"
    assert "control group" in finding.fix
    # The page cache can be dropped.
    limit["sys/fs/cgroup/box/memory.stat"] = f"inactive_file {4 * GIB}"
    assert check(limit)["memory-pressure"].severity == "ok"


def test_a_model_larger_than_the_free_memory(check: Any) -> None:
    assert check(facts=model(size=25 * GIB))["memory"].severity == "problem"
    finding = check(facts=model(size=20 * GIB, kv_bytes=8 * GIB))["memory"]
    assert finding.severity == "problem"
    assert "n_ctx" in finding.fix
    assert check(facts=model(size=20 * GIB))["memory"].severity == "ok"
    assert "memory" not in check(build=CUDA, facts=model(size=40 * GIB))


@pytest.mark.parametrize(
    ("mounts", "severity"),
    [
        ("server:/x /models nfs4 rw 0 0", "advice"),
        ("server:/x /models/other nfs4 rw 0 0", "ok"),
        ("server:/x /mod nfs4 rw 0 0", "ok"),
        ("server:/x /models nfs4 rw 0 0\n/dev/sdb /models xfs rw 0 0", "ok"),  # mounted over
    ],
)
def test_a_file_on_the_network(check: Any, mounts: str, severity: str) -> None:
    files = {"proc/mounts": f"/dev/sda / ext4 rw 0 0\n{mounts}"}
    assert check(files, facts=model())["storage"].severity == severity


def test_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(Machine.read("/"), Build("cpu", AVX2), model=model(embeds=True))
    for rate, severity in ((90e6, "advice"), (3e9, "ok")):
        monkeypatch.setattr(hardware, "disk_rate", lambda path, rate=rate: rate)
        found = {item.name: item for item in diagnose(subject, quick=False).findings}
        assert found["storage"].severity == severity


def test_the_disk_is_read_past_the_page_cache(smol_path: Path, tmp_path: Path) -> None:
    rate = hardware.disk_rate(smol_path)
    assert rate is None or rate > 0
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    assert hardware.disk_rate(small) is None
    assert hardware.disk_rate(tmp_path / "none") is None


def test_loading_without_mmap(check: Any) -> None:
    assert check(facts=model(), load_mode="none")["storage"].severity == "advice"
    assert check(facts=model(), load_mode="mmap")["storage"].severity == "ok"


@pytest.mark.parametrize(
    ("ftype", "features", "severity"),
    [
        ("Q4_1", AVX2, "advice"),
        ("(guessed) Q5_1", AVX2, "advice"),
        ("TQ1_0 - 1.69 bpw ternary", AVX2, "advice"),
        ("Q4_1", AVX2 | {"AMX_INT8"}, "ok"),
        ("Q5_0", AVX2, "ok"),
        ("IQ2_XXS - 2.0625 bpw", AVX2, "ok"),
        ("MXFP4 MoE", AVX2, "ok"),
        ("Q4_1", frozenset({"NEON", "DOTPROD"}), "advice"),
        ("Q4_1", frozenset({"NEON", "DOTPROD", "MATMUL_INT8"}), "ok"),
        ("Q3_K - Small", frozenset({"NEON", "DOTPROD", "MATMUL_INT8"}), "advice"),
        ("unknown, may not work", AVX2, None),
        ("Q4_1", frozenset({"SSE3"}), None),
    ],
)
def test_quantisations_without_batched_kernels(
    check: Any, ftype: str, features: frozenset[str], severity: str | None
) -> None:
    found = check(build=Build("cpu", features), facts=model(ftype=ftype)).get("kernels")
    assert (found and found.severity) == severity


def test_kernels_do_not_matter_on_a_gpu_or_with_blas(check: Any) -> None:
    q4_1 = model(ftype="Q4_1")
    assert "kernels" not in check(build=CUDA, facts=q4_1)
    assert "kernels" not in check(build=Build("cpu", AVX2, has_blas=True), facts=q4_1)
    assert check(build=CUDA, facts=q4_1, n_gpu_layers=0)["kernels"].severity == "advice"


def test_repacking_turned_off(check: Any) -> None:
    assert check(facts=model(), use_extra_bufts=False)["kernels"].severity == "advice"
    q6 = model(ftype="Q6_K")
    assert check(facts=q6, use_extra_bufts=False)["kernels"].severity == "ok"


def test_a_context_longer_than_trained(check: Any) -> None:
    assert check(facts=model(), n_ctx=8193)["context-length"].severity == "problem"
    for given in (
        {"n_ctx": 8192},
        {"n_ctx": 0},
        {"n_ctx": 32768, "n_seq_max": 4},
        {"n_ctx": 32768, "rope_scaling_type": "yarn"},
        {"n_ctx": 32768, "rope_freq_base": 1e6},
    ):
        assert check(facts=model(), **given)["context-length"].severity == "ok", given
    assert "context-length" not in check(facts=model(embeds=True), n_ctx=99999)


def test_small_batches_caches_and_greedy_chains(check: Any) -> None:
    assert check(n_ubatch=8)["micro-batch"].severity == "advice"
    assert check(n_ubatch=128)["micro-batch"].severity == "ok"
    assert check(facts=model(ftype="Q4_1"), n_ubatch=8)["micro-batch"].severity == "ok"
    off = {"type_k": "q8_0", "flash_attn_type": "disabled"}
    assert check(**off)["cache-size"].severity == "advice"
    assert check(type_k="q8_0", type_v="q8_0")["cache-size"].severity == "ok"
    greedy = SamplerChain().top_k(40).temp(0.0)
    assert check(facts=model(), sampler=greedy)["sampler"].severity == "advice"
    base = model(has_chat_template=False)
    assert check(facts=base, sampler=greedy)["sampler"].severity == "ok"
    structured = SamplerChain().grammar('root ::= "a"').greedy()
    assert check(facts=model(), sampler=structured)["sampler"].severity == "ok"


def test_this_machine_can_be_examined_without_a_model() -> None:
    diagnosis = examine(quick=True)
    names = [finding.name for finding in diagnosis.findings]
    assert {"gpu-backend", "threads"} <= set(names)
    assert not {"memory", "storage", "sampler"} & set(names)
    ranks = [("problem", "advice", "ok").index(item.severity) for item in diagnosis.findings]
    assert ranks == sorted(ranks)
    assert sum(diagnosis.to_dict()["counts"].values()) == len(names)


def test_a_model_is_looked_at(tiny_path: Path, smol_path: Path, minilm_path: Path) -> None:
    found = {item.name: item for item in examine(smol_path, quick=True).findings}
    assert "4096 of 8192" in found["context-length"].evidence
    assert f"weights {os.path.getsize(smol_path) / 2**20:.0f} MiB" in found["memory"].evidence
    params = LlamaParams(n_ctx=2048)
    found = {item.name: item for item in examine(tiny_path, params, quick=True).findings}
    assert found["context-length"].severity == "problem"
    names = {item.name for item in examine(minilm_path).findings}  # it embeds: nothing to measure
    assert "memory" in names
    assert not {"context-length", "flash-attention"} & names


def test_a_missing_model_is_an_error_and_not_a_finding(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        examine(tmp_path / "none.gguf")
