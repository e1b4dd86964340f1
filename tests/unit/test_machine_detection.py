"""Machine detection against made-up /proc and /sys trees, and once against the machine the tests run on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fiddler_runtime import machine
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import (
    KNOWN_ISAS,
    available_bytes,
    core_cpus,
    cpu_flags,
    cpu_isas,
    cpu_lane_threads,
    cpu_name,
    find_accelerator,
    lane_cpus,
    memory_bytes,
    missing_flags,
    refused,
    this_machine,
    usable_cores,
)

BASE = "fpu sse sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2"
SKYLAKE = f"{BASE} avx512f avx512dq avx512cd avx512bw avx512vl"
SAPPHIRE = f"{SKYLAKE} avx512_bf16 amx_bf16 amx_tile"


def tree(
    root: Path,
    flags: str | list[str],
    *,
    name: str = "Intel(R) Xeon(R) Gold 6126 CPU @ 2.60GHz",
    siblings: list[str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A /proc and /sys with one processor per entry of `siblings` (its core's CPU list) or of `flags`."""
    siblings = siblings or ["0"]
    each = [flags] * len(siblings) if isinstance(flags, str) else flags
    write(root, "proc/cpuinfo", "\n".join(
        f"processor\t: {cpu}\nmodel name\t: {name}\ncpu family\t: 6\nmodel\t\t: 85\nflags\t\t: {text}\n"
        for cpu, text in enumerate(each)
    ))  # fmt: skip
    write(root, "proc/meminfo", "MemTotal:       65536000 kB\nMemFree:        1 kB\n")
    for cpu, text in enumerate(siblings):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        write(root, f"{folder}/topology/core_cpus_list", text + "\n")
        for index, (level, kind, size) in enumerate(
            [("1", "Data", "32K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "19712K")]
        ):
            cache = f"{folder}/cache/index{index}"
            write(root, f"{cache}/level", level + "\n")
            write(root, f"{cache}/type", kind + "\n")
            write(root, f"{cache}/size", size + "\n")
            write(root, f"{cache}/shared_cpu_list", ("0-63" if level == "3" else text) + "\n")
    for path, text in (files or {}).items():
        write(root, path, text)
    return root


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("flags", "isas"),
    [
        (SAPPHIRE, KNOWN_ISAS),
        (SKYLAKE, ("avx512f", "avx2", "scalar")),
        (BASE, ("avx2", "scalar")),
        (BASE.replace("fma", ""), ("scalar",)),
        # Knights Landing: the foundation alone, without the byte and word instructions.
        (f"{BASE} avx512f avx512cd avx512er avx512pf", ("avx2", "scalar")),
        # A hypervisor that hides the foundation but leaves a flag behind.
        (f"{BASE} avx512_bf16", ("avx2", "scalar")),
        ("fpu sse2", ("scalar",)),
    ],
)
def test_isas_follow_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, isas: tuple[str, ...]
) -> None:
    monkeypatch.setattr(machine, "_hands_out_tiles", lambda: True)
    assert cpu_isas(tree(tmp_path, flags)) == isas


def test_missing_flags_are_named(tmp_path: Path) -> None:
    assert missing_flags("avx512_bf16", tree(tmp_path, SKYLAKE)) == ("avx512_bf16",)


def test_a_refusal_names_flags_or_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, SAPPHIRE)
    monkeypatch.setattr(machine, "_hands_out_tiles", lambda: False)
    assert "hands out no AMX registers" in refused("amx_bf16", root)
    assert refused("avx512_bf16", root) == ""
    monkeypatch.setattr(machine, "_hands_out_tiles", lambda: True)
    assert refused("amx_bf16", root) == ""
    assert refused("amx_bf16", tree(tmp_path, SKYLAKE)) == "no avx512_bf16, amx_tile, amx_bf16"


def test_tiles_are_not_handed_out_by_a_cpu_without_them() -> None:
    if "amx_tile" not in cpu_flags():
        assert not machine._hands_out_tiles()


def test_flags_of_a_hybrid_cpu_are_those_of_every_core(tmp_path: Path) -> None:
    root = tree(tmp_path, [SAPPHIRE, BASE], siblings=["0", "1"])
    assert cpu_isas(root) == ("avx2", "scalar")


