"""What a machine is, as far as a plan depends on it, and how to find out on Linux.

Every function that reads /proc or /sys takes `root`, so that a test can hand it a made-up tree. Nothing here runs at
import, and torch is imported only when an accelerator has to be looked for.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .errors import FiddlerError

AcceleratorKind = Literal["cuda", "simulated", "none"]

KNOWN_ISAS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "scalar")
"""Our kernels' instruction sets in the order in which they are preferred."""

# The /proc/cpuinfo flags that a kernel of each ISA needs. The kernel clears a flag there when the operating system does
# not save the registers that go with it, so a flag that is listed may be used. The library asks CPUID again itself.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "amx_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    "avx512f": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma"),
    "scalar": (),
}

# arch_prctl(ARCH_GET_XCOMP_SUPP), from Linux 5.16 on: the registers that are handed out on request. Tiles are bit 18.
_ARCH_PRCTL, _GET_SUPPORTED, _TILE_DATA = 158, 0x1021, 18

_MBIND = 237  # of x86-64; with a length of 0 it does nothing

_CGROUP = "sys/fs/cgroup"
# cgroup v1 writes "no limit" as the largest page-aligned number.
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Accelerator:
    """The device that runs strategies (a) and (b).

    `simulated` is a core of the CPU, in threads of its own: the same decisions and data movement without a GPU. Its
    memory_bytes is a quarter of the machine's, so that a plan made for it leaves most experts to the other strategies.
    """

    kind: AcceleratorKind
    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """The record that hw.json, plans and benchmarks carry. isa lists our kernel ISAs that run here, preferred first.

    cores         physical cores that this process may use (affinity and container limits applied)
    l1d_bytes, l2_bytes  of one core;  l3_bytes  of all last-level caches that the usable cores share, together
    memory_bytes  what this process may use: the machine's memory or its container's limit
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    numa_nodes: int
    memory_bytes: int
    accelerator: Accelerator


def this_machine(
    accelerator: AcceleratorKind | Literal["auto"] = "auto",
    *,
    root: Path = Path("/"),
    affinity: Iterable[int] | None = None,
) -> Machine:
    """The record of the machine this process runs on. See `find_accelerator` for `accelerator` and what it raises."""
    cpus = core_cpus(root, affinity)
    memory = memory_bytes(root)
    l1d, l2, l3 = _cache_bytes(root, cpus)
    return Machine(
        cpu=cpu_name(root),
        cores=usable_cores(root, affinity),
        isa=cpu_isas(root),
        l1d_bytes=l1d,
        l2_bytes=l2,
        l3_bytes=l3,
        numa_nodes=_numa_nodes(root),
        memory_bytes=memory,
        accelerator=find_accelerator(accelerator, memory, root),
    )


def find_accelerator(
    kind: AcceleratorKind | Literal["auto"], machine_memory_bytes: int, root: Path = Path("/")
) -> Accelerator:
    """The accelerator of that kind; "auto" is the first CUDA device, or the simulated one where there is none.

    Raises FiddlerError if a CUDA device is asked for and torch does not see one.
    """
    if kind == "none":
        return Accelerator("none", "none", 0, "")
    if kind == "cuda":
        require_cuda()
    if kind in ("auto", "cuda"):
        found = _cuda_device(root)
        if found is not None:
            return found
    return Accelerator("simulated", "one CPU core", machine_memory_bytes // 4, "")


def require_cuda() -> None:
    """Raises FiddlerError if torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise FiddlerError(
            "no CUDA device to use",
            found="torch.cuda.is_available() is False",
            expected="an NVIDIA GPU with its driver, and a torch built for CUDA",
            hint="fiddlerc doctor   (without a GPU: --device simulated, or for calibrate --accelerator simulated)",
        )


def cpu_lane_threads(cores: int, kind: AcceleratorKind) -> int:
    """Threads of the CPU lane. A simulated accelerator takes one core for itself, as far as there is a second one."""
    return max(1, cores - 1) if kind == "simulated" else max(1, cores)


