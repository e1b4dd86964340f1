"""Whether a plan may run on a machine, decided in one function: what refuses it, and what only makes it stale."""

from __future__ import annotations

from .errors import FiddlerError
from .machine import ISA_FLAGS, Machine
from .plan import ABI_VERSION, Header

# A machine reports slightly different sizes from one boot or driver to the next.
_SAME_MEMORY = 0.1


def check(header: Header, machine: Machine) -> tuple[str, ...]:
    """Compares a plan's header with the machine it is to run on.

    Raises FiddlerError (hard) if the plan cannot run: another ABI, no kernel whose instruction set runs here, or less
    accelerator memory than the plan fills. Returns one sentence for each difference (soft) that only makes the plan's
    latencies, and so its decisions, worse than they could be.
    """
    _require_abi(header)
    _require_isa(header, machine)
    _require_memory(header, machine)

    planned, there = header.hardware.machine, machine.accelerator
    stale = []
    if planned.cpu != machine.cpu:
        stale.append(f"compiled for the CPU {planned.cpu}, running on {machine.cpu}")
    if planned.cores != machine.cores:
        stale.append(f"compiled for {planned.cores} cores, running on {machine.cores}")
    if _differ(planned.memory_bytes, machine.memory_bytes):
        stale.append(f"compiled for {_gib(planned.memory_bytes)} of memory, running with {_gib(machine.memory_bytes)}")
    before = planned.accelerator
    if before.kind != there.kind:
        stale.append(
            f"compiled for {_accelerator(before.kind, before.name)}, here is {_accelerator(there.kind, there.name)}"
        )
    elif before.name != there.name:
        stale.append(f"compiled for the accelerator {before.name}, running on {there.name}")
    elif before.driver != there.driver:
        stale.append(f"compiled with the driver {before.driver or 'unknown'}, running with {there.driver or 'unknown'}")
    mend = "decisions may be off: fiddlerc calibrate -o hw.json, then compile again"
    warnings = [f"{line}; {mend}" for line in stale]
    if header.hardware.provenance != "measured":
        warnings.append(f"latencies come from a {header.hardware.provenance} ({header.hardware.source}); {mend}")
    best = header.kernels.variants[0].isa
    runs = next(variant.isa for variant in header.kernels.variants if variant.isa in machine.isa)
    if runs != best and best in planned.isa:
        lacking = ", ".join(flag for flag in ISA_FLAGS[best] if flag not in ISA_FLAGS[runs])
        warnings.append(f"compiled for {best} kernels, running {runs}: this CPU lacks {best} ({lacking}); {mend}")
    if runs == "scalar" and len(header.kernels.variants) > 1:
        warnings.append(
            "running the scalar kernels, which are many times slower: this CPU has no vector instructions "
            "that the plan was compiled for"
        )
    return tuple(warnings)


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
        expected=f"one of {', '.join(built)} ({wanted} lacks the CPU flags {missing})",
        hint=f"compile it for this CPU: fiddlerc compile ... --isa {machine.isa[0]}",
    )


def _require_memory(header: Header, machine: Machine) -> None:
    """A plan for a GPU fills the memory it was given. On a machine without one it runs on the CPU and needs none."""
    if machine.accelerator.kind != "cuda" or header.hardware.machine.accelerator.kind != "cuda":
        return
    residents = header.placement.resident_experts * header.model.expert_bytes
    needed = sum(item.bytes for item in header.memory) + residents
    if needed > machine.accelerator.memory_bytes:
        raise FiddlerError(
            f"the plan needs more memory than {machine.accelerator.name} has",
            found=_gib(machine.accelerator.memory_bytes),
            expected=f"{_gib(needed)}, of which resident experts {_gib(residents)}",
            hint=f"fiddlerc compile ... --gpu-memory {machine.accelerator.memory_bytes // 2**20}MiB",
        )


def _differ(a: int, b: int) -> bool:
    return abs(a - b) > _SAME_MEMORY * max(a, b)


def _accelerator(kind: str, name: str) -> str:
    return {"cuda": f"the GPU {name}", "simulated": "a simulated accelerator", "none": "no accelerator"}[kind]


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
