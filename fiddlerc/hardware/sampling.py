"""Repeating a measurement until it can be believed, on a machine that others use as well."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir import Quantity, Regime, Sample, StepSample
from .regimes import Regimes

Timed = Callable[[int], float]
"""Does the i-th repetition and returns the microseconds that it took."""

STEADY = 0.85
"""Share of the best peak probe below which other load is held responsible for what was measured."""
ATTEMPTS = 3


CONTRADICTION = 1.5
"""A step that takes so many times as long as one with more to do was not alone on the machine."""


@dataclass(frozen=True)
class Point:
    """What was timed once, see ir.Sample: `times` in microseconds.

    gbps  the memory's bandwidth meanwhile; None where it does not matter
    """

    quantity: Quantity
    shape: tuple[int, int]
    tokens: int
    bytes: int
    threads: int
    isa: str
    times: Sequence[float]
    gbps: float | None = None


def samples(points: Iterable[Point], regimes: Regimes) -> tuple[Sample, ...]:
    """Points of the same thing in the same regime make one sample, in the order of the first ones."""
    series: dict[tuple[Point, Regime], list[float]] = {}
    for point in points:
        regime: Regime = "fast" if point.gbps is None else regimes.of(point.gbps)
        series.setdefault((replace(point, times=(), gbps=None), regime), []).extend(point.times)
    return tuple(
        Sample(
            quantity=of.quantity,
            hidden_size=of.shape[0],
            intermediate_size=of.shape[1],
            tokens=of.tokens,
            bytes=of.bytes,
            threads=of.threads,
            isa=of.isa,
            median_us=round(float(np.median(times)), 3),
            spread_us=round(float(np.subtract(*np.percentile(times, [90, 10]))), 3),
            repeats=len(times),
            regime=regime,
        )
        for (of, regime), times in series.items()
    )


def contradictions(steps: Sequence[StepSample]) -> list[str]:
    """What cannot be about measured steps, a line a model: one that takes longer than another with more to do."""

    def tokens(step: StepSample) -> int:
        return step.context or step.tokens  # before a step that decodes; of a prompt

    lines = {}
    for short, long in itertools.permutations(steps, 2):
        alike = (short.model, short.sequences, short.context > 0) == (long.model, long.sequences, long.context > 0)
        if alike and tokens(short) < tokens(long) and short.median_us > CONTRADICTION * long.median_us:
            lines[short.model] = (
                f"steps of {short.model} contradict each other: {tokens(short)} tokens took {short.median_us / 1e3:.1f}"
                f" ms, {tokens(long)} {long.median_us / 1e3:.1f}. Something else kept the machine busy: calibrate again"
            )
    return list(lines.values())


class Guard:
    """Repeats a measurement that other load disturbed: one around which the compute peak was not reached.

    probe: returns the machine's current peak (any unit); it should take milliseconds.
    """

    def __init__(self, probe: Callable[[], float]) -> None:
        self._probe = probe
        self._best = max(probe() for _ in range(5))
        self.points = 0
        self.disturbed = 0

    def __call__(self, measure: Callable[[], list[float]]) -> list[float]:
        """The times of the first undisturbed attempt, or of the least disturbed of ATTEMPTS."""
        self.points += 1
        least: tuple[float, list[float]] | None = None
        for _ in range(ATTEMPTS):
            before = self._probe()
            times = measure()
            level = min(before, self._probe())
            self._best = max(self._best, level)
            if level >= STEADY * self._best:
                return times
            if least is None or level > least[0]:
                least = (level, times)
        self.disturbed += 1
        assert least is not None
        return least[1]


def repeat(timed: Timed, *, seconds: float, least: int, most: int, warm_up: int = 1) -> list[float]:
    """Times of `least` to `most` repetitions: as many as fit in `seconds`.

    Before them up to `warm_up` that do not count, at least one, in at most a quarter of the time.
    """
    started = time.perf_counter()
    done = 0
    while done == 0 or (done < warm_up and time.perf_counter() < started + seconds / 4):
        timed(done)
        done += 1
    times: list[float] = []
    while len(times) < least or (len(times) < most and time.perf_counter() < started + seconds):
        times.append(timed(done + len(times)))
    return times


def sizes_within(
    sizes: tuple[int, ...], call_us: Callable[[int], float], seconds: float, calls: int
) -> tuple[int, ...]:
    """The sizes, ascending, that can be called that many times each within `seconds`; always the first four.

    call_us: times one call of a size. Four sizes are what a latency model needs at least.
    """
    kept: list[int] = []
    spent = 0.0
    for index, size in enumerate(sizes):
        us = call_us(size)
        kept.append(size)
        spent += us * calls / 1e6
        # The next size takes about as much longer as it is larger, once the arithmetic dominates.
        following = us * sizes[index + 1] / size * calls / 1e6 if index + 1 < len(sizes) else 0.0
        if len(kept) >= 4 and spent + following > seconds:
            break
    return tuple(kept)
