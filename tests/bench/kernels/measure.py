"""Rounds of samples: every contender in turn, each between probes of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .contender import Contender
from .limits import Limits
from .statistics import DISTURBED, Sample, Work, steady

_LEAST_SECONDS = 0.03
_LEAST_ROUNDS = 3
_PATIENCE_SECONDS = 1.0

Call = Callable[[Contender, int], None]


@dataclass
class Race:
    """One row of the table: contenders on the same task.

    call       call(contender, i) makes call number i of the rotation
    work       of call number i
    first      first(i) is the expert at which call i begins to read
    probe_bytes  a probe reads at least so much, if the weights are so much
    away       so many experts behind those with which the next call begins
    """

    contenders: Sequence[Contender]
    experts: int
    call: Call
    work: Sequence[Work]
    first: Sequence[int]
    probe_bytes: int
    away: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def run(self, limits: Limits, rounds: int, seconds: float, peaks: Peaks, progress: Callable[[int], None]) -> None:
        """Rounds until `rounds` are undisturbed for every contender or the time is over, and at least three."""
        self.samples = {contender.name: [] for contender in self.contenders}
        cursor = 0
        begin = time.perf_counter()
        for done in range(3 * rounds):
            lap = time.perf_counter()
            for turn in range(len(self.contenders)):
                contender = self.contenders[(turn + done) % len(self.contenders)]
                sample, cursor = self._sample(contender, limits, peaks, cursor, begin + seconds)
                self.samples[contender.name].append(sample)
                peaks.see(sample)
            progress(done + 1)
            now = time.perf_counter()
            kept = min(sum(peaks.steady(s) for s in samples) for samples in self.samples.values())
            if done + 1 >= _LEAST_ROUNDS and (kept >= rounds or now - begin + (now - lap) > seconds):
                break

    def _sample(
        self, contender: Contender, limits: Limits, peaks: Peaks, cursor: int, deadline: float
    ) -> tuple[Sample, int]:
        others = OtherLoad()
        read_before = self._read(contender, limits, cursor, self.away)
        peak_before = peaks.wait(limits, deadline)
        calls: list[Work] = []
        begin = time.perf_counter()
        while True:
            at = cursor % len(self.work)
            self.call(contender, at)
            calls.append(self.work[at])
            cursor += 1
            seconds = time.perf_counter() - begin
            if seconds >= _LEAST_SECONDS:
                break
        time.sleep(contender.settle())
        reads = read_before, self._read(contender, limits, cursor, self.away // 2)
        return Sample(seconds, tuple(calls), reads, (peak_before, limits.peak_gflops()), others.cpus()), cursor

    def _read(self, contender: Contender, limits: Limits, cursor: int, away: int) -> float:
        """Of memory that is not in the last-level cache, and so that the call does not find its first weights there."""
        first = self.first[cursor % len(self.work)] + away
        return limits.read_gbps(regions(contender, self.experts, first, self.probe_bytes))


class OtherLoad:
    """CPU time that this process did not use, since its construction."""

    _TICK_SECONDS = 0.02  # /proc/stat counts whole ticks of 10 ms, on two and more CPUs

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), time.process_time(), self._busy()

    def cpus(self) -> float:
        """CPUs on average. Ticks that may be our own are left out, so short loads on short intervals are not seen."""
        others = (self._busy() - self._all) - (time.process_time() - self._own) - self._TICK_SECONDS
        return max(0.0, others) / (time.perf_counter() - self._wall)

    @staticmethod
    def _busy() -> float:
        """Seconds: user, nice, system, interrupts and what the hypervisor gave to others; not idle or waiting."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = fields[:8]
        return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def regions(contender: Contender, experts: int, first: int, least_bytes: int) -> list[torch.Tensor]:
    """A contender's weights from expert `first` on, at least so many bytes of them if there are as many."""
    found: list[torch.Tensor] = []
    for i in range(experts):
        found += contender.regions((first + i) % experts)
        if sum(region.nbytes for region in found) >= least_bytes:
            break
    return found


@dataclass
class Peaks:
    """The best peak seen so far, by which disturbed samples are told."""

    best: float = 0.0

    def see(self, sample: Sample) -> None:
        self.best = max(self.best, *sample.peak_gflops)

    def search(self, limits: Limits, seconds: float = 2.0) -> None:
        """Probes for a moment in which nobody disturbs: else a run that is disturbed from the start is not told."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.best = max(self.best, limits.peak_gflops())

    def wait(self, limits: Limits, deadline: float) -> float:
        """Until a probe comes near the best, a second at most: what disturbs comes in bursts. Returns the last one."""
        deadline = min(deadline, time.perf_counter() + _PATIENCE_SECONDS)
        while (peak := limits.peak_gflops()) < DISTURBED * self.best and time.perf_counter() < deadline:
            pass
        return peak

    def steady(self, sample: Sample) -> bool:
        return steady(sample, self.best)
