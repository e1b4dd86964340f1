"""Whether a lane takes what the plan says: predicted against actual time, over many layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .plan import Plan

Lane = Literal["cpu", "accelerator"]
LANES: tuple[Lane, ...] = ("cpu", "accelerator")

TOLERANCE = 1.25
WARM_UP = 20
"""Layers at first that say nothing: caches are cold, buffers grow."""
LEAST_LAYERS = 200
LEAST_US = 50_000.0


@dataclass
class _Sums:
    layers: int = 0
    predicted_us: float = 0.0
    actual_us: float = 0.0


class Drift:
    """Watches the lanes of one engine; says once what to do about a lane that is off by more than 25 %.

    With two regimes of the memory, any time between what both would take is as planned.
    """

    def __init__(self, plan: Plan) -> None:
        self._header = plan.header
        self._sums = {lane: _Sums() for lane in LANES}
        self._told = False
        curves = plan.tables.cpu_us[:, 1:]
        prevailing = curves[int(plan.tables.regime_shares.argmax())]
        self._bounds = {
            "cpu": (
                float((curves[0] / prevailing).min()) / TOLERANCE,
                float((curves[-1] / prevailing).max()) * TOLERANCE,
            ),
            "accelerator": (1 / TOLERANCE, TOLERANCE),
        }

    def note(self, lane: Lane, predicted_us: float, actual_us: float) -> None:
        """One layer in which that lane had work."""
        sums = self._sums[lane]
        sums.layers += 1
        if sums.layers > WARM_UP:
            sums.predicted_us += predicted_us
            sums.actual_us += actual_us

    def message(self) -> str | None:
        """What to warn of, the first time that there is something."""
        if self._told:
            return None
        for lane, sums in self._sums.items():
            if sums.layers < WARM_UP + LEAST_LAYERS or sums.actual_us < LEAST_US or sums.predicted_us <= 0:
                continue
            low, high = self._bounds[lane]
            ratio = sums.actual_us / sums.predicted_us
            if not low <= ratio <= high:
                self._told = True
                return self._words(lane, ratio)
        return None

    def _words(self, lane: Lane, ratio: float) -> str:
        hardware = self._header.hardware
        name = "CPU lane" if lane == "cpu" else "accelerator"
        why = (
            f"this machine is not as {hardware.name} was measured, or other programs use it"
            if hardware.provenance == "measured"
            else f"it rests on a {hardware.provenance} of {hardware.name}"
        )
        return (
            f"the {name} takes {ratio:.2f} x what the plan says: {why}; "
            "hint: fiddlerc calibrate -o hw.json, then fiddlerc compile MODEL --hw hw.json"
        )
