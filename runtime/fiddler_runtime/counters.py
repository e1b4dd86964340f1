"""What an engine has done so far, by phase and strategy, and what the plan had predicted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STRATEGIES = ("resident", "streamed", "cpu", "split")
_CODES = len(STRATEGIES) + 1  # enum fdl_strategy; 0 is idle
_MOST_DECISIONS = 256
"""Different decisions kept apart; a model with many experts has more, and the rare ones are not told."""


@dataclass
class _Lanes:
    """Sums over layers: each lane's predicted and actual time, and the layers in which it had work."""

    layers: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    predicted_us: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    actual_us: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def snapshot(self) -> dict[str, Any]:
        return {
            lane: {
                "layers": int(self.layers[i]),
                "predicted_us": float(self.predicted_us[i]),
                "actual_us": float(self.actual_us[i]),
            }
            for i, lane in enumerate(("cpu", "accelerator"))
        }


class _Phase:
    """Sums of one phase."""

    def __init__(self) -> None:
        self.layers = 0
        # By enum fdl_strategy.
        self.calls = np.zeros(_CODES)
        self.tokens = np.zeros(_CODES)
        self.lanes = _Lanes()
        self.makespan_us = np.zeros(2)
        self.decisions: dict[tuple[int, ...], tuple[int, _Lanes]] = {}


class Counters:
    """Sums since the last reset."""

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
        calls: npt.NDArray[np.intp],
        strategy: npt.NDArray[np.uint8],
        counts: npt.NDArray[np.int32],
        predicted_us: npt.NDArray[np.float32],
        actual_us: tuple[float, float],
        layer_us: float,
    ) -> None:
        """Notes a layer.

        calls [5] experts per strategy; strategy, counts [E]; predicted_us, actual_us: CPU lane, accelerator; layer_us:
        the whole layer
        """
        sums = self._phases[phase]
        sums.layers += 1
        sums.calls += calls
        sums.tokens += np.bincount(strategy, weights=counts, minlength=_CODES)
        key = tuple(calls[1:].tolist())
        seen, lanes = sums.decisions.get(key, (0, None))
        if lanes is None:
            lanes = _Lanes()
        if seen or len(sums.decisions) < _MOST_DECISIONS:
            sums.decisions[key] = (seen + 1, lanes)
        for part in (sums.lanes, lanes):
            part.layers += predicted_us > 0
            part.predicted_us += predicted_us
            part.actual_us += actual_us
        sums.makespan_us += max(predicted_us), max(actual_us)
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
        lanes = _Lanes(
            *(sum(getattr(p.lanes, name) for p in every) for name in ("layers", "predicted_us", "actual_us"))
        )
        return {
            "layers": sum(phase.layers for phase in every),
            "expert_calls": _named(sum((phase.calls for phase in every), np.zeros(_CODES))),
            "expert_tokens": _named(sum((phase.tokens for phase in every), np.zeros(_CODES))),
            "lanes": lanes.snapshot(),
            "phases": {
                name: {
                    "layers": phase.layers,
                    "expert_calls": _named(phase.calls),
                    "expert_tokens": _named(phase.tokens),
                    "lanes": phase.lanes.snapshot(),
                    "makespan": dict(zip(("predicted_us", "actual_us"), phase.makespan_us.tolist(), strict=True)),
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


def _named(sums: npt.NDArray[np.float64]) -> dict[str, int]:
    return {name: int(sums[code]) for code, name in enumerate(STRATEGIES, start=1)}