def cpu_name(root: Path = Path("/")) -> str:
    """The CPU's name as the kernel gives it, with family and model where the name does not tell CPUs apart."""
    fields = _cpuinfo(root)
    name = " ".join(fields.get("model name", "").split())
    if name and not any(letter.isdigit() for letter in name) and "cpu family" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields.get('model', '?')})"
    if not name and "CPU implementer" in fields:
        return f"ARM (implementer {fields['CPU implementer']}, part {fields.get('CPU part', '?')})"
    return name or "unknown"


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction-set flags that every core has. Empty on CPUs that are not x86 or where /proc is not readable."""
    common: frozenset[str] | None = None
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            # A hybrid CPU may list different flags per core; a thread can move, so only the common ones count.
            common = frozenset(value.split()) if common is None else common & frozenset(value.split())
    return common or frozenset()


def missing_flags(isa: str, root: Path = Path("/")) -> tuple[str, ...]:
    """The CPU flags that `isa` (one of KNOWN_ISAS) needs and this machine does not have."""
    flags = cpu_flags(root)
    return tuple(flag for flag in ISA_FLAGS[isa] if flag not in flags)


def cpu_isas(root: Path = Path("/")) -> tuple[str, ...]:
    """Our kernel ISAs that can run on this machine, preferred first; "scalar" is always among them."""
    return tuple(isa for isa in KNOWN_ISAS if not refused(isa, root))


def refused(isa: str, root: Path = Path("/")) -> str:
    """Why `isa` cannot run here, as a message's `found`; empty where it can."""
    if missing := missing_flags(isa, root):
        return f"no {', '.join(missing)}"
    if isa == "amx_bf16" and not _hands_out_tiles():
        return "an operating system that hands out no AMX registers (Linux does from 5.16 on)"
    return ""


def _hands_out_tiles() -> bool:
    supported = ctypes.c_uint64()
    status = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _GET_SUPPORTED, ctypes.byref(supported))
    return status == 0 and bool(supported.value >> _TILE_DATA & 1)


