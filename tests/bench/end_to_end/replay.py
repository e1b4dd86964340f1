"""Which experts tokens choose, instead of what a router of random weights says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import ModelSpec
from fiddlerc import trace as tracing
from fiddlerc.ir import Trace


class Replay:
    """Hands out recorded choices in the order of the text.

    choices  integer [tokens, MoE layers, top_k]. A prompt gets the first ones, each step the next: with beams as many
             neighbouring tokens as there are beams, whose prompt transformers computes once for each of them
    """

    def __init__(self, choices: npt.NDArray[np.integer], spec: ModelSpec) -> None:
        self._choices = torch.from_numpy(choices[:, : len(spec.moe_layers)].astype(np.int64))
        self._rows = {layer: row for row, layer in enumerate(spec.moe_layers)}
        self.begin(0, 1)

    def begin(self, prompt: int, beams: int) -> None:
        """Starts a generation of that prompt."""
        self._prompt, self._beams = prompt, beams
        self._at, self._now = 0, torch.zeros(0, dtype=torch.int64)

    def ids(self, layer: int, tokens: int) -> torch.Tensor:
        """int64 [tokens, top_k] for the next layer of a step; the first MoE layer begins a step."""
        row = self._rows[layer]
        if row == 0:
            same = self._beams if tokens == self._prompt * self._beams and self._at == 0 else 1
            fresh = (self._at + torch.arange(tokens // same)) % len(self._choices)
            self._at += tokens // same
            self._now = fresh.repeat(same)
        return self._choices[self._now, row]


class Routed:
    """Stands where hf.PlannedExperts look for their engine: hands a layer on to whoever computes it."""

    def __init__(self, experts: Any, replay: Replay | None) -> None:
        self.experts = experts
        self.replay = replay

    def moe(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See Engine.moe."""
        if self.replay is not None:
            ids = self.replay.ids(layer, hidden.shape[0]).to(ids.device)
        return self.experts.moe(layer, hidden, ids, weights)


def read_routing(path: Path, full: ModelSpec) -> Trace:
    """A token-wise trace of the whole model. Raises FiddlerError for one of another model, and for mere counts."""
    trace = tracing.read_trace(path, full)
    if trace.experts is None:
        raise FiddlerError(
            f"the trace {path} cannot be replayed",
            found="counts only",
            expected="the choices of every token",
            hint=f"fiddlerc trace MODEL_DIR --text FILE -o {path}",
        )
    return trace


def drawn(tokens: int, spec: ModelSpec) -> npt.NDArray[np.int64]:
    """Choices of distinct experts, the same for the same arguments: [tokens, MoE layers, top_k]."""
    rng = np.random.Generator(np.random.PCG64(0))
    noise = rng.random((tokens, len(spec.moe_layers), spec.num_experts))
    return np.argsort(noise, axis=2)[:, :, : spec.top_k]
