"""The mathematics of dispatch, readable: docs/design.md, dispatch.

The compiler decides with it, and the native dispatcher (templates/include/fiddler/dispatch.hpp) is tested against it.
numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from .plan import Tables

IDLE, RESIDENT, STREAMED, CPU, SPLIT = 0, 1, 2, 3, 4
"""Strategies, as enum fdl_strategy in templates/include/fiddler/abi.h."""

Strategy = Literal["resident", "streamed", "cpu"]
ALL: tuple[Strategy, ...] = get_args(Strategy)

DENSE_TOKENS = 16384
"""Beyond so many tokens for one expert the tables' last line is continued instead of looked up."""

BLOCK_ROWS = 64
"""An expert is split between whole blocks of so many intermediate rows."""

EXACT_MISSES = 12
"""Up to so many misses every subset is tried."""

TOP_MISSES = 6
"""Beyond, every subset of so many misses with most tokens, each with every prefix and every suffix of the others."""

# Longer than anything, yet a thousand of them still fit a float: what is not allowed is priced so that it never pays.
_NEVER_US = 1e30
_CHUNK = 1 << 22  # numbers in a temporary array: 32 MB

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Latencies:
    """What a decision depends on, in microseconds.

    cpu_us, gpu_us  float32 [n]: one expert with 0 .. n-1 tokens; beyond, the line through the last two entries
    cpu_overhead_us c0, gpu_overhead_us g0: entering a lane once per layer;  stream_us w: copying one expert
    contention      gamma: relative slow-down of the CPU lane while copies run
    rows            intermediate rows of an expert where one of a layer may be split between the lanes; 0: none is
    """

    cpu_us: npt.NDArray[np.float32]
    gpu_us: npt.NDArray[np.float32]
    cpu_overhead_us: float
    gpu_overhead_us: float
    stream_us: float
    contention: float
    rows: int = 0


@dataclass(frozen=True)
class Decision:
    """What one layer does in one step: strategy uint8 [experts], and what each lane is predicted to take.

    streamed  experts that are copied whole
    split     (expert, rows): the first `rows` intermediate rows of that expert are streamed, the others stay on the CPU
    """

    strategy: npt.NDArray[np.uint8]
    streamed: int
    split: tuple[int, int] | None
    cpu_us: float
    accelerator_us: float

    @property
    def makespan_us(self) -> float:
        """The layer is done when both lanes are."""
        return max(self.cpu_us, self.accelerator_us)


@dataclass(frozen=True)
class Spans:
    """Predicted lane times of many layers: cpu_us, accelerator_us float64 [b]; streamed int64 [b], experts copied."""

    cpu_us: Floats
    accelerator_us: Floats
    streamed: Ints

    @property
    def makespan_us(self) -> Floats:
        """A layer is done when both lanes are, float64 [b]."""
        return np.maximum(self.cpu_us, self.accelerator_us)


def dense(tables: Tables, regime: int | None = None, rows: int = 0) -> Latencies:
    """A plan's grid, filled in by straight lines: one entry per token count, up to the grid's end or DENSE_TOKENS.

    regime  row of tables.cpu_us; default the one that was seen most
    rows    see Latencies
    """
    prevailing = int(np.argmax(tables.regime_shares))
    c0, g0, w = (float(value) for value in tables.scalars_us)
    return Latencies(
        cpu_us=dense_curve(tables.tokens, tables.cpu_us[prevailing if regime is None else regime]),
        gpu_us=dense_curve(tables.tokens, tables.gpu_us),
        cpu_overhead_us=c0,
        gpu_overhead_us=g0,
        stream_us=w,
        contention=float(tables.contention[0]),
        rows=rows,
    )


