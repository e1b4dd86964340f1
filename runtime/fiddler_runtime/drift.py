"""Whether a lane takes what the plan says: predicted against actual time, over the last seconds."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import FiddlerWarning
from .machine import AcceleratorKind, cpu_lane_threads
from .plan import Header, Plan

Lane = Literal["cpu", "accelerator"]
LANES: tuple[Lane, ...] = ("cpu", "accelerator")

TOLERANCE = 1.25
SLACK_US: dict[Lane, float] = {"cpu": 100.0, "accelerator": 200.0}
"""What a layer must differ by, too: less is what waking a thread costs at one time and not at another. The
accelerator's work wakes two, its queue's and then the caller's."""
WARM_UP = 20
"""Layers at first that say nothing: caches are cold, buffers grow."""
WINDOW_S = 5.0
"""What is judged: so much of the past, or where layers are long the last LEAST_LAYERS of them. Their median counts, as
in calibration: a moment in which others had the CPU is no drift."""
LEAST_LAYERS = 200
LEAST_US = 50_000.0
_LEAST, _EVERY = 0.4, 0.05  # of the window: what it spans at least, and what lies between two judgements


@contextmanager
def unheeded() -> Iterator[None]:
    """Nothing is said within: where a plan's times are not known yet, or not meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* what the plan says", FiddlerWarning)
        yield


class _Window:
    """One lane's last layers: when, predicted and actual microseconds."""

    def __init__(self, slack_us: float) -> None:
        self._slack_us = slack_us
        self._warm_up = WARM_UP
        self._layers: deque[tuple[float, float, float]] = deque()
        self._sum_us = 0.0
        self._judged_s = -math.inf

    def add(self, now_s: float, predicted_us: float, actual_us: float) -> None:
        if self._warm_up:
            self._warm_up -= 1
            return
        self._layers.append((now_s, predicted_us, actual_us))
        self._sum_us += actual_us
        while self._layers[0][0] < now_s - WINDOW_S and len(self._layers) > LEAST_LAYERS:
            self._sum_us -= self._layers.popleft()[2]

    def ratio(self) -> float | None:
        """How many times its prediction a layer takes, 1 within the slack; None if it is too early to tell, or it was
        told a moment ago."""
        if len(self._layers) < LEAST_LAYERS or self._sum_us < LEAST_US:
            return None
        first_s, last_s = self._layers[0][0], self._layers[-1][0]
        if last_s - first_s < _LEAST * WINDOW_S or last_s - self._judged_s < _EVERY * WINDOW_S:
            return None
        self._judged_s = last_s
        _, predicted, actual = np.array(self._layers).T
        slack = abs(float(np.median(actual - predicted))) < self._slack_us
        return 1.0 if slack else float(np.median(actual / predicted))


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
        self._windows = {lane: _Window(SLACK_US[lane]) for lane in LANES}
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
            low, high = self._bounds[lane]
            ratio = window.ratio()
            if ratio is not None and not low <= ratio <= high:
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
