"""What a placement costs: the expected time of a step in its MoE layers (docs/design.md, placement)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import Latencies, makespans

from ..ir import SCENARIOS, Objective, Scenario, Steps

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_TOP = 2  # of `makespans`: enough for comparing placements, and several times faster
_MOST_BEAM_STEPS = 64


def scenarios_of(objective: Objective) -> tuple[Scenario, ...]:
    """The scenarios whose time the objective looks at."""
    return SCENARIOS if objective == "balanced" else (objective,)


@dataclass(frozen=True)
class StepCost:
    """Times of one scenario's steps, layer by layer.

    counts   [steps, layers, experts]
    by_hits  for decode, whose counts are all one: the makespan by how many of a token's experts are resident
    Sums are cumulative, in order: the same on every CPU.
    """

    counts: npt.NDArray[np.int32]
    latencies: Latencies
    by_hits: Floats | None

    def of_layer(self, layer: int, sets: Bools) -> Floats:
        """Mean time of the steps in that layer for each of the resident sets, bool [n, experts] -> microseconds [n]."""
        counts = self.counts[:, layer]
        if self.by_hits is not None:
            hits = (counts > 0).astype(np.int32) @ sets.T.astype(np.int32)
            times: Floats = self.by_hits[hits]
        else:
            steps, experts = counts.shape
            every = np.repeat(counts[:, None], len(sets), axis=1).reshape(-1, experts)
            spans = makespans(every, np.tile(sets, (steps, 1)), self.latencies, top=_TOP)
            times = spans.makespan_us.reshape(steps, len(sets))
        mean: Floats = np.cumsum(times, axis=0)[-1] / len(times)
        return mean

    def of_placement(self, resident: Bools) -> float:
        """Mean time of the steps in all layers together, for resident bool [layers, experts]."""
        return float(np.cumsum([self.of_layer(layer, row[None])[0] for layer, row in enumerate(resident)])[-1])


@dataclass(frozen=True)
class Cost:
    """Times of the objective's scenarios together, each relative to what it takes with `reference` placed."""

    parts: Sequence[StepCost]
    scales: Sequence[float]

    def of_layer(self, layer: int, sets: Bools) -> Floats:
        """Relative time of that layer for each of the resident sets, float64 [n]."""
        total = np.zeros(len(sets))
        for part, scale in zip(self.parts, self.scales, strict=True):
            total += scale * part.of_layer(layer, sets)
        return total

    def of_placement(self, resident: Bools) -> float:
        """Relative time of a step: 1 for the reference."""
        return sum(scale * part.of_placement(resident) for part, scale in zip(self.parts, self.scales, strict=True))


def make_cost(
    steps: Mapping[Scenario, Steps], objective: Objective, latencies: Latencies, reference: Bools, *, heldout: bool
) -> Cost:
    """The cost on the steps that are held out, or on the others."""
    parts = []
    for scenario in scenarios_of(objective):
        counts = steps[scenario].counts[steps[scenario].heldout == heldout]
        if scenario == "decode":
            top_k = int(counts[0, 0].sum())
            residents = np.arange(top_k) < np.arange(top_k + 1)[:, None]
            by_hits = makespans(np.ones((top_k + 1, top_k), np.int32), residents, latencies).makespan_us
            parts.append(StepCost(counts, latencies, by_hits))
        else:
            every = max(1, len(counts) // _MOST_BEAM_STEPS)
            parts.append(StepCost(counts[::every], latencies, None))
    # A scenario that takes no time with the reference weighs nothing, rather than infinitely much.
    times = [part.of_placement(reference) for part in parts]
    return Cost(parts, [1.0 / (len(parts) * time) if time > 0 else 0.0 for time in times])
