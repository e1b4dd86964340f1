"""Whether a lane takes what the plan says: predicted against actual time, over the last seconds."""

from __future__ import annotations

import statistics
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from .errors import FiddlerWarning
from .machine import AcceleratorKind, cpu_lane_threads
from .plan import Header, Plan

Lane = Literal["cpu", "accelerator"]
LANES: tuple[Lane, ...] = ("cpu", "accelerator")

TOLERANCE = 1.25
WARM_UP = 20
"""Layers at first that say nothing: caches are cold, buffers grow."""
WINDOW_S = 5.0
"""What is judged: so much of the past, or where layers are long the last LEAST_LAYERS of them."""
LEAST_LAYERS = 200
LEAST_US = 50_000.0
_PARTS = 20  # of the window, forgotten one by one
LEAST_PARTS = 8
"""Of the window, with work in each. Their median counts: a moment in which others had the CPU is no drift."""


@dataclass
class _Sums:
    since_s: float
    layers: int = 0
    predicted_us: float = 0.0
    actual_us: float = 0.0


@contextmanager
def unheeded() -> Iterator[None]:
    """Nothing is said within: where a plan's times are not known yet, or not meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* what the plan says", FiddlerWarning)
        yield


class _Window:
    """One lane's last seconds, in parts, and their sum."""

    def __init__(self) -> None:
        self.warm_up = WARM_UP
        self.parts: deque[_Sums] = deque()
        self.total = _Sums(0.0)

    def add(self, now_s: float, predicted_us: float, actual_us: float) -> None:
        if self.warm_up:
            self.warm_up -= 1
            return
        if not self.parts or now_s >= self.parts[-1].since_s + WINDOW_S / _PARTS:
            self.parts.append(_Sums(now_s))
        for sums in (self.parts[-1], self.total):
            sums.layers += 1
            sums.predicted_us += predicted_us
            sums.actual_us += actual_us
        while self.parts[0].since_s < now_s - WINDOW_S and self.total.layers - self.parts[0].layers >= LEAST_LAYERS:
            old = self.parts.popleft()
            self.total.layers -= old.layers
            self.total.predicted_us -= old.predicted_us
            self.total.actual_us -= old.actual_us


@dataclass(frozen=True)
class Setup:
    """What a plan's times depend on beside the machine: the accelerator, and the CPU lane's threads and kernels."""

    device: AcceleratorKind
    threads: int
    isa: str

    def __str__(self) -> str:
        accelerator = {"cuda": "a GPU", "simulated": "a simulated accelerator", "none": "no accelerator"}[self.device]
        return f"{accelerator} and {self.threads} CPU thread{'s' if self.threads > 1 else ''} with {self.isa} kernels"


class Drift:
    """Watches the lanes of one engine; says once what to do about a lane that is off by more than 25 %.

    With two regimes of the memory, any time between what both would take is as planned.
    here: what runs it, which may not be what the plan is for.
    """

    def __init__(self, plan: Plan, here: Setup) -> None:
        self._header = plan.header
        self._here = here
        self._windows = {lane: _Window() for lane in LANES}
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

    def note(self, lane: Lane, now_s: float, predicted_us: float, actual_us: float) -> None:
        """One layer in which that lane had work, done at `now_s` of a clock that only goes forward."""
        self._windows[lane].add(now_s, predicted_us, actual_us)

    def message(self) -> str | None:
        """What to warn of, the first time that there is something."""
        if self._told:
            return None
        for lane, window in self._windows.items():
            sums = window.total
            ratios = [part.actual_us / part.predicted_us for part in window.parts if part.predicted_us > 0]
            if sums.layers < LEAST_LAYERS or sums.actual_us < LEAST_US or len(ratios) < LEAST_PARTS:
                continue
            low, high = self._bounds[lane]
            ratio = statistics.median(ratios)
            if not low <= ratio <= high:
                self._told = True
                return self._words(lane, ratio)
        return None

    def _words(self, lane: Lane, ratio: float) -> str:
        hardware = self._header.hardware
        name = "CPU lane" if lane == "cpu" else "accelerator"
        planned = _planned(self._header)
        mend = "fiddlerc calibrate -o hw.json, then fiddlerc compile MODEL --hw hw.json"
        if self._here != planned:
            why = f"the plan is for {planned}, and this runs on {self._here}"
            if self._here.device != planned.device:
                mend = mend.replace("calibrate", f"calibrate --accelerator {self._here.device}")
            else:
                mend = f"leave out --threads and --isa if you gave them; otherwise {mend}"
        elif hardware.provenance == "measured":
            why = f"this machine is not as {hardware.name} was measured, or other programs use it"
        else:
            why = f"it rests on a {hardware.provenance} of {hardware.name}"
        return f"the {name} takes {ratio:.2f} x what the plan says: {why}; hint: {mend}"


def _planned(header: Header) -> Setup:
    machine = header.hardware.machine
    kind, isas = machine.accelerator.kind, [variant.isa for variant in header.kernels.variants]
    isa = next((isa for isa in isas if isa in machine.isa), isas[0])
    return Setup(kind, cpu_lane_threads(machine.cores, kind), isa)
