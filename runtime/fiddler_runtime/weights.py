"""Where expert weights come from: a checkpoint, tensors in memory, or random numbers.

A source is asked for one expert at a time and keeps none of them: where they live afterwards is `store.py`'s matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .checkpoint import Checkpoint, check_identity
from .errors import FiddlerError
from .plan import ModelSpec


class ExpertWeights(ABC):
    """A source of expert weights, made by `load`, `random` or `from_tensors`."""

    @staticmethod
    def load(model_dir: str | Path) -> ExpertWeights:
        """The experts of a Hugging Face model directory (config.json and safetensors, sharded or not).

        Raises FiddlerError if the directory is no readable checkpoint.
        """
        return CheckpointWeights(Path(model_dir))

    @staticmethod
    def random(seed: int = 0) -> ExpertWeights:
        """Normal weights scaled by 1/sqrt(inputs), the same for a (seed, layer, expert) whatever the plan."""
        return RandomWeights(seed)

    @staticmethod
    def from_tensors(experts: Mapping[tuple[int, int], Sequence[torch.Tensor]]) -> ExpertWeights:
        """(decoder layer, expert) -> (gate [I, H], up [I, H], down [H, I]), of any floating dtype on the CPU.

        Where experts have biases, gate [I], up [I] and down [H] follow.
        """
        return TensorWeights(experts)

    @abstractmethod
    def check(self, spec: ModelSpec) -> None:
        """Raises FiddlerError unless this source has every expert of that model, in the right shapes."""

    @abstractmethod
    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        """Fills gate [I, H], up [I, H] and down [H, I] (bf16, contiguous, CPU) of one expert of a decoder layer.

        biases  where the model's experts have some, also of gate [I], up [I] and down [H]
        """


class CheckpointWeights(ExpertWeights):
    """Experts read from safetensors shards, straight into the tensors asked for."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._checkpoint = Checkpoint.open(model_dir)
        self._names: tuple[str, str, str] = ("", "", "")
        # Checkpoints of another floating type are read here and then rounded to bf16: at most one matrix.
        self._other: torch.Tensor | None = None

    def check(self, spec: ModelSpec) -> None:
        check_identity(spec, self._model_dir)
        self._checkpoint.check_experts(spec)
        names = spec.expert_tensors
        self._names = (names.gate, names.up, names.down)

    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        for pattern, out in zip(self._names, (gate, up, down), strict=True):
            name = pattern.format(layer=layer, expert=expert)
            dtype = self._checkpoint.tensors[name].torch_dtype
            if dtype == torch.bfloat16:
                self._checkpoint.read_into(name, out)
                continue
            if self._other is None or self._other.dtype != dtype or self._other.numel() < out.numel():
                self._other = torch.empty(out.numel(), dtype=dtype)
            stored = self._other[: out.numel()].view(out.shape)
            self._checkpoint.read_into(name, stored)
            out.copy_(stored)


class RandomWeights(ExpertWeights):
    """Weights that have the right size and scale, for measuring and for examples."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self, spec: ModelSpec) -> None:
        """Nothing can be missing."""

    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        generator = torch.Generator().manual_seed((self._seed << 32) + (layer << 16) + expert)
        for out in (gate, up, down):
            out.normal_(0.0, float(out.shape[1]) ** -0.5, generator=generator)
        for out in biases:
            out.normal_(0.0, 1.0, generator=generator)


class TensorWeights(ExpertWeights):
    """Experts that the caller already holds."""

    def __init__(self, experts: Mapping[tuple[int, int], Sequence[torch.Tensor]]) -> None:
        self._experts = experts

    def check(self, spec: ModelSpec) -> None:
        rows, width = spec.intermediate_size, spec.hidden_size
        wanted = [[rows, width], [rows, width], [width, rows]]
        if spec.expert_bias:
            wanted += [[rows], [rows], [width]]
        for layer in spec.moe_layers:
            for expert in range(spec.num_experts):
                matrices = self._experts.get((layer, expert))
                if matrices is None:
                    raise FiddlerError(
                        "expert weights are missing",
                        found=f"nothing for layer {layer}, expert {expert}",
                        expected=f"{spec.num_experts} experts for each of the layers {list(spec.moe_layers)}",
                    )
                found = [list(m.shape) for m in matrices]
                if found != wanted:
                    biases = f", their biases {wanted[3:]}" if spec.expert_bias else ""
                    raise FiddlerError(
                        f"wrong shapes for layer {layer}, expert {expert}",
                        found=found,
                        expected=f"gate and up {wanted[0]}, down {wanted[2]}{biases}",
                    )

    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        for out, matrix in zip((gate, up, down, *biases), self._experts[layer, expert], strict=True):
            out.copy_(matrix.detach())
