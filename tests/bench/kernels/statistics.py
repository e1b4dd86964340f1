"""From times and probes to percent of roofline: pure functions, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

DISTURBED = 0.9
"""A probe of the peak below this share of the best one shows that something else ran."""

CROWDED = 0.1
"""More CPUs than this that other processes used during the calls, on average."""

SWITCHED = 0.85
"""Bandwidths before and after that differ more than this show that the memory changed its regime in between."""


@dataclass(frozen=True)
class Work:
    """What calls have to do at least: bytes of weights to read, floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Sample:
    """Some calls of one contender between two probes.

    seconds      of all calls together
    work         of each call
    read_gbps    bandwidth of the memory right before and after
    peak_gflops  of the multiply instruction right before and after
    others       CPUs that other processes, and other virtual machines, used meanwhile
    """

    seconds: float
    work: tuple[Work, ...]
    read_gbps: tuple[float, float]
    peak_gflops: tuple[float, float]
    others: float

    @property
    def bandwidth(self) -> float:
        """GB/s, the mean of the two probes."""
        return sum(self.read_gbps) / 2

    @property
    def peak(self) -> float:
        """GFLOP/s, the mean of the two probes."""
        return sum(self.peak_gflops) / 2

    @property
    def roofline(self) -> float:
        """The least time that the machine allows over the time taken; 1 is the limit."""
        return sum(least_seconds(w, self.bandwidth, self.peak) for w in self.work) / self.seconds


def least_seconds(work: Work, read_gbps: float, peak_gflops: float) -> float:
    """The roofline's time: the larger of reading the weights once and of the operations at the peak rate."""
    return max(work.bytes / (read_gbps * 1e9), work.flops / (peak_gflops * 1e9))


def steady(sample: Sample, best_peak: float) -> bool:
    """Whether nothing else ran and, where memory can be the limit, its regime did not change."""
    if min(sample.peak_gflops) < DISTURBED * best_peak or sample.others > CROWDED:
        return False
    low, high = sorted(sample.read_gbps)
    if low >= SWITCHED * high:
        return True
    return all(w.bytes / (low * 1e9) <= w.flops / (max(sample.peak_gflops) * 1e9) for w in sample.work)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def paired(ours: Sequence[Sample | None], other: Sequence[Sample | None]) -> list[float]:
    """How many times faster ours is, round by round, each time freed of the machine's state by its own probes.

    Rounds in which either was disturbed (None) are left out.
    """
    return [a.roofline / b.roofline for a, b in zip(ours, other, strict=True) if a is not None and b is not None]
