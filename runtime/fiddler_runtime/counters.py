"""What an engine has done so far, by phase and strategy, and what the plan had predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STRATEGIES = ("resident", "streamed", "cpu", "split")
Pair = Sequence[float]
"""Microseconds of the CPU lane and of the accelerator."""
_CODES = len(STRATEGIES) + 1  # enum fdl_strategy; 0 is idle
_MOST_DECISIONS = 256
"""Different decisions kept apart; a model with many experts has more, and the rare ones are not told."""


@dataclass
class _Lane:
    """Sums over the layers in which a lane had work: its predicted and its actual time."""

    layers: int = 0
    predicted_us: float = 0.0
    actual_us: float = 0.0

    def add(self, predicted_us: float, actual_us: float) -> None:
        self.layers += predicted_us > 0
        self.predicted_us += predicted_us
        self.actual_us += actual_us


class _Lanes:
    """Both."""

    def __init__(self) -> None:
        self.cpu, self.accelerator = _Lane(), _Lane()

    def add(self, predicted_us: Pair, actual_us: Pair) -> None:
        self.cpu.add(predicted_us[0], actual_us[0])
        self.accelerator.add(predicted_us[1], actual_us[1])

    def snapshot(self) -> dict[str, Any]:
        return {"cpu": asdict(self.cpu), "accelerator": asdict(self.accelerator)}


class _Phase:
    """Sums of one phase."""

    def __init__(self) -> None:
        self.layers = 0
        # By enum fdl_strategy.
        self.calls = [0] * _CODES
        self.tokens = np.zeros(_CODES)
        self.lanes = _Lanes()
        self.makespan = {"predicted_us": 0.0, "actual_us": 0.0}
        self.decisions: dict[tuple[int, ...], tuple[int, _Lanes]] = {}


class Counters:
    """Sums since the last reset. Most of plain numbers: numpy takes a microsecond for two of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Sets every sum to zero."""
        self._phases = {phase: _Phase() for phase in PHASES}
        self._layer_us = 0.0
        self.prefetched = 0
        self.prefetch_used = 0

    def add(
        self,
        phase: Phase,
        calls: Sequence[int],
        strategy: npt.NDArray[np.uint8],
        counts: npt.NDArray[np.int32],
        predicted_us: Pair,
        actual_us: Pair,
        layer_us: float,
    ) -> None:
        """Notes a layer.

        calls [5] experts per strategy; strategy, counts [E]; predicted_us, actual_us: CPU lane, accelerator; layer_us:
        the whole layer
        """
        sums = self._phases[phase]
        sums.layers += 1
        sums.calls = [before + more for before, more in zip(sums.calls, calls, strict=True)]
        sums.tokens += np.bincount(strategy, counts, _CODES)
        key = tuple(calls[1:])
        seen, lanes = sums.decisions.get(key, (0, None))
        if lanes is None:
            lanes = _Lanes()
        if seen or len(sums.decisions) < _MOST_DECISIONS:
            sums.decisions[key] = (seen + 1, lanes)
        sums.lanes.add(predicted_us, actual_us)
        lanes.add(predicted_us, actual_us)
        sums.makespan["predicted_us"] += max(predicted_us)
        sums.makespan["actual_us"] += max(actual_us)
        self._layer_us += layer_us

    def snapshot(self) -> dict[str, Any]:
        """The sums as plain values.

        expert_calls, expert_tokens  {strategy: sum}: an expert run for n tokens is 1 call and n tokens
        layers                       MoE layers executed
        lanes                        {"cpu", "accelerator"}: layers in which the lane had work, microseconds that the
                                     plan's tables predicted for it, and that it took (from when it was given its work)
        phases                       the same four for prefill and decode apart; `makespan`: of each layer the lane that
                                     took longest, summed; `decisions`: the three most common, as experts by strategy,
                                     how often, and their lanes
        layer_us                     time in Engine.moe
        prefetched, prefetch_used    experts fetched ahead for the next layer, and those that it then wanted
        """
        every = list(self._phases.values())
        lanes = [phase.lanes.snapshot() for phase in every]
        return {
            "layers": sum(phase.layers for phase in every),
            "expert_calls": _named([sum(calls) for calls in zip(*(phase.calls for phase in every), strict=True)]),
            "expert_tokens": _named(sum((phase.tokens for phase in every), np.zeros(_CODES))),
            "lanes": {
                lane: {name: sum(part[lane][name] for part in lanes) for name in sums}
                for lane, sums in lanes[0].items()
            },
            "phases": {
                name: {
                    "layers": phase.layers,
                    "expert_calls": _named(phase.calls),
                    "expert_tokens": _named(phase.tokens),
                    "lanes": phase.lanes.snapshot(),
                    "makespan": dict(phase.makespan),
                    "decisions": _most_common(phase.decisions),
                }
                for name, phase in self._phases.items()
            },
            "layer_us": self._layer_us,
            "prefetched": self.prefetched,
            "prefetch_used": self.prefetch_used,
        }


def _most_common(decisions: dict[tuple[int, ...], tuple[int, _Lanes]]) -> list[dict[str, Any]]:
    ranked = sorted(decisions.items(), key=lambda item: (-item[1][0], item[0]))[:3]
    return [
        {"experts": dict(zip(STRATEGIES, key, strict=True)), "layers": seen, "lanes": lanes.snapshot()}
        for key, (seen, lanes) in ranked
    ]


def _named(sums: Sequence[int] | npt.NDArray[np.float64]) -> dict[str, int]:
    return {name: int(sums[code]) for code, name in enumerate(STRATEGIES, start=1)}
