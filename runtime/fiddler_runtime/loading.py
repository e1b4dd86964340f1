"""Opening a plan on this machine."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from .build import build_kernels
from .compat import check
from .errors import FiddlerError, FiddlerWarning
from .kernels import KernelLibrary
from .machine import AcceleratorKind, this_machine
from .plan import Plan, read_plan
from .progress import Progress
from .strategies import choose_device


@dataclass(frozen=True)
class LoadedPlan(Plan):
    """A plan that passed this machine's checks.

    binary  the kernel library inside the plan, if there is one and the caller trusts it; else kernels are built
    """

    binary: Path | None


def load_plan(path: str | Path, *, trust_binaries: bool = False) -> LoadedPlan:
    """Reads and verifies a plan, and compares it with this machine.

    A library that came with the plan is code from elsewhere: it is used only with trust_binaries, else the kernels are
    built from the plan's sources and cached. Raises FiddlerError for a bad plan or one that cannot run here; warns
    (FiddlerWarning) about what makes its latencies stale.
    """
    plan = read_plan(Path(path))
    for difference in check(plan.header, this_machine(device_here(plan))):
        warnings.warn(difference, FiddlerWarning, stacklevel=2)
    binary = None
    if trust_binaries:
        names = [entry.path for entry in plan.header.files if entry.path.endswith(".so")]
        if not names:
            raise FiddlerError(
                f"the plan {plan.path} has no binaries to trust",
                found="sources only",
                expected="a kernel library",
                hint="leave out --trust-binaries, or compile with --include-binaries",
            )
        binary = plan.path / names[0]
    return LoadedPlan(plan.path, plan.header, plan.tables, binary)


def device_here(plan: Plan) -> AcceleratorKind:
    """The device that an engine would choose by itself: see `strategies.choose_device`."""
    return choose_device(plan, "auto", None, gpu=torch.cuda.is_available())


def open_library(plan: Plan, *, progress: Progress | None = None) -> KernelLibrary:
    """The plan's kernel library: the trusted one, or one built from its sources (seconds, cached)."""
    path = plan.binary if isinstance(plan, LoadedPlan) else None
    if path is None:
        path = build_kernels(plan.path / "kernels", progress=progress)
    return KernelLibrary(path, plan.header.kernels)