def core_cpus(root: Path = Path("/"), affinity: Iterable[int] | None = None) -> tuple[int, ...]:
    """One logical CPU (the lowest numbered) of each physical core that this process may run on, in order.

    affinity: the logical CPUs allowed; None asks the operating system.
    """
    allowed = sorted(os.sched_getaffinity(0) if affinity is None else affinity)
    seen: set[str] = set()
    chosen: list[int] = []
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = (_read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")).strip()
        # Without a topology (some containers hide it) every logical CPU counts as a core of its own.
        if siblings and siblings in seen:
            continue
        seen.add(siblings)
        chosen.append(cpu)
    return tuple(chosen)


class NodeCpus(NamedTuple):
    """CPUs of one memory node, as the system numbers both."""

    node: int
    cpus: tuple[int, ...]


def threads_of_nodes(threads: int, nodes: int) -> list[int]:
    """How many threads the kernels have on each of so many memory nodes (fdl_open): alike, or one more on some."""
    return [threads * (node + 1) // nodes - threads * node // nodes for node in range(nodes)]


def cpus_by_node(root: Path = Path("/"), affinity: Iterable[int] | None = None) -> dict[int, list[int]]:
    """The CPUs of `core_cpus` by the memory node that they are on."""
    nodes: dict[int, list[int]] = {}
    for cpu in core_cpus(root, affinity):
        folder = next((root / f"sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*"), None)
        nodes.setdefault(0 if folder is None else int(folder.name.removeprefix("node")), []).append(cpu)
    return nodes


def lane_cpus(
    threads: int, root: Path = Path("/"), affinity: Iterable[int] | None = None
) -> tuple[NodeCpus, ...] | None:
    """Where to pin the CPU lane's threads: cores of every memory node, equally many of each or one more.

    None on a machine of one node, where the system may move threads as it likes, and if a node has too few cores.
    """
    nodes = cpus_by_node(root, affinity)
    count = len(nodes)
    if not 2 <= count <= threads:
        return None
    shares = threads_of_nodes(threads, count)
    fewest_cores_first = sorted(nodes.items(), key=lambda item: (min(len(item[1]), max(shares)), item[0]))
    by_place = sorted(zip(sorted(range(count), key=lambda i: shares[i]), fewest_cores_first, strict=True))
    if any(len(cpus) < shares[place] for place, (_, cpus) in by_place):
        return None
    return tuple(NodeCpus(node, tuple(cpus[: shares[place]])) for place, (node, cpus) in by_place)


def refuses_placement() -> str:
    """Why the system places no memory on a node (mbind); "" if it does."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    return "" if call(_MBIND, 0, 0, 0, 0, 0, 0) == 0 else os.strerror(ctypes.get_errno())


def usable_cores(root: Path = Path("/"), affinity: Iterable[int] | None = None) -> int:
    """Physical cores that this process can keep busy: its affinity, one per SMT pair, and a container's CPU quota.

    A quota of 2.5 CPUs counts as 2: a third spinning thread would be stopped half of the time, and all wait for it.
    """
    cores = max(1, len(core_cpus(root, affinity)))
    quota = _cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may use: MemTotal, or the smallest limit of its control groups. 0 if unknown."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(found.group(1)) * 1024] if found else []
    for folder in _cgroup_folders(root, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / file).strip()
            if text.isdigit() and 0 < int(text) < _UNLIMITED:
                limits.append(int(text))
    return min(limits, default=0)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be had: what the system reports as available, within every limit of the control groups.

    Page cache that a group would give up counts as available, as it does for the system. 0 if unknown.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(found.group(1)) * 1024] if found else []
    for folder in _cgroup_folders(root, "memory"):
        for limit, usage, of_all in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit() and int(most) < _UNLIMITED:
                cached = re.findall(rf"^{of_all}(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                limits.append(int(most) - int(used) + sum(map(int, cached)))
    return max(0, min(limits, default=0))


def _cuda_device(root: Path) -> Accelerator | None:
    try:
        import torch  # heavy
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read(root / "proc/driver/nvidia/version"))
    driver = f"{found.group(1)}, " if found else ""
    return Accelerator("cuda", str(properties.name), int(properties.total_memory), f"{driver}CUDA {torch.version.cuda}")


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _cache_bytes(root: Path, cpus: tuple[int, ...]) -> tuple[int, int, int]:
    """(L1 data and L2 of one core, all distinct L3 of `cpus` together); 0 where the kernel does not say."""
    l1d = l2 = 0
    l3: dict[str, int] = {}
    for cpu in cpus:
        for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            level, kind = _read(index / "level").strip(), _read(index / "type").strip()
            size = _size(_read(index / "size"))
            if level == "1" and kind == "Data":
                l1d = l1d or size
            elif level == "2":
                l2 = l2 or size
            elif level == "3":
                l3[_read(index / "shared_cpu_list").strip()] = size
    return l1d, l2, sum(l3.values())


def _size(text: str) -> int:
    """'32768K' and the like to bytes."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(found.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[found.group(2)] if found else 0


def _numa_nodes(root: Path) -> int:
    nodes = (root / "sys/devices/system/node").glob("node*")
    return max(1, sum(node.name[4:].isdigit() for node in nodes))


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota, in CPUs, of the control groups this process is in (version 2 or 1); None if unlimited."""
    quotas: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        fields = _read(folder / "cpu.max").split()
        if not fields:
            fields = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]) > 0:
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of its ancestors, whose limits apply as well."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        if fields[1] == "":  # version 2
            mounts = [root / _CGROUP, root / _CGROUP / "unified"]
        elif controller in fields[1].split(","):
            mounts = [root / _CGROUP / controller, root / _CGROUP / fields[1]]
        else:
            continue
        parts = [part for part in fields[2].split("/") if part and part != ".."]
        for mount in mounts:
            # Inside a container the path may be the host's and not exist here; the mount point then has the limit.
            yield from (mount.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def _read(path: Path) -> str:
    """A small file's text, or nothing if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
