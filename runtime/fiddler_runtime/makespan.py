"""The mathematics of dispatch, readable: docs/design.md, dispatch.

The compiler decides with it, and the native dispatcher (templates/include/fiddler/dispatch.hpp) is tested against it.
numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from .plan import Tables

IDLE, RESIDENT, STREAMED, CPU = 0, 1, 2, 3
"""Strategies, as enum fdl_strategy in templates/include/fiddler/abi.h."""

Strategy = Literal["resident", "streamed", "cpu"]
ALL: tuple[Strategy, ...] = get_args(Strategy)

DENSE_TOKENS = 16384
"""Beyond so many tokens for one expert the tables' last line is continued instead of looked up."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Latencies:
    """What a decision depends on, in microseconds.

    cpu_us, gpu_us  float32 [n]: one expert with 0 .. n-1 tokens; beyond, the line through the last two entries
    cpu_overhead_us c0, gpu_overhead_us g0: entering a lane once per layer;  stream_us w: copying one expert
    contention      gamma: relative slow-down of the CPU lane while copies run
    """

    cpu_us: npt.NDArray[np.float32]
    gpu_us: npt.NDArray[np.float32]
    cpu_overhead_us: float
    gpu_overhead_us: float
    stream_us: float
    contention: float


@dataclass(frozen=True)
class Decision:
    """What one layer does in one step: strategy uint8 [experts], and what each lane is predicted to take."""

    strategy: npt.NDArray[np.uint8]
    streamed: int
    cpu_us: float
    accelerator_us: float

    @property
    def makespan_us(self) -> float:
        """The layer is done when both lanes are."""
        return max(self.cpu_us, self.accelerator_us)


def dense(tables: Tables) -> Latencies:
    """A plan's grid, filled in by straight lines: one entry per token count, up to the grid's end or DENSE_TOKENS."""
    tokens = np.arange(min(int(tables.tokens[-1]), DENSE_TOKENS) + 1)
    grid = tables.tokens.astype(np.float64)
    c0, g0, w = (float(value) for value in tables.scalars_us)
    return Latencies(
        cpu_us=np.interp(tokens, grid, tables.cpu_us.astype(np.float64)).astype(np.float32),
        gpu_us=np.interp(tokens, grid, tables.gpu_us.astype(np.float64)).astype(np.float32),
        cpu_overhead_us=c0,
        gpu_overhead_us=g0,
        stream_us=w,
        contention=float(tables.contention[0]),
    )


def look_up(table: npt.NDArray[np.float32], counts: npt.NDArray[np.integer]) -> Floats:
    """table[count], or beyond its end the line through its last two entries."""
    values = table.astype(np.float64)
    last = len(values) - 1
    slope = values[-1] - values[-2] if last > 0 else 0.0
    beyond = np.maximum(counts.astype(np.int64) - last, 0)
    found: Floats = values[np.minimum(counts, last)] + slope * beyond
    return found


def choose(
    counts: npt.NDArray[np.integer],
    resident: npt.NDArray[np.bool_] | npt.NDArray[np.uint8],
    latencies: Latencies,
    allow: Sequence[Strategy] = ALL,
) -> Decision:
    """The decision for one layer: which of the misses to stream so that the layer is done soonest.

    counts    tokens per expert [experts]; resident [experts], true where the expert lives on the accelerator
    allow     strategies to choose from: without "resident", residents count as misses; without "streamed" all misses
              run on the CPU, without "cpu" all are streamed

    The misses are sorted by tokens, most first (ties: lower index first), and the first k are streamed; k is the
    smallest of those that make max(C, P) least:

        C(k) = c0 + (1 + gamma [k > 0]) * sum of c over the other misses     (0 if there are none)
        P(k) = g0 + max(G + sum_i g_i, max_j (j w + sum_{i >= j} g_i))       (0 if the accelerator has nothing to do)

    with G the residents' work, and i, j over the streamed ones in order: each copy follows the one before, each expert
    follows its copy, and residents go first.
    Raises ValueError if there is a miss that no allowed strategy can take.
    """
    active = counts > 0
    at_home = active & (resident != 0) if "resident" in allow else np.zeros_like(active)
    misses = np.flatnonzero(active & ~at_home)
    if len(misses) and "streamed" not in allow and "cpu" not in allow:
        raise ValueError(f"experts {misses.tolist()} are not resident, and nothing else is allowed")
    misses = misses[np.argsort(-counts[misses].astype(np.int64), kind="stable")]
    c = look_up(latencies.cpu_us, counts[misses])
    g = look_up(latencies.gpu_us, counts[misses])
    resident_us = float(look_up(latencies.gpu_us, counts[at_home]).sum())

    fewest = 0 if "cpu" in allow else len(misses)
    most = len(misses) if "streamed" in allow else 0
    best: tuple[float, int, float, float] | None = None
    for k in range(fewest, most + 1):
        cpu_us = accelerator_us = 0.0
        if k < len(misses):
            cpu_us = latencies.cpu_overhead_us + (1.0 + latencies.contention * (k > 0)) * float(c[k:].sum())
        if k > 0 or at_home.any():
            work = resident_us + float(g[:k].sum())
            accelerator_us = latencies.gpu_overhead_us + max(work, _last_arrival(g[:k], latencies.stream_us))
        span = max(cpu_us, accelerator_us)
        if best is None or span < best[0]:
            best = (span, k, cpu_us, accelerator_us)
    assert best is not None
    _, streamed, cpu_us, accelerator_us = best

    strategy = np.full(len(counts), IDLE, np.uint8)
    strategy[at_home] = RESIDENT
    strategy[misses[:streamed]] = STREAMED
    strategy[misses[streamed:]] = CPU
    return Decision(strategy, streamed, cpu_us, accelerator_us)


def _last_arrival(g: Floats, stream_us: float) -> float:
    """max over j of (j w + sum_{i >= j} g_i), j from 1: some copy is the last one that the computing waits for."""
    if not len(g):
        return 0.0
    still_to_run = np.cumsum(g[::-1])[::-1]
    return float((stream_us * np.arange(1, len(g) + 1) + still_to_run).max())
