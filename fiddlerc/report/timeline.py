"""Decisions as a timeline, of a layer or a whole step: what the copy engine, the accelerator and the CPU do when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import CPU, RESIDENT, STREAMED, Latencies, choose, look_up

LANES = ("copies", "accelerator", "CPU")
COPIES_LANE, ACCELERATOR_LANE, CPU_LANE = range(3)
Kind = Literal["rest", "entry", "copy", "resident", "streamed", "cpu"]


@dataclass(frozen=True)
class Bar:
    """Something that a lane does: lane is an index of LANES, label the expert and its tokens.

    rest: attention and all else of a decoder layer that is not a routed expert.
    """

    lane: int
    kind: Kind
    start_us: float
    end_us: float
    label: str


@dataclass(frozen=True)
class Timeline:
    """What the lanes do, lane by lane and layer by layer in order of time; end_us: when all of it is done."""

    bars: tuple[Bar, ...]
    end_us: float


def step_timeline(
    counts: npt.NDArray[np.int32],
    resident: npt.NDArray[np.bool_],
    latencies: Latencies,
    moe: Sequence[bool],
    rest_us: float,
    rest_lane: int,
) -> Timeline:
    """A whole step: decoder layers one after another, each the rest of it and then, where it has experts, its decision.

    counts, resident  [MoE layers, experts];  moe: of every decoder layer, whether it has experts
    rest_us           the rest of the step, in equal parts; rest_lane: where it runs
    """
    bars: list[Bar] = []
    now, row = 0.0, 0
    for layer, has_experts in enumerate(moe):
        start, now = now, now + rest_us / len(moe)
        bars.append(Bar(rest_lane, "rest", start, now, str(layer)))
        if has_experts:
            part = layer_timeline(counts[row], resident[row], latencies)
            bars += [replace(bar, start_us=now + bar.start_us, end_us=now + bar.end_us) for bar in part.bars]
            now, row = now + part.end_us, row + 1
    return Timeline(tuple(bars), now)


def layer_timeline(counts: npt.NDArray[np.int32], resident: npt.NDArray[np.bool_], latencies: Latencies) -> Timeline:
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
        bars.append(Bar(ACCELERATOR_LANE, "entry", 0.0, now, ""))
        for expert in at_home:
            bars.append(Bar(ACCELERATOR_LANE, "resident", now, now + float(g[expert]), _label(expert, counts)))
            now += float(g[expert])
        for expert, share in copies:
            bars.append(Bar(COPIES_LANE, "copy", copied, copied + share * latencies.stream_us, _label(expert, counts)))
            copied += share * latencies.stream_us
            now = max(now, copied)
            bars.append(Bar(ACCELERATOR_LANE, "streamed", now, now + float(g[expert]), _label(expert, counts)))
            now += float(g[expert])

    here = [(expert, 1.0) for expert in ordered(CPU)]
    if decision.split is not None:
        here.append((decision.split[0], 1.0 - decision.split[1] / latencies.rows))
    if here:
        now = latencies.cpu_overhead_us
        bars.append(Bar(CPU_LANE, "entry", 0.0, now, ""))
        slow = 1.0 + latencies.contention * bool(copies)
        for expert, share in here:
            length = slow * share * float(c[expert])
            bars.append(Bar(CPU_LANE, "cpu", now, now + length, _label(expert, counts)))
            now += length
    return Timeline(tuple(bars), decision.makespan_us)


def _label(expert: int, counts: npt.NDArray[np.int32]) -> str:
    return f"{expert}: {counts[expert]}"
