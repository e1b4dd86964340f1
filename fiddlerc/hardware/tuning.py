"""Measuring several builds of the same kernels beside each other, as `compile --tune` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import KernelLibrary
from fiddler_runtime.machine import cpu_lane_threads, lane_cpus, this_machine
from fiddler_runtime.progress import Progress

from ..ir import Blocking, Calibration, TunedCandidate, Tuning
from .calibrate import PROBE_MS, rotated_bytes, rotated_copies
from .lanes import CpuExpert
from .sampling import Guard, repeat


@dataclass(frozen=True)
class Effort:
    """Token counts of every regime; so many rounds of so many seconds for each build and count."""

    tokens: tuple[int, ...] = (1, 4, 8, 16, 64, 256)
    rounds: int = 7
    seconds: float = 0.03
    least: int = 2


EFFORT = Effort()


def require_this_machine(calibration: Calibration) -> None:
    """Raises FiddlerError unless this is the machine that was calibrated: what is measured here is true here only."""
    there, here = calibration.machine, this_machine("none")
    for what, then, now in (
        ("", there.cpu, here.cpu),
        (" cores", there.cores, here.cores),
        (" bytes of L2", there.l2_bytes, here.l2_bytes),
    ):
        if then != now:
            raise FiddlerError(
                "--tune measures on the machine that the plan is for, and this is another",
                found=f"{now}{what}",
                expected=f"{then}{what}, as in {calibration.name}",
                hint="leave out --tune (the cost model needs only hw.json), or fiddlerc calibrate -o hw.json",
            )


def tune(
    builds: Sequence[tuple[str, Blocking, KernelLibrary]],
    isa: str,
    calibration: Calibration,
    *,
    progress: Progress | None = None,
) -> Tuning:
    """Times builds of one instruction set's kernel that differ in their blocking, and says which to take.

    builds  (what differs from the first one, its blocking, the library); the first is what the others are compared with
    Experts as `measure` times them, weights rotated over four last-level caches, threads as the CPU lane has them.
    Builds take turns, and who begins changes from round to round. Another build takes the first one's place only if it
    was faster in three quarters of the rounds.
    """
    effort = EFFORT
    machine = calibration.machine
    threads = cpu_lane_threads(machine.cores, machine.accelerator.kind)
    nbytes = builds[0][2].packed_bytes
    times = np.empty((effort.rounds, len(builds), len(effort.tokens)))
    with ExitStack() as stack:
        kernels = [stack.enter_context(library.open(isa, threads, cpus=lane_cpus(threads))) for _, _, library in builds]
        first = CpuExpert(kernels[0], rotated_copies(nbytes, rotated_bytes(machine), machine))
        lanes = [first, *(first.on(other) for other in kernels[1:])]
        guard = Guard(partial(kernels[0].peak_gflops, PROBE_MS))
        calls = [[lane.timed(tokens) for tokens in effort.tokens] for lane in lanes]
        for turn in range(effort.rounds):
            for column in range(len(effort.tokens)):
                for step in range(len(builds)):
                    row = (turn + step) % len(builds)
                    timed = calls[row][column]
                    measure = partial(repeat, timed, seconds=effort.seconds, least=effort.least, most=10_000)
                    times[turn, row, column] = np.median(guard(measure))
            if progress is not None:
                progress(f"tuning {isa}", turn + 1, effort.rounds)
    return judge([build[:2] for build in builds], times, Tuning(isa, threads, effort.tokens, effort.rounds, ()))


def judge(builds: Sequence[tuple[str, Blocking]], times: npt.NDArray[np.float64], about: Tuning) -> Tuning:
    """times [rounds, builds, token counts] to figures, and the choice."""
    speed = times[:, :1] / times
    overall = np.exp(np.log(speed).mean(axis=2))
    low, median, high = np.percentile(overall, [25, 50, 75], axis=0)
    faster = [row for row in range(1, len(builds)) if low[row] > 1.0]
    best = max(faster, key=lambda row: median[row], default=0)
    candidates = tuple(
        TunedCandidate(
            change=change,
            blocking=blocking,
            speed=tuple(_rounded(value) for value in np.median(speed[:, row], axis=0)),
            median=_rounded(median[row]),
            low=_rounded(low[row]),
            high=_rounded(high[row]),
            chosen=row == best,
        )
        for row, (change, blocking) in enumerate(builds)
    )
    return Tuning(about.isa, about.threads, about.tokens, about.rounds, candidates)


def _rounded(value: float) -> float:
    assert math.isfinite(value)
    return round(float(value), 4)
