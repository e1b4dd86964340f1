"""Whether a plan may run on a machine, decided in one function: what refuses it, and what only makes it stale."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import FiddlerError
from .machine import ISA_FLAGS, Machine
from .plan import ABI_VERSION, Header

# A machine reports slightly different sizes from one boot or driver to the next.
_SAME_MEMORY = 0.1

_MEND = "decisions may be off; hint: fiddlerc calibrate -o hw.json, then compile again with --hw hw.json"


def check(header: Header, machine: Machine) -> tuple[str, ...]:
    """Compares a plan's header with the machine it is to run on.

    Raises FiddlerError (hard) if the plan cannot run: another ABI, or no kernel whose instruction set runs here.
    Returns sentences (soft) about what only makes the plan's latencies stale, and so its decisions worse than they
    could be, and about less accelerator memory than the plan fills.
    """
    _require_abi(header)
    _require_isa(header, machine)

    warnings = list(_too_little_memory(header, machine))
    if differences := _differences(header.hardware.machine, machine):
        warnings.append(f"compiled for another machine: {'; '.join(differences)}; {_MEND}")
    if header.hardware.provenance != "measured":
        warnings.append(f"latencies come from a {header.hardware.provenance}, not from a measurement; {_MEND}")
    best = header.kernels.variants[0].isa
    runs = next(variant.isa for variant in header.kernels.variants if variant.isa in machine.isa)
    if runs != best and best in header.hardware.machine.isa:
        lacking = ", ".join(flag for flag in ISA_FLAGS[best] if flag not in ISA_FLAGS[runs])
        warnings.append(f"compiled for {best} kernels, running {runs}: no {best} here ({lacking}); {_MEND}")
    if runs == "scalar" and len(header.kernels.variants) > 1:
        warnings.append(
            "running the scalar kernels, which are many times slower: this CPU has no vector instructions "
            "that the plan was compiled for"
        )
    return tuple(warnings)


def _differences(planned: Machine, here: Machine) -> list[str]:
    """What of a machine changes latencies, each as 'then, here now'."""
    found = []
    if planned.cpu != here.cpu:
        found.append(f"CPU {planned.cpu}, here {here.cpu}")
    if planned.cores != here.cores:
        found.append(f"{planned.cores} cores, here {here.cores}")
    if _differ(planned.memory_bytes, here.memory_bytes):
        found.append(f"{_gib(planned.memory_bytes)} of memory, here {_gib(here.memory_bytes)}")
    before, now = planned.accelerator, here.accelerator
    if (before.kind, before.name) != (now.kind, now.name):
        found.append(f"{_accelerator(before.kind, before.name)}, here is {_accelerator(now.kind, now.name)}")
    elif before.driver != now.driver:
        found.append(f"driver {before.driver or 'unknown'}, here {now.driver or 'unknown'}")
    return found


def _require_abi(header: Header) -> None:
    if header.abi != ABI_VERSION:
        raise FiddlerError(
            "the plan's kernels have another interface",
            found=f"ABI {header.abi}",
            expected=f"ABI {ABI_VERSION}",
            hint="compile it again with this version: fiddlerc compile MODEL --hw HW -o PLAN",
        )


def _require_isa(header: Header, machine: Machine) -> None:
    built = [variant.isa for variant in header.kernels.variants]
    if any(isa in machine.isa for isa in built):
        return
    # The least demanding variant is the one that this machine is nearest to.
    wanted = min(built, key=lambda isa: len(ISA_FLAGS[isa]))
    have = {flag for isa in machine.isa for flag in ISA_FLAGS[isa]}
    missing = ", ".join(flag for flag in ISA_FLAGS[wanted] if flag not in have)
    raise FiddlerError(
        "no kernel of the plan runs on this CPU",
        found=f"{machine.cpu}, which runs {', '.join(machine.isa)}",
        expected=f"one of {', '.join(built)} ({wanted} needs {missing} of the CPU and the operating system)",
        hint=f"compile it for this CPU: fiddlerc compile ... --isa {machine.isa[0]}",
    )


def _too_little_memory(header: Header, machine: Machine) -> Iterator[str]:
    """A plan for a GPU fills the memory it was given. On a machine without one it runs on the CPU and needs none."""
    if machine.accelerator.kind != "cuda" or header.hardware.machine.accelerator.kind != "cuda":
        return
    residents = header.placement.resident_experts * header.model.expert_bytes
    needed = sum(item.bytes for item in header.memory) + residents
    if needed > machine.accelerator.memory_bytes:
        yield (
            f"compiled for {_gib(needed)} of a GPU's memory, of which {machine.accelerator.name} has "
            f"{_gib(machine.accelerator.memory_bytes)}: the least popular resident experts will be given up; hint: "
            f"fiddlerc compile ... --gpu-memory {machine.accelerator.memory_bytes // 2**20}MiB"
        )


def _differ(a: int, b: int) -> bool:
    return abs(a - b) > _SAME_MEMORY * max(a, b)


def _accelerator(kind: str, name: str) -> str:
    return {"cuda": f"the GPU {name}", "simulated": "a simulated accelerator", "none": "no accelerator"}[kind]


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
