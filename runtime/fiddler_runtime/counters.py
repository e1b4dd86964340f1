"""What an engine has done so far, by phase and strategy."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STRATEGIES = ("resident", "streamed", "cpu")


class Counters:
    """Sums since the last reset. Adding does not allocate more than two arrays of four numbers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Sets every sum to zero."""
        self._layers = dict.fromkeys(PHASES, 0)
        # By enum fdl_strategy: idle, resident, streamed, cpu.
        self._calls = {phase: np.zeros(4) for phase in PHASES}
        self._tokens = {phase: np.zeros(4) for phase in PHASES}
        self._busy_us = {"cpu": 0.0, "accelerator": 0.0}
        self._predicted_us = {"cpu": 0.0, "accelerator": 0.0}
        self._layer_us = 0.0

    def add(
        self,
        phase: Phase,
        calls: npt.NDArray[np.intp],
        strategy: npt.NDArray[np.uint8],
        counts: npt.NDArray[np.int32],
        predicted_us: npt.NDArray[np.float32],
    ) -> None:
        """Notes a layer's decision: calls [4] experts per strategy; strategy, counts [E]; predicted_us [2] CPU, GPU."""
        self._layers[phase] += 1
        self._calls[phase] += calls
        self._tokens[phase] += np.bincount(strategy, weights=counts, minlength=4)
        self._predicted_us["cpu"] += float(predicted_us[0])
        self._predicted_us["accelerator"] += float(predicted_us[1])

    def add_time(self, cpu_us: float, accelerator_us: float, layer_us: float) -> None:
        """Notes how long one layer's lanes were busy, and the layer as a whole took."""
        self._busy_us["cpu"] += cpu_us
        self._busy_us["accelerator"] += accelerator_us
        self._layer_us += layer_us

    def snapshot(self) -> dict[str, Any]:
        """The sums as plain values.

        expert_calls, expert_tokens  {strategy: sum}: an expert run for n tokens is 1 call and n tokens
        layers                       MoE layers executed
        phases                       the same three for prefill and decode apart
        busy_us, predicted_us        {"cpu", "accelerator"}: time in each lane, and what the plan's tables said
        layer_us                     time in Engine.moe
        """
        phases = {
            phase: {
                "layers": self._layers[phase],
                "expert_calls": _named(self._calls[phase]),
                "expert_tokens": _named(self._tokens[phase]),
            }
            for phase in PHASES
        }
        return {
            "layers": sum(self._layers.values()),
            "expert_calls": _named(sum(self._calls.values(), np.zeros(4))),
            "expert_tokens": _named(sum(self._tokens.values(), np.zeros(4))),
            "phases": phases,
            "busy_us": dict(self._busy_us),
            "predicted_us": dict(self._predicted_us),
            "layer_us": self._layer_us,
        }


def _named(sums: npt.NDArray[np.float64]) -> dict[str, int]:
    return {name: int(sums[code]) for code, name in enumerate(STRATEGIES, start=1)}
