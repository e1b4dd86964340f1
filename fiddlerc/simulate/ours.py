"""Our own strategy: docs/design.md, dispatch; with split experts and prefetch where the plan has them on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import makespans

from ..ir import Steps
from .policy import Ints, StepTimes, Strategy, hits
from .setting import Floats, Setting


@dataclass(frozen=True)
class Ours(Strategy):
    """The exact choice of every layer between the three places, lanes side by side."""

    name: str = "ours"
    needs_accelerator: bool = False

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        experts, lent = experts_us(steps, setting)
        return StepTimes(setting.rest_us(steps.tokens, steps.kv) + experts, hits(steps.counts, setting.resident) + lent)


def experts_us(steps: Steps, setting: Setting) -> tuple[Floats, Ints]:
    """The MoE layers of each step, float64 [steps], and how many choices found a prefetched expert, int64 [steps].

    Prefetch: each layer's copy engine brings, after its own copies, the expert off the accelerator that this layer's
    tokens make most likely in the next (none in the first layer). The copy has this layer's remaining time and the next
    one's attention to finish; what is left delays the next layer's accelerator where that waits for a copy. It slows
    the CPU lane as any copy does. A wrong guess costs the same and brings nothing.
    """
    lat, count = setting.latencies, len(steps.tokens)
    attention = setting.rest_us(steps.tokens, steps.kv) / setting.spec.num_layers
    total, lent = np.zeros(count), np.zeros(count, np.int64)
    guess, late = np.full(count, -1), np.zeros(count)
    for layer in range(setting.layers):
        counts = steps.counts[:, layer]
        resident = np.broadcast_to(setting.resident[layer], counts.shape).copy()
        brought = np.flatnonzero(guess >= 0)
        resident[brought, guess[brought]] = True
        used = np.zeros(count, np.bool_)
        used[brought] = counts[brought, guess[brought]] > 0
        lent[used] += counts[used, guess[used]]

        spans = makespans(counts, resident, lat)
        cpu = spans.cpu_us
        accelerator = spans.accelerator_us + np.where(used | (spans.streamed > 0), late, 0.0)
        guess = _guesses(counts, setting.prefetch, layer, setting.layers)
        copying = guess >= 0
        # Copies so far slow the whole CPU lane already; the prefetch alone slows what runs beside it.
        beside = np.where(copying & (spans.streamed == 0), np.minimum(cpu, lat.stream_us), 0.0)
        span = np.maximum(cpu + lat.contention * beside, accelerator)
        idle = span - late - spans.streamed * lat.stream_us + attention
        late = np.where(copying, np.maximum(0.0, lat.stream_us - np.maximum(idle, 0.0)), 0.0)
        total += span
    return total, lent


def _guesses(
    counts: npt.NDArray[np.int32], prefetch: npt.NDArray[np.int16] | None, layer: int, layers: int
) -> npt.NDArray[np.int64]:
    """For each step the expert of the next layer that most of this layer's choices speak for, or -1: int64 [steps]."""
    if prefetch is None or layer + 1 == layers:
        return np.full(len(counts), -1)
    votes = np.zeros(counts.shape, np.int64)
    for expert, successors in enumerate(prefetch[layer].astype(np.int64)):
        for successor in successors[successors >= 0]:
            votes[:, successor] += counts[:, expert]
    return np.where(votes.any(axis=1), votes.argmax(axis=1), -1)
