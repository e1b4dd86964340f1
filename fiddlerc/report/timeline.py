"""One layer's decision as a timeline: what the copy engine, the accelerator and the CPU do when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import CPU, RESIDENT, STREAMED, Decision, Latencies, choose, look_up

LANES = ("copies", "accelerator", "CPU")
Kind = Literal["entry", "copy", "resident", "streamed", "cpu"]


@dataclass(frozen=True)
class Bar:
    """Something that a lane does: lane is an index of LANES, label the expert and its tokens."""

    lane: int
    kind: Kind
    start_us: float
    end_us: float
    label: str


@dataclass(frozen=True)
class Timeline:
    """A layer's bars, and its decision; end_us is the makespan."""

    bars: tuple[Bar, ...]
    decision: Decision

    @property
    def end_us(self) -> float:
        """When the layer is done."""
        return self.decision.makespan_us


def timeline(counts: npt.NDArray[np.int32], resident: npt.NDArray[np.bool_], latencies: Latencies) -> Timeline:
    """The decision for a layer with counts [experts], laid out as docs/design.md has it (dispatch)."""
    decision = choose(counts, resident, latencies)
    c, g = look_up(latencies.cpu_us, counts), look_up(latencies.gpu_us, counts)
    bars: list[Bar] = []

    def ordered(strategy: int) -> list[int]:
        chosen = np.flatnonzero(decision.strategy == strategy)
        return [int(e) for e in chosen[np.argsort(-counts[chosen], kind="stable")]]

    copies = [(expert, 1.0) for expert in ordered(STREAMED)]
    if decision.split is not None:
        copies.append((decision.split[0], decision.split[1] / latencies.rows))
    at_home = ordered(RESIDENT)
    if copies or at_home:
        now = copied = latencies.gpu_overhead_us
        bars.append(Bar(1, "entry", 0.0, now, ""))
        for expert in at_home:
            bars.append(Bar(1, "resident", now, now + float(g[expert]), _label(expert, counts)))
            now += float(g[expert])
        for expert, share in copies:
            bars.append(Bar(0, "copy", copied, copied + share * latencies.stream_us, _label(expert, counts)))
            copied += share * latencies.stream_us
            now = max(now, copied)
            bars.append(Bar(1, "streamed", now, now + float(g[expert]), _label(expert, counts)))
            now += float(g[expert])

    here = [(expert, 1.0) for expert in ordered(CPU)]
    if decision.split is not None:
        here.append((decision.split[0], 1.0 - decision.split[1] / latencies.rows))
    if here:
        now = latencies.cpu_overhead_us
        bars.append(Bar(2, "entry", 0.0, now, ""))
        slow = 1.0 + latencies.contention * bool(copies)
        for expert, share in here:
            length = slow * share * float(c[expert])
            bars.append(Bar(2, "cpu", now, now + length, _label(expert, counts)))
            now += length
    return Timeline(tuple(bars), decision)


def _label(expert: int, counts: npt.NDArray[np.int32]) -> str:
    return f"{expert}: {counts[expert]}"
