"""Which strategies an engine may use, on which device, and where that puts the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from .errors import FiddlerError
from .machine import AcceleratorKind
from .makespan import ALL, Strategy
from .plan import Plan

DeviceChoice = Literal["auto", "cuda", "simulated", "none"]


@dataclass(frozen=True)
class Setup:
    """What an engine is going to do: the device, what is permitted on it, and where that puts the experts.

    resident  bool [layers, experts]
    features  those of the plan that apply; only streaming has any
    """

    kind: AcceleratorKind
    strategies: tuple[Strategy, ...]
    resident: npt.NDArray[np.bool_]
    features: frozenset[str]

    @property
    def streaming(self) -> bool:
        """Whether experts may be copied to the accelerator for a step."""
        return "streamed" in self.strategies and not bool(self.resident.all())


def decide(plan: Plan, device: DeviceChoice, strategies: Sequence[str] | None, *, gpu: bool) -> Setup:
    """The caller's wishes and the plan's placement together. Raises FiddlerError as `permit` does."""
    permitted = permit(strategies, device)
    kind = choose_device(plan, device, permitted, gpu=gpu)
    chosen: tuple[Strategy, ...] = ("cpu",) if kind == "none" else permitted or ALL
    setup = Setup(kind, chosen, placement(plan, chosen), frozenset())
    on = frozenset(feature.name for feature in plan.header.features if feature.on)
    return replace(setup, features=on) if setup.streaming else setup


def choose_device(
    plan: Plan, device: DeviceChoice, permitted: tuple[Strategy, ...] | None, *, gpu: bool
) -> AcceleratorKind:
    """The device kind to open. `gpu`: whether this machine has a GPU that torch can use.

    auto is the kind the plan was compiled for; a plan for a GPU on a machine without one runs on the CPU alone.
    Where only "cpu" is permitted no device is opened.
    """
    if permitted == ("cpu",):
        return "none"
    if device != "auto":
        return device
    kind = plan.header.hardware.machine.accelerator.kind
    return "none" if kind == "cuda" and not gpu else kind


def permit(strategies: Sequence[str] | None, device: DeviceChoice) -> tuple[Strategy, ...] | None:
    """Checks the caller's restriction; None if there is none. The result is in the order of ALL.

    Raises FiddlerError for unknown or no strategies, and for those that need a device where none was asked for.
    """
    if strategies is None:
        return None
    unknown = sorted(set(strategies) - set(ALL))
    if unknown or not strategies:
        raise FiddlerError(
            "unknown strategies" if unknown else "no strategy is permitted",
            found=", ".join(unknown) if unknown else "an empty list",
            expected="one or more of " + ", ".join(ALL),
            hint="--strategies " + ",".join(ALL),
        )
    if device == "none" and "cpu" not in strategies:
        raise FiddlerError(
            "these strategies need an accelerator",
            found=", ".join(strategies) + " with device none",
            expected="device cuda or simulated, or the strategy cpu",
            hint="--device simulated",
        )
    return cast(tuple[Strategy, ...], tuple(s for s in ALL if s in strategies))


def placement(plan: Plan, permitted: tuple[Strategy, ...]) -> npt.NDArray[np.bool_]:
    """Which experts to put on the accelerator, bool [layers, experts].

    The plan's residents if "resident" is permitted; all if nothing else is; none if it is not.
    """
    planned = plan.tables.resident.astype(np.bool_)
    if permitted == ("resident",):
        return np.ones_like(planned)
    return planned if "resident" in permitted else np.zeros_like(planned)
