"""What this machine has of what we use, what it lacks, and the command that mends it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from fiddler_runtime.build import cache_dir, find_toolchain
from fiddler_runtime.errors import FiddlerError, install
from fiddler_runtime.machine import (
    KNOWN_ISAS,
    Machine,
    cpu_lane_threads,
    cpus_by_node,
    find_accelerator,
    lane_cpus,
    refused,
    refuses_placement,
    this_machine,
)

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. hint is a command, or empty. A "note" works, but not as well as it could."""

    name: str
    status: Status
    detail: str
    hint: str


@dataclass(frozen=True)
class Package:
    """A Python package: what it is for, and how it is installed."""

    name: str
    least: tuple[int, int]
    purpose: str
    install: str


_COMPILER = install("compiler")
PACKAGES = (
    Package("torch", (2, 6), "the runtime", "pip install torch"),
    Package("numpy", (1, 26), "the runtime", "pip install numpy"),
    Package("safetensors", (0, 5), "the runtime", "pip install safetensors"),
    Package("scikit-learn", (1, 5), "latency models", _COMPILER),
    Package("jinja2", (3, 1), "generating kernels", _COMPILER),
    Package("matplotlib", (3, 9), "the report", _COMPILER),
    Package("transformers", (5, 20), "tracing and running Hugging Face models", install("hf")),
)


def doctor(root: Path = Path("/")) -> tuple[Check, ...]:
    """Looks at the machine, the build tools, the GPU, the Python packages and the build cache. Never raises.

    root: where /proc and /sys are, for tests.
    """
    machine = this_machine("none", root=root)
    return (
        *_cpu(machine, root),
        *_memory(machine, root),
        *_build_tools(),
        _gpu(machine, root),
        *(_package(package) for package in PACKAGES),
        _cache(),
    )


def _cpu(machine: Machine, root: Path) -> Iterator[Check]:
    logical = len(os.sched_getaffinity(0))
    cores = f"{machine.cores} usable cores ({logical} logical CPUs)"
    yield Check("CPU", "ok", f"{machine.cpu}, {cores}", "")
    best = machine.isa[0]
    for isa in KNOWN_ISAS:
        lacking = refused(isa, root)
        if not lacking:
            yield Check(f"ISA {isa}", "ok", "used by default" if isa == best else "usable", "")
        elif isa == "avx2":
            detail = f"{lacking}: only the scalar kernel runs, an order of magnitude slower"
            yield Check(
                f"ISA {isa}", "missing", detail, "grep -m1 flags /proc/cpuinfo   (a virtual machine may hide them)"
            )
        else:
            yield Check(f"ISA {isa}", "note", f"{lacking}: {best} is used instead", "")
    if platform.machine() not in ("x86_64", "AMD64"):
        detail = f"{platform.machine()}: kernels are generated for x86-64"
        yield Check(
            "architecture", "missing", detail, "fiddlerc compile ... --no-build   (and run on an x86-64 machine)"
        )
    sizes = (("L1d", machine.l1d_bytes), ("L2", machine.l2_bytes), ("L3", machine.l3_bytes))
    caches = ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in sizes if nbytes)
    yield Check("caches", "ok" if caches else "note", caches or "the system does not tell", "")


def _memory(machine: Machine, root: Path) -> Iterator[Check]:
    if machine.memory_bytes:
        yield Check("memory", "ok", f"{_size(machine.memory_bytes)} usable", "")
    else:
        yield Check("memory", "note", "the system does not tell", "")
    yield _memory_nodes(machine, root)


def _memory_nodes(machine: Machine, root: Path) -> Check:
    if machine.numa_nodes == 1:
        return Check("NUMA", "ok", "1 node", "")
    nodes, threads = f"{machine.numa_nodes} nodes", cpu_lane_threads(machine.cores, machine.accelerator.kind)
    if len(cpus_by_node(root)) == 1:
        return Check("NUMA", "ok", f"{nodes}, of which this process computes on one", "")
    if lane_cpus(threads, root) is None:
        detail = f"{nodes}, over which {threads} threads do not spread evenly: weights lie where they are first written"
        return Check("NUMA", "note", detail, "taskset --cpu-list ...   (as many cores of each node, or of one)")
    if refused := refuses_placement():
        detail = f"{nodes}, but mbind is refused ({refused}): weights lie where they are first written"
        return Check("NUMA", "note", detail, "in a container: docker run --cap-add SYS_NICE ...")
    return Check("NUMA", "ok", f"{nodes}: weights lie on the one whose threads read them", "")


def _build_tools() -> Iterator[Check]:
    try:
        tools = find_toolchain()
    except FiddlerError as error:
        found = ", ".join(name for name in ("c++", "cmake", "ninja", "make") if _which(name)) or "none of them"
        yield Check("build tools", "missing", f"{error.line}   (found: {found})", error.hint or "")
        return
    yield Check("C++ compiler", "ok", f"{tools.identity} ({tools.compiler})", "")
    yield Check("CMake", "ok", _with_version("cmake", tools.cmake), "")
    if tools.generator == "Ninja":
        yield Check("Ninja", "ok", _with_version("ninja", tools.generator_program), "")
    else:
        yield Check("Ninja", "note", f"absent: {tools.generator} is used instead", "pip install ninja")


def _gpu(machine: Machine, root: Path) -> Check:
    found = None
    with contextlib.suppress(FiddlerError):
        found = find_accelerator("cuda", machine.memory_bytes, root)
    if found is not None:
        return Check("GPU", "ok", f"{found.name}, {_size(found.memory_bytes)}, driver {found.driver}", "")
    if (root / "proc/driver/nvidia/version").exists():
        detail = "there is an NVIDIA driver, but torch does not see a GPU: the accelerator would be simulated"
        return Check("GPU", "missing", detail, "pip install --force-reinstall torch   (a build for your driver's CUDA)")
    threads = cpu_lane_threads(machine.cores, "simulated")
    detail = f"none: the accelerator is simulated on one core, the CPU lane has {threads}"
    return Check("GPU", "note", detail, "")


def _package(package: Package) -> Check:
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return Check(package.name, "missing", f"not installed; {package.purpose} needs it", package.install)
    if _release(version) < package.least:
        wanted = ".".join(map(str, package.least))
        detail = f"{version}; {package.purpose} needs at least {wanted}"
        return Check(package.name, "missing", detail, f"pip install -U '{package.name}>={wanted}'")
    return Check(package.name, "ok", version, "")


def _cache() -> Check:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        detail = f"{folder} cannot be written: {error.strerror or error}"
        return Check("build cache", "missing", detail, "export FIDDLER_CACHE=/some/writable/folder")
    return Check("build cache", "ok", f"{folder}, {_size(shutil.disk_usage(folder).free)} free", "")


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _with_version(package: str, program: Path) -> str:
    """The program, and its version where it came as a Python package."""
    if program.parent == Path(sysconfig.get_path("scripts")):
        try:
            return f"{metadata.version(package)} ({program})"
        except metadata.PackageNotFoundError:
            pass
    return str(program)


def _release(version: str) -> tuple[int, int]:
    """'2.13.0+cpu' to (2, 13)."""
    numbers = [int(part) if part.isdigit() else 0 for part in version.split("+")[0].split(".")[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


def _size(nbytes: int) -> str:
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= one:
            return f"{nbytes / one:.4g} {unit}"
    return f"{nbytes} B"
