"""Which experts tokens choose, instead of what a router of random weights says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fiddler_runtime.captured.layers import MOST_TOKENS
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import ModelSpec
from fiddlerc import trace as tracing
from fiddlerc.ir import Trace


class Replay:
    """Hands out recorded choices in the order of the text.

    choices  integer [tokens, MoE layers, top_k]. A prompt gets the first ones, each step the next: with beams as many
             neighbouring tokens as there are beams, whose prompt transformers computes once for each of them

    A captured step reads its choices where they lay when it was captured: those of few tokens always lie there.
    """

    def __init__(self, choices: npt.NDArray[np.integer], spec: ModelSpec, device: torch.device | str = "cpu") -> None:
        self._choices = torch.from_numpy(choices[:, : len(spec.moe_layers)].astype(np.int64)).to(device)
        self._rows = {layer: row for row, layer in enumerate(spec.moe_layers)}
        self._few = torch.zeros((MOST_TOKENS, *self._choices.shape[1:]), dtype=torch.int64, device=device)
        self.begin(0, 1)

    def begin(self, prompt: int, beams: int) -> None:
        """Starts a generation of that prompt."""
        self._prompt, self._beams = prompt, beams
        self._at, self._now = 0, self._few[:0]

    def step(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        same = self._beams if tokens == self._prompt * self._beams and self._at == 0 else 1
        fresh = (self._at + torch.arange(tokens // same)) % len(self._choices)
        self._at += tokens // same
        chosen = self._choices[fresh.repeat(same).to(self._choices.device)]
        self._now = self._few[:tokens].copy_(chosen) if tokens <= MOST_TOKENS else chosen

    def ids(self, layer: int) -> torch.Tensor:
        """int64 [tokens, top_k] of the step for a layer."""
        return self._now[:, self._rows[layer]]


class Routed:
    """Stands where hf.PlannedExperts look for their engine: hands a layer on to whoever computes it."""

    def __init__(self, experts: Any, replay: Replay | None) -> None:
        self.experts = experts
        self.replay = replay

    def moe(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See Engine.moe."""
        if self.replay is not None:
            ids = self.replay.ids(layer)
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