def test_arm_has_the_scalar_kernel_only(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    assert cpu_isas(tmp_path) == ("scalar",)
    assert cpu_name(tmp_path) == "ARM (implementer 0x41, part 0xd4f)"


def test_no_proc_at_all_is_a_small_unknown_machine(tmp_path: Path) -> None:
    machine = this_machine("none", root=tmp_path, affinity=[0, 1, 2])
    assert (machine.cpu, machine.cores, machine.isa) == ("unknown", 3, ("scalar",))
    assert (machine.l1d_bytes, machine.l2_bytes, machine.l3_bytes) == (0, 0, 0)
    assert (machine.numa_nodes, machine.memory_bytes) == (1, 0)
    assert cpu_flags(tmp_path) == frozenset()


def test_cores_count_one_of_each_smt_pair(tmp_path: Path) -> None:
    root = tree(tmp_path, BASE, siblings=["0,2", "1,3", "0,2", "1,3"])
    assert core_cpus(root, range(4)) == (0, 1)
    assert core_cpus(root, [2, 3]) == (2, 3)
    assert core_cpus(root, [1, 3]) == (1,)


def test_hybrid_cores_count_each(tmp_path: Path) -> None:
    root = tree(tmp_path, BASE, siblings=["0-1", "0-1", "2", "3"])
    assert usable_cores(root, range(4)) == 3


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # The limit of a parent applies to its children.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        ({"proc/self/cgroup": "garbage\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 4),
    ],
)
def test_a_container_limits_the_cores(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    root = tree(tmp_path, BASE, siblings=["0", "1", "2", "3"], files=files)
    assert usable_cores(root, range(4)) == cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 65536000 * 1024),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "1073741824\n"}, 1 << 30),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}, 65536000 * 1024),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
            },
            2 << 30,
        ),
    ],
)
def test_a_container_limits_the_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert memory_bytes(tree(tmp_path, BASE, files=files)) == expected


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "5000000\n",
                "sys/fs/cgroup/job/memory.current": "3000000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 300000\nactive_file 200000\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "3000000\n",
            },
            2_500_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "4000000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "4500000\n",
            },
            0,
        ),
    ],
    ids=["system", "cgroup of an ancestor", "cgroup v1 that is full"],
)
def test_what_is_free_counts_control_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_bytes(tree(tmp_path, BASE, files={**MEMINFO, **files})) == expected


def test_free_memory_here() -> None:
    assert 0 < available_bytes() < memory_bytes()


def test_the_record(tmp_path: Path) -> None:
    nodes = {f"sys/devices/system/node/node{n}/cpulist": "0\n" for n in range(2)} | {
        "sys/devices/system/node/online": "0-1"
    }
    machine = this_machine(
        "simulated", root=tree(tmp_path, SKYLAKE, siblings=["0,1", "0,1"], files=nodes), affinity=[0, 1]
    )
    assert machine.cpu == "Intel(R) Xeon(R) Gold 6126 CPU @ 2.60GHz"
    assert (machine.cores, machine.numa_nodes) == (1, 2)
    assert (machine.l1d_bytes, machine.l2_bytes, machine.l3_bytes) == (32 << 10, 1 << 20, 19712 << 10)
    assert machine.accelerator.kind == "simulated"
    assert machine.accelerator.memory_bytes == machine.memory_bytes // 4


def test_distinct_last_level_caches_add_up(tmp_path: Path) -> None:
    root = tree(tmp_path, BASE, siblings=["0", "1"])
    for cpu in range(2):
        write(root, f"sys/devices/system/cpu/cpu{cpu}/cache/index3/shared_cpu_list", f"{cpu}\n")
    assert this_machine("none", root=root, affinity=[0, 1]).l3_bytes == 2 * (19712 << 10)


def test_an_anonymous_name_gets_family_and_model(tmp_path: Path) -> None:
    assert cpu_name(tree(tmp_path, BASE, name="AMD EPYC")) == "AMD EPYC (family 6, model 85)"


def test_the_simulated_accelerator_takes_a_core() -> None:
    assert [cpu_lane_threads(n, "simulated") for n in (1, 2, 16)] == [1, 1, 15]
    assert [cpu_lane_threads(n, "cuda") for n in (1, 2)] == [1, 2]
    assert cpu_lane_threads(2, "none") == 2


def test_no_accelerator() -> None:
    assert find_accelerator("none", 1 << 30).memory_bytes == 0


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert find_accelerator("auto", 1 << 30).kind == "simulated"
    with pytest.raises(FiddlerError, match="no CUDA device") as caught:
        find_accelerator("cuda", 1 << 30)
    assert caught.value.hint is not None and "fiddlerc doctor" in caught.value.hint


def test_cuda_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "NVIDIA Test"
        total_memory = 24 << 30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: {1: Properties()}[index])
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n")
    found = find_accelerator("auto", 1 << 30, tmp_path)
    assert (found.kind, found.name, found.memory_bytes) == ("cuda", "NVIDIA Test", 24 << 30)
    assert found.driver.startswith("550.54.15, CUDA")


def test_this_machine() -> None:
    machine = this_machine("simulated")
    assert machine.cores >= 1 and machine.memory_bytes > 0
    assert "scalar" in machine.isa and set(machine.isa) <= set(KNOWN_ISAS)


def test_importing_the_module_does_not_import_torch() -> None:
    # find_accelerator("none") and the CPU's record must be had without torch as well.
    code = (
        "import sys; from fiddler_runtime.machine import this_machine; this_machine('none');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_cpu_lanes_threads_are_pinned_to_every_memory_node_alike(tmp_path: Path) -> None:
    for cpu, node in enumerate((0, 1, 0, 1, 0)):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/node{node}/cpulist", "")
    assert lane_cpus(4, tmp_path, range(5)) == ((0, (0, 2)), (1, (1, 3)))
    assert lane_cpus(2, tmp_path, range(5)) == ((0, (0,)), (1, (1,)))
    assert lane_cpus(3, tmp_path, range(5)) == ((0, (0,)), (1, (1, 3)))
    assert lane_cpus(5, tmp_path, range(5)) == ((1, (1, 3)), (0, (0, 2, 4))), "one more of the last"
    assert lane_cpus(4, tmp_path, (0, 1, 2, 4)) is None, "too few of one"
    assert lane_cpus(6, tmp_path, range(5)) is None, "more than there are"
    assert lane_cpus(1, tmp_path, range(5)) is None, "fewer than nodes"
    assert lane_cpus(2, tmp_path, (0, 2, 4)) is None, "one node"
