"""The default number of threads and the memory in sight, on simulated machines and on this one.

Each machine is a small tree of the files that Linux shows below /sys and /proc.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest

from llama_crab.tuning import (
    available_memory,
    default_n_threads,
    physical_cores,
    thread_choice,
    total_memory,
)
from llama_crab.tuning.probe import (
    choose_windows_cores,
    cpu_quota,
    parse_processor_cores,
    parse_vm_stat,
)

CPU = "sys/devices/system/cpu"
CGROUP = "sys/fs/cgroup"
GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    def build(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return build


def cpus(cores, *, first=0, speed=None, package=0):
    """Return the files of ``cores``: one list of CPU numbers each."""
    files = {}
    for index, siblings in enumerate(cores):
        for cpu in siblings:
            topology = f"{CPU}/cpu{cpu}/topology"
            files[f"{topology}/core_id"] = first + index
            files[f"{topology}/physical_package_id"] = package
            files[f"{topology}/thread_siblings_list"] = ",".join(map(str, siblings))
            if speed is not None:
                files[f"{CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq"] = speed
    return files


def smt_8_cores():
    return {f"{CPU}/online": "0-15"} | cpus([(core, core + 8) for core in range(8)])


def hybrid_8p_8e():
    fast = cpus([(2 * core, 2 * core + 1) for core in range(8)], speed=5_500_000)
    slow = cpus([(16 + core,) for core in range(8)], first=8, speed=4_300_000)
    return {f"{CPU}/online": "0-23"} | fast | slow


def test_smt_counts_cores_not_threads(machine):
    root = machine(smt_8_cores())
    assert physical_cores(root=root) == 8
    assert default_n_threads(root=root) == 8


def test_core_and_package_ids_alone_tell_cores_apart(machine):
    # Two packages, core_id 0 and 1 in each, two threads per core, no sibling lists.
    files = {f"{CPU}/online": "0-7"}
    for cpu in range(8):
        files[f"{CPU}/cpu{cpu}/topology/core_id"] = cpu // 2 % 2
        files[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = cpu // 4
    assert physical_cores(root=machine(files)) == 4


def test_clusters_that_repeat_core_ids_stay_apart(machine):
    files = {f"{CPU}/online": "0-3"} | cpus([(0,), (1,)]) | cpus([(2,), (3,)])
    assert default_n_threads(root=machine(files)) == 4


def test_hybrid_uses_performance_cores(machine):
    root = machine(hybrid_8p_8e())
    assert physical_cores(root=root) == 16
    choice = thread_choice(root=root)
    assert choice.n_threads == 8
    assert choice.why == "8 performance cores usable (of 16 cores)"


def test_hybrid_is_told_by_the_kernels_own_lists_where_there_are_any(machine):
    # Equal top frequencies, as some virtual machines show, and lists that say otherwise.
    files = hybrid_8p_8e() | cpus([(16 + core,) for core in range(8)], first=8, speed=5_500_000)
    files["sys/devices/cpu_core/cpus"] = "0-15"
    files["sys/devices/cpu_atom/cpus"] = "16-23"
    assert default_n_threads(root=machine(files)) == 8


def test_big_little_by_capacity(machine):
    files = {f"{CPU}/online": "0-7"} | cpus([(cpu,) for cpu in range(8)])
    for cpu in range(8):
        files[f"{CPU}/cpu{cpu}/cpu_capacity"] = (286, 286, 286, 286, 871, 871, 871, 1024)[cpu]
    assert default_n_threads(root=machine(files)) == 4


def test_preferred_cores_of_one_kind_all_count(machine):
    files = {f"{CPU}/online": "0-3"} | cpus([(0,), (1,)], speed=5_700_000)
    files |= cpus([(2,), (3,)], first=2, speed=4_950_000)
    assert default_n_threads(root=machine(files)) == 4


def test_affinity_limits_the_choice(machine):
    root = machine(smt_8_cores())
    assert default_n_threads(root=root, affinity={3}) == 1
    assert default_n_threads(root=root, affinity={3, 11}) == 1  # two threads of one core
    assert default_n_threads(root=root, affinity={0, 1, 8}) == 2


def test_affinity_of_efficiency_cores_alone_uses_them(machine):
    assert default_n_threads(root=machine(hybrid_8p_8e()), affinity={16, 17, 18}) == 3


def test_offline_cpus_do_not_count(machine):
    root = machine(smt_8_cores() | {f"{CPU}/online": "0-3,8-11"})
    assert physical_cores(root=root) == 4
    assert default_n_threads(root=root) == 4


def test_cgroup_v2_quota_is_rounded_up(machine):
    files = {"proc/self/cgroup": "0::/", f"{CGROUP}/cpu.max": "250000 100000"}
    choice = thread_choice(root=machine(smt_8_cores() | files))
    assert choice.n_threads == 3
    assert choice.why == "8 physical cores usable, cut to the CPU quota of 2.5"


def test_the_tightest_ancestor_binds(machine):
    files = {
        "proc/self/cgroup": "0::/work/job",
        f"{CGROUP}/work/job/cpu.max": "max 100000",
        f"{CGROUP}/work/cpu.max": "400000 100000",
    }
    assert default_n_threads(root=machine(smt_8_cores() | files)) == 4


def test_a_small_quota_still_gives_one_thread(machine):
    files = {"proc/self/cgroup": "0::/", f"{CGROUP}/cpu.max": "5000 100000"}
    assert default_n_threads(root=machine(smt_8_cores() | files)) == 1


def test_a_quota_above_the_cores_changes_nothing(machine):
    files = {"proc/self/cgroup": "0::/", f"{CGROUP}/cpu.max": "1200000 100000"}
    choice = thread_choice(root=machine(smt_8_cores() | files))
    assert (choice.n_threads, choice.why) == (8, "8 physical cores usable")


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_cgroup_v1_quota_in_a_container_that_names_the_hosts_path(machine, mount):
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/0123abc\n4:memory:/docker/0123abc",
        f"{CGROUP}/{mount}/cpu.cfs_quota_us": 150_000,
        f"{CGROUP}/{mount}/cpu.cfs_period_us": 100_000,
    }
    assert default_n_threads(root=machine(smt_8_cores() | files)) == 2


def test_cgroup_v1_without_a_quota(machine):
    files = {
        "proc/self/cgroup": "5:cpu:/",
        f"{CGROUP}/cpu/cpu.cfs_quota_us": -1,
        f"{CGROUP}/cpu/cpu.cfs_period_us": 100_000,
    }
    assert cpu_quota(root=machine(files)) is None


def test_without_sys_the_cores_of_cpuinfo_count(machine):
    blocks = (f"processor\t: {cpu}\nphysical id\t: 0\ncore id\t\t: {cpu % 4}\n" for cpu in range(8))
    root = machine({"proc/cpuinfo": "\n".join(blocks)})
    assert physical_cores(root=root) == 4
    assert default_n_threads(root=root) == 4


def test_with_nothing_to_read_the_affinity_counts(machine):
    root = machine({})
    assert default_n_threads(root=root, affinity={0, 1, 2}) == 3
    assert default_n_threads(root=root) == 1
    assert physical_cores(root=root) == 1


def test_memory_without_a_limit(machine):
    root = machine({"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB"})
    assert total_memory(root=root) == 8 * GIB
    assert available_memory(root=root) == 4 * GIB


def test_memory_limit_of_cgroup_v2_and_cache_that_can_be_dropped(machine):
    files = {
        "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB",
        "proc/self/cgroup": "0::/job",
        f"{CGROUP}/job/memory.max": 2 * GIB,
        f"{CGROUP}/job/memory.current": 3 * GIB // 2,
        f"{CGROUP}/job/memory.stat": f"anon {GIB}\ninactive_file {GIB // 2}",
        f"{CGROUP}/memory.max": "max",
    }
    root = machine(files)
    assert total_memory(root=root) == 2 * GIB
    assert available_memory(root=root) == GIB


def test_memory_limit_of_cgroup_v1(machine):
    files = {
        "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB",
        "proc/self/cgroup": "4:memory:/job",
        f"{CGROUP}/memory/job/memory.limit_in_bytes": 3 * GIB,
        f"{CGROUP}/memory/job/memory.usage_in_bytes": GIB,
        f"{CGROUP}/memory/memory.limit_in_bytes": 9223372036854771712,
    }
    root = machine(files)
    assert total_memory(root=root) == 3 * GIB
    assert available_memory(root=root) == 2 * GIB


def test_vm_stat_counts_what_can_be_had_at_once():
    shown = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               1000.\n"
        "Pages active:                             5000.\n"
        "Pages inactive:                           2000.\n"
        "Pages speculative:                         300.\n"
        "Pages wired down:                         4000.\n"
        "Pages purgeable:                            40.\n"
    )
    assert parse_vm_stat(shown) == 3340 * 16384


def windows_core(efficiency, mask, group=0):
    # PROCESSOR_RELATIONSHIP: flags, class, 20 reserved bytes, group count, then GROUP_AFFINITY.
    return struct.pack("<IIBB20xHQH6x", 0, 48, 1, efficiency, 1, mask, group)


def test_windows_prefers_the_highest_efficiency_class():
    data = b"".join(windows_core(1, 0b11 << 2 * core) for core in range(2))
    data += b"".join(windows_core(0, 1 << 4 + core) for core in range(4))
    cores = parse_processor_cores(data)
    assert cores[0] == (1, [(0, 0b11)])
    assert choose_windows_cores(cores, 0) == (6, 2)
    assert choose_windows_cores(cores, 0b110000) == (2, 2)


def test_this_machine_makes_sense():
    choice = thread_choice()
    assert 1 <= choice.n_threads <= physical_cores() <= (os.cpu_count() or 1)
    assert 0 < available_memory() <= total_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="affinity can be set on Linux only")
def test_the_affinity_of_this_process_is_respected():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from llama_crab.tuning import default_n_threads; print(default_n_threads())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.split() == [b"1"]
