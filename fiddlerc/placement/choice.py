"""Which experts live on the accelerator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import Latencies
from fiddler_runtime.progress import Progress

from ..ir import MemoryBudget, ModelSpec, Objective, Placement, PlacementSummary, Scenario, Steps
from .cost import Bools, Cost, Floats, make_cost

EXHAUSTIVE_EXPERTS = 8
"""Up to so many experts a layer, every set of them is tried."""

_SWAPS = 4  # of the experts nearest to the border on either side, in larger layers
_DIGITS = 6


def place(
    spec: ModelSpec,
    latencies: Latencies,
    steps: Mapping[Scenario, Steps] | None,
    popularity: Floats,
    budget: MemoryBudget,
    objective: Objective,
    basis: str,
    *,
    progress: Progress | None = None,
) -> Placement:
    """The experts that make the objective's steps shortest, as many as the budget has room for.

    steps       what the time is taken on; None where nothing is known of any text: then popularity decides
    popularity  float64 [layers, experts], rows sum to 1
    basis       where the popularity comes from, for people

    Placement by popularity is also what the choice is held against, on steps that it was not made from: it is kept
    where it is no worse there. hit_rate is the share of choices that find their expert resident, if they are made as
    `popularity` says.
    """
    layers, experts = len(spec.moe_layers), spec.num_experts
    assert popularity.shape == (layers, experts), "popularity is of another model"
    popular = by_popularity(popularity, budget.resident_experts)
    resident = popular
    method: Literal["expected time", "popularity"] = "popularity"
    relative: dict[str, float] = {}
    if steps is not None and 0 < budget.resident_experts < layers * experts:
        fitted = make_cost(steps, objective, latencies, popular, heldout=False)
        placed = by_time(fitted, popularity, budget.resident_experts, progress=progress)
        heldout = make_cost(steps, objective, latencies, popular, heldout=True)
        others = {
            "placed": placed,
            "popularity": popular,
            "random": at_random(popularity.shape, budget.resident_experts),
            "worst": by_popularity(-popularity, budget.resident_experts),
        }
        relative = {name: _rounded(heldout.of_placement(other)) for name, other in others.items()}
        if relative["placed"] < 1.0:
            resident, method = placed, "expected time"
        else:
            relative["placed"] = 1.0
    chosen = int(resident.sum())
    # fsum rounds once: numpy's sum depends on the CPU's vector width in the last bit, and a plan's bytes must not.
    hits = math.fsum(popularity[resident].tolist()) / layers
    summary = PlacementSummary(
        basis=basis,
        method=method,
        resident_experts=chosen,
        total_experts=layers * experts,
        hit_rate=min(1.0, hits),
        random_hit_rate=chosen / (layers * experts),
        relative_time=relative,
    )
    return Placement(resident, popularity, summary)


def by_popularity(popularity: Floats, count: int) -> Bools:
    """The `count` most popular experts of all layers together, bool [layers, experts].

    Every layer makes equally many choices, so shares compare across layers, and this choice maximises the hit rate.
    Equally popular experts are spread over the layers: a layer without residents leaves the accelerator idle until a
    copy arrives.
    """
    layers, experts = popularity.shape
    # An expert's rank counts its peers in the layer that come first. Ties are decided by it, then by the layer: one
    # expert of each layer, then the next one of each.
    ranks = np.argsort(np.argsort(-popularity, axis=1, kind="stable"), axis=1, kind="stable")
    layer_of = np.repeat(np.arange(layers), experts)
    resident = np.zeros((layers, experts), np.bool_)
    resident.reshape(-1)[np.lexsort((layer_of, ranks.ravel(), -popularity.ravel()))[:count]] = True
    return resident


def at_random(shape: tuple[int, ...], count: int) -> Bools:
    """`count` experts, always the same."""
    resident = np.zeros(shape, np.bool_)
    resident.reshape(-1)[np.random.Generator(np.random.PCG64(0)).permutation(resident.size)[:count]] = True
    return resident


def by_time(cost: Cost, popularity: Floats, count: int, *, progress: Progress | None = None) -> Bools:
    """The placement of `count` experts of least cost, bool [layers, experts].

    Layers share nothing but the budget. So for every layer the best set of each size is found first, over all sets
    where there are few experts, else along several orders; then how many residents each layer gets, exactly, by dynamic
    programming; in large layers exchanges follow.
    """
    layers, experts = popularity.shape
    best = np.empty((layers, experts + 1, experts), np.bool_)
    costs = np.empty((layers, experts + 1))
    for layer in range(layers):
        if progress is not None:
            progress("placing experts", layer, layers)
        best[layer], costs[layer] = (
            _all_sets(cost, layer, experts)
            if experts <= EXHAUSTIVE_EXPERTS
            else _ordered_sets(cost, layer, popularity[layer])
        )
    sizes = allocate(costs, count)
    if experts > EXHAUSTIVE_EXPERTS:
        # Where the layers' shares may end up, exchanges; then the shares again.
        for layer, size in enumerate(sizes.tolist()):
            for near in range(max(0, size - 1), min(experts, size + 1) + 1):
                best[layer, near], costs[layer, near] = _exchange(cost, layer, best[layer, near], popularity[layer])
        sizes = allocate(costs, count)
    if progress is not None:
        progress("placing experts", layers, layers)
    chosen: Bools = best[np.arange(layers), sizes]
    return chosen


def allocate(costs: Floats, count: int) -> npt.NDArray[np.int64]:
    """How many residents each layer gets, int64 [layers], `count` in all: the least total of costs [layers, size]."""
    layers, sizes = costs.shape
    total = np.zeros(1)  # by residents used so far
    taken = []
    for row in costs:
        wide = np.full((min(len(total) + sizes - 1, count + 1), sizes), np.inf)
        for size in range(sizes):
            room = min(len(total), len(wide) - size)
            if room > 0:
                wide[size : size + room, size] = total[:room] + row[size]
        choice = wide.argmin(axis=1)
        taken.append(choice)
        total = wide[np.arange(len(wide)), choice]
    result = np.zeros(layers, np.int64)
    for layer in range(layers - 1, -1, -1):
        result[layer] = taken[layer][count]
        count -= int(result[layer])
    return result


def _all_sets(cost: Cost, layer: int, experts: int) -> tuple[Bools, Floats]:
    """The best set of every size, bool [experts + 1, experts], and its cost [experts + 1]."""
    sets = (np.arange(1 << experts)[:, None] >> np.arange(experts)) & 1 == 1
    costs = cost.of_layer(layer, sets)
    size = sets.sum(axis=1)
    best = [int(np.where(size == n, costs, np.inf).argmin()) for n in range(experts + 1)]
    return sets[best], costs[best]


def _ordered_sets(cost: Cost, layer: int, popularity: Floats) -> tuple[Bools, Floats]:
    """As `_all_sets`, of the sets that each of several orders begins with: popularity, and tokens in each scenario."""
    experts = len(popularity)
    orders = [popularity, *(part.counts[:, layer].sum(axis=0) for part in cost.parts)]
    sets = np.concatenate([_beginnings(order) for order in orders])
    costs = cost.of_layer(layer, sets).reshape(len(orders), experts + 1)
    which = costs.argmin(axis=0)
    size = np.arange(experts + 1)
    return sets.reshape(len(orders), experts + 1, experts)[which, size], costs[which, size]


def _beginnings(order: npt.NDArray[np.integer] | Floats) -> Bools:
    """The first 0, 1, ... experts by descending `order`: bool [experts + 1, experts]."""
    ranks = np.argsort(np.argsort(-order, kind="stable"), kind="stable")
    sets: Bools = ranks < np.arange(len(ranks) + 1)[:, None]
    return sets


def _exchange(cost: Cost, layer: int, resident: Bools, popularity: Floats) -> tuple[Bools, float]:
    """Swaps one expert for another while that helps, among the least popular residents and the most popular others.

    Returns the set and its cost.
    """
    ranked = np.argsort(-popularity, kind="stable")
    current = float(cost.of_layer(layer, resident[None])[0])
    while True:
        inside = ranked[resident[ranked]][-_SWAPS:]
        outside = ranked[~resident[ranked]][:_SWAPS]
        if not len(inside) or not len(outside):
            return resident, current
        tried = np.repeat(resident[None], len(inside) * len(outside), axis=0)
        pairs = np.array([(a, b) for a in inside for b in outside])
        tried[np.arange(len(pairs)), pairs[:, 0]] = False
        tried[np.arange(len(pairs)), pairs[:, 1]] = True
        costs = cost.of_layer(layer, tried)
        best = int(costs.argmin())
        if not costs[best] < current * (1 - 1e-9):
            return resident, current
        resident, current = tried[best], float(costs[best])


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