def dense_curve(grid: npt.NDArray[np.integer], curve: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """A curve on a grid of token counts, float32 for every count up to the grid's end or DENSE_TOKENS."""
    tokens = np.arange(min(int(grid[-1]), DENSE_TOKENS) + 1)
    return np.interp(tokens, grid.astype(np.float64), curve.astype(np.float64)).astype(np.float32)


def look_up(table: npt.NDArray[np.float32], counts: npt.NDArray[np.integer]) -> Floats:
    """table[count], or beyond its end the line through its last two entries."""
    values = table.astype(np.float64)
    last = len(values) - 1
    slope = values[-1] - values[-2] if last > 0 else 0.0
    beyond = np.maximum(counts.astype(np.int64) - last, 0)
    found: Floats = values[np.minimum(counts, last)] + slope * beyond
    return found


def priced(latencies: Latencies, allow: Sequence[str]) -> Latencies:
    """The same latencies, with what is not allowed at a price that is never the least."""
    cpu_us, stream_us = latencies.cpu_us, latencies.stream_us
    if "cpu" not in allow:
        cpu_us = np.where(np.arange(len(cpu_us)) > 0, np.float32(_NEVER_US), np.float32(0))
    if "streamed" not in allow:
        stream_us = _NEVER_US
    return replace(latencies, cpu_us=cpu_us, stream_us=stream_us)


def choose(
    counts: npt.NDArray[np.integer],
    resident: npt.NDArray[np.integer] | npt.NDArray[np.bool_],
    latencies: Latencies,
    allow: Sequence[Strategy] = ALL,
) -> Decision:
    """The decision for one layer: docs/design.md, dispatch.

    counts    integer [experts], tokens per expert;  resident  [experts], nonzero where it is on the accelerator
    allow     strategies to choose from: without "resident" no expert counts as resident, without "streamed" all misses
              run on the CPU, without "cpu" all are streamed
    Of equally fast choices that with the fewest copies. Raises ValueError for a miss that nothing allowed takes.
    """
    counts = np.asarray(counts)
    active = counts > 0
    at_home = active & (np.asarray(resident) != 0) if "resident" in allow else np.zeros_like(active)
    misses = np.flatnonzero(active & ~at_home)
    if len(misses) and "streamed" not in allow and "cpu" not in allow:
        raise ValueError(f"experts {misses.tolist()} are not resident, and nothing else is allowed")
    misses = misses[np.argsort(-counts[misses].astype(np.int64), kind="stable")]
    layers = _Layers(counts[None], at_home[None], priced(latencies, allow), TOP_MISSES)
    ((_, choice),) = layers.solve()

    strategy = np.full(len(counts), IDLE, np.uint8)
    strategy[at_home] = RESIDENT
    whole = choice.ranks(0, len(misses))
    strategy[misses] = np.where(whole, STREAMED, CPU)
    split = None
    if choice.split_rows[0]:
        expert = int(misses[choice.split_rank[0]])
        strategy[expert], split = SPLIT, (expert, int(choice.split_rows[0]))
    return Decision(strategy, int(whole.sum()), split, float(choice.cpu_us[0]), float(choice.accelerator_us[0]))


def makespans(
    counts: npt.NDArray[np.integer],
    resident: npt.NDArray[np.integer] | npt.NDArray[np.bool_],
    latencies: Latencies,
    *,
    top: int = TOP_MISSES,
) -> Spans:
    """As `choose`, for many layers at once: counts [b, experts], resident [b, experts] or [experts].

    top  less than TOP_MISSES looks at fewer candidates where there are many misses: faster, and rarely worse
    """
    active = counts > 0
    layers = _Layers(counts, active & (np.broadcast_to(resident, counts.shape) != 0), latencies, top)
    spans = Spans(np.zeros(len(counts)), np.zeros(len(counts)), np.zeros(len(counts), np.int64))
    for rows, choice in layers.solve():
        spans.cpu_us[rows] = choice.cpu_us
        spans.accelerator_us[rows] = choice.accelerator_us
        spans.streamed[rows] = choice.streamed
    return spans


@dataclass(frozen=True)
class _Choice:
    """The best of b layers that have equally many misses, by rank: misses sorted by tokens, most first. Arrays [b].

    Streamed are the ranks of the bits of `mask`, and the ranks from `first` up to before `last`; `split_rank` too, its
    first split_rows rows (0: none is split).
    """

    cpu_us: Floats
    accelerator_us: Floats
    streamed: Ints
    mask: Ints
    first: Ints
    last: Ints
    split_rank: Ints
    split_rows: Ints

    def ranks(self, layer: int, misses: int) -> npt.NDArray[np.bool_]:
        """Which ranks are streamed whole."""
        rank = np.arange(misses)
        in_mask = (int(self.mask[layer]) >> np.minimum(rank, 62)) & 1 == 1
        within = (rank >= self.first[layer]) & (rank < self.last[layer])
        chosen: npt.NDArray[np.bool_] = in_mask | within
        return chosen

    def better(self, other: _Choice) -> _Choice:
        """Layer by layer the faster one, of equals that with fewer copies, else this one."""
        mine, theirs = (np.maximum(choice.cpu_us, choice.accelerator_us) for choice in (self, other))
        wins = (theirs < mine) | ((theirs == mine) & (other.streamed < self.streamed))
        pairs = ((getattr(other, f.name), getattr(self, f.name)) for f in fields(self))
        return _Choice(*(np.where(wins, theirs, mine) for theirs, mine in pairs))


class _Layers:
    """Layers to decide: counts [b, experts], at_home bool [b, experts], the active experts on the accelerator."""

    def __init__(
        self, counts: npt.NDArray[np.integer], at_home: npt.NDArray[np.bool_], latencies: Latencies, top: int
    ) -> None:
        self._latencies = latencies
        self._top = top
        self._at_home = np.asarray(at_home.any(axis=1))
        self._resident_us = np.where(at_home, look_up(latencies.gpu_us, counts), 0.0).sum(axis=1)
        missing = np.where(at_home, 0, counts).astype(np.int64)
        self._sorted = -np.sort(-missing, axis=1)
        self._misses = (self._sorted > 0).sum(axis=1)

    def solve(self) -> Iterator[tuple[Ints, _Choice]]:
        """(layers, their choices) for all layers, those with equally many misses together."""
        for misses in np.unique(self._misses).tolist():
            top = misses if misses <= EXACT_MISSES else self._top
            layers = np.flatnonzero(self._misses == misses)
            step = max(1, _CHUNK // ((1 << top) * (misses - top + 1)))
            for begin in range(0, len(layers), step):
                part = layers[begin : begin + step]
                yield part, self._solve(part, misses, top)

    def _solve(self, layers: Ints, misses: int, top: int) -> _Choice:
        counts = self._sorted[layers, :misses]
        c = look_up(self._latencies.cpu_us, counts)
        g = look_up(self._latencies.gpu_us, counts)
        problem = _Problem(c, g, self._resident_us[layers], self._at_home[layers], self._latencies)
        best = problem.nothing_streamed()
        if misses:
            best = best.better(problem.subsets(top, suffix=False))
            if misses > top:
                best = best.better(problem.subsets(top, suffix=True))
            if self._latencies.rows > BLOCK_ROWS:
                best = best.better(problem.one_split())
        return best


class _Problem:
    """b layers with m misses each: c, g [b, m] by rank; resident_us [b]; at_home bool [b]."""

    def __init__(
        self, c: Floats, g: Floats, resident_us: Floats, at_home: npt.NDArray[np.bool_], latencies: Latencies
    ) -> None:
        self.c, self.g, self.resident_us, self.at_home, self.latencies = c, g, resident_us, at_home, latencies
        self.layers, self.misses = c.shape
        self.none = np.zeros(self.layers, np.int64)

    def nothing_streamed(self) -> _Choice:
        """All misses on the CPU, with no copies to slow it down."""
        lat = self.latencies
        cpu = lat.cpu_overhead_us + _from_last(self.c)[:, 0] if self.misses else np.zeros(self.layers)
        accelerator = np.where(self.at_home, lat.gpu_overhead_us + self.resident_us, 0.0)
        return _Choice(cpu, accelerator, *[self.none] * 6)

    def subsets(self, top: int, *, suffix: bool) -> _Choice:
        """Every subset of the first `top` ranks, with every prefix (or suffix) of the others; something is streamed."""
        c, g, w = self.c, self.g, self.latencies.stream_us
        finish = self.resident_us[:, None]  # [b, 2^top]: when the last of a subset is done, in order of rank
        cpu = np.zeros((self.layers, 1))  # [b, 2^top]: the CPU's time for a subset
        copies = np.zeros(1)
        for rank in range(top):
            copies = np.concatenate([copies, copies + 1])
            half = len(copies) // 2
            finish = np.concatenate([finish, np.maximum(finish, copies[half:] * w) + g[:, rank, None]], axis=1)
            cpu = np.concatenate([cpu, cpu + c[:, rank, None]], axis=1)
        cpu = cpu[:, ::-1]  # of what a subset leaves

        # The other ranks, k of them streamed: [b, k]. Together they add `work`; if one of their copies is the last that
        # the computing waits for, they are done `wait` after the subset's copies.
        rest = self.misses - top
        if suffix:
            work = np.concatenate([np.zeros((self.layers, 1)), np.cumsum(g[:, top:][:, ::-1], axis=1)], axis=1)
            left = np.concatenate([np.zeros((self.layers, 1)), np.cumsum(c[:, top:], axis=1)], axis=1)[:, ::-1]
            # i-th of all the others, then what is computed from it on; the suffix of k begins after rest - k of them.
            late = np.arange(1, rest + 1) * w + work[:, :0:-1]
            wait = np.maximum.accumulate(late[:, ::-1], axis=1) - np.arange(rest - 1, -1, -1) * w
        else:
            work = np.concatenate([np.zeros((self.layers, 1)), np.cumsum(g[:, top:], axis=1)], axis=1)
            left = _from_last(c[:, top:])
            wait = np.maximum.accumulate(np.arange(1, rest + 1) * w - work[:, :-1], axis=1) + work[:, 1:]
        wait = np.concatenate([np.full((self.layers, 1), -np.inf), wait], axis=1)

        streamed = copies[:, None] + np.arange(rest + 1)
        done = np.maximum(finish[:, :, None] + work[:, None], copies[:, None] * w + wait[:, None])
        accelerator = self.latencies.gpu_overhead_us + done
        slow = 1.0 + self.latencies.contention
        cpu_us = self.latencies.cpu_overhead_us + slow * (cpu[:, :, None] + left[:, None])
        cpu_us[:, -1, rest] = 0.0
        span = np.maximum(cpu_us, accelerator).reshape(self.layers, -1)
        span[:, 0] = np.inf  # nothing streamed is another candidate
        # The least; of equals that with the fewest copies.
        flat = streamed.reshape(-1)
        least = np.where(span == span.min(axis=1, keepdims=True), flat, np.inf).argmin(axis=1)
        mask, k = np.divmod(least, rest + 1)
        layer = np.arange(self.layers)
        return _Choice(
            cpu_us.reshape(self.layers, -1)[layer, least],
            accelerator.reshape(self.layers, -1)[layer, least],
            flat[least].astype(np.int64),
            mask,
            self.misses - k if suffix else self.none + top,
            self.none + self.misses if suffix else top + k,
            self.none,
            self.none,
        )

    def one_split(self) -> _Choice:
        """The first k ranks whole, and of the next one some blocks, copied last.

        The split expert takes the accelerator as long as a whole one (launches do not shrink), the CPU and the copy in
        proportion to its rows. Ordered by k, then by blocks, the CPU's time falls and the accelerator's grows: the best
        is where they cross.
        """
        lat, m, layer = self.latencies, self.misses, np.arange(self.layers)
        blocks = -(-lat.rows // BLOCK_ROWS)
        finish = np.empty((self.layers, m + 1))
        finish[:, 0] = self.resident_us
        for k in range(m):
            finish[:, k + 1] = np.maximum(finish[:, k], (k + 1) * lat.stream_us) + self.g[:, k]
        left = _from_last(self.c)

        def lanes(at: Ints) -> tuple[Floats, Floats]:
            k, block = np.divmod(at, blocks)
            share = block * BLOCK_ROWS / lat.rows
            rank = np.minimum(k, m - 1)
            part = np.where(k < m, (1.0 - share) * self.c[layer, rank], 0.0)
            cpu = lat.cpu_overhead_us + (1.0 + lat.contention) * (left[layer, np.minimum(k + 1, m)] + part)
            split = np.maximum(finish[layer, k], (k + share) * lat.stream_us) + self.g[layer, rank]
            return np.where(k < m, cpu, 0.0), lat.gpu_overhead_us + np.where(block > 0, split, finish[layer, k])

        low, high = self.none + 1, self.none + m * blocks  # the first that crosses is in [low, high]
        while (low < high).any():
            middle = (low + high) // 2
            cpu, accelerator = lanes(middle)
            crossed = cpu <= accelerator
            low, high = np.where(crossed, low, np.minimum(middle + 1, high)), np.where(crossed, middle, high)
        best = self._at(lanes, np.maximum(low - 1, 1), blocks)
        return best.better(self._at(lanes, low, blocks))

    def _at(self, lanes: Callable[[Ints], tuple[Floats, Floats]], at: Ints, blocks: int) -> _Choice:
        k, block = np.divmod(at, blocks)
        # A split is one more copy than the whole ones.
        return _Choice(*lanes(at), k + (block > 0), self.none, self.none, k, k, block * BLOCK_ROWS)


def _from_last(values: Floats) -> Floats:
    """[b, m + 1]: sums over ranks k, k + 1, ..., added from the last on."""
    sums = np.cumsum(values[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([sums, np.zeros((len(values), 1))], axis=1)
