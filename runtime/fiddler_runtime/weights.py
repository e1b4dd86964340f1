"""Where expert weights come from: a checkpoint, tensors in memory, or random numbers.

A source is asked for one expert at a time and keeps none of them: where they live afterwards is `store.py`'s matter.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import orders
from .checkpoint import Checkpoint, check_identity
from .errors import FiddlerError
from .onnx_weights import OnnxCheckpoint
from .plan import ExpertTensors, ModelSpec


class ExpertWeights(ABC):
    """A source of expert weights, made by `load`, `random` or `from_tensors`.

    A source of another kind implements `check` and `read`, `order` if its experts lie on a disk, and `identity` if they
    may be kept in a packed cache.

    home         the folder that the weights come from, if they do: a packed cache may lie in it
    drop_behind  set by who reads: what has been read shall not stay in the page cache
    """

    home: Path | None = None
    drop_behind: bool = False

    @staticmethod
    def load(model: str | Path) -> ExpertWeights:
        """The experts of a Hugging Face model directory (config.json and safetensors, sharded or not) or an ONNX file.

        Raises FiddlerError if it is no readable checkpoint.
        """
        return OnnxWeights(Path(model)) if Path(model).suffix == ".onnx" else CheckpointWeights(Path(model))

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
        """Fills gate [I, H], up [I, H] and down [H, I] (bf16, CPU, any strides) of one expert of a decoder layer.

        biases  where the model's experts have some, also of gate [I], up [I] and down [H]
        Called after `check`, from one thread at a time, which need not be the caller's.
        """

    def order(self, spec: ModelSpec) -> list[tuple[int, int]]:
        """Every (decoder layer, expert), in the order in which reading them is fastest."""
        return [(layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)]

    def identity(self) -> str | None:
        """What tells these weights from others of the same shapes; None if nothing does without reading them all."""
        return None


class CheckpointWeights(ExpertWeights):
    """Experts read from safetensors shards, straight into the tensors asked for if those have the order on disk."""

    def __init__(self, model_dir: Path) -> None:
        self.home = model_dir if model_dir.is_dir() else model_dir.parent
        self._checkpoint = self._open(model_dir)
        self._names: ExpertTensors | None = None
        # What is asked for in another order or not stored in bf16 is read here: at most one expert's gate and up.
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def _open(self, path: Path) -> Checkpoint:
        return Checkpoint.open(path)

    def check(self, spec: ModelSpec) -> None:
        if spec.from_onnx:
            raise FiddlerError(
                f"the experts of the plan's model ({spec.name}) are in an ONNX file",
                found=f"the directory {self._checkpoint.model_dir}",
                expected="the file that the plan was compiled from",
                hint="fiddlerc run PLAN --model DIR --experts FILE.onnx: experts from FILE, everything else from DIR",
            )
        check_identity(spec, self._checkpoint.model_dir)
        self._checkpoint.check_experts(spec)
        self._names = spec.expert_tensors

    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        names = self._names
        assert names is not None, "check() comes first"

        def read(pattern: str, *parts: torch.Tensor) -> None:
            self._read(pattern.format(layer=layer, expert=expert), expert * ("{expert}" not in pattern), parts, names)

        def read_pair(first: str, second: str, a: torch.Tensor, b: torch.Tensor) -> None:
            if first == second:
                read(first, a, b)
            else:
                read(first, a)
                read(second, b)

        read_pair(names.gate, names.up, gate, up)
        read(names.down, down)
        if biases:
            read_pair(names.gate_bias, names.up_bias, biases[0], biases[1])
            read(names.down_bias, biases[2])

    def order(self, spec: ModelSpec) -> list[tuple[int, int]]:
        """File by file, each from its beginning to its end."""

        def place(item: tuple[int, int]) -> tuple[Path, int]:
            patterns = (spec.expert_tensors.gate, spec.expert_tensors.up, spec.expert_tensors.down)
            infos = [self._checkpoint.tensors[name.format(layer=item[0], expert=item[1])] for name in patterns]
            return min((info.file, info.offset) for info in infos)

        # Experts that share a tensor have the same place, and stay in their order.
        return sorted(super().order(spec), key=place)

    def identity(self) -> str:
        """See `Checkpoint.identity`."""
        return self._checkpoint.identity()

    def _read(self, name: str, index: int, parts: Sequence[torch.Tensor], names: ExpertTensors) -> None:
        """Fills `parts`, which lie in one tensor, of the expert with that index in it."""
        dtype = self._checkpoint.tensors[name].torch_dtype
        elements = len(parts) * parts[0].numel()
        there = orders.whole(parts, names)
        direct = there is not None and dtype == torch.bfloat16
        stored = there if there is not None and direct else self._room(dtype, elements)
        self._checkpoint.read_part(name, index * elements, stored, drop=self.drop_behind)
        if direct:
            return
        if there is not None:
            there.copy_(stored)
            return
        for part, view in zip(parts, orders.views(stored, len(parts), parts[0].shape, names), strict=True):
            part.copy_(view)

    def _room(self, dtype: torch.dtype, elements: int) -> torch.Tensor:
        room = self._scratch.get(dtype)
        if room is None or room.numel() < elements:
            room = self._scratch[dtype] = torch.empty(elements, dtype=dtype)
        return room[:elements]


class OnnxWeights(CheckpointWeights):
    """Experts read from an ONNX file and its external data, one at a time and without its graph."""

    def _open(self, path: Path) -> Checkpoint:
        self._file = OnnxCheckpoint.open(path)
        self._spec: ModelSpec | None = None
        return self._file

    def check(self, spec: ModelSpec) -> None:
        if spec == self._spec:  # what is to be told is told once
            return
        if not spec.from_onnx:
            raise FiddlerError(
                f"the plan's model ({spec.name}) is a Hugging Face directory",
                found=f"the ONNX file {self._file.model_dir}",
                expected=f"{spec.name}'s directory",
                hint=f"compile the file: fiddlerc compile {self._file.model_dir} --hw HW -o PLAN",
            )
        self._checkpoint = self._file.renamed(spec)
        self._checkpoint.check_experts(spec)
        self._names, self._spec = spec.expert_tensors, spec


class RandomWeights(ExpertWeights):
    """Weights that have the right size and scale, for measuring and for examples."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self, spec: ModelSpec) -> None:
        """Nothing can be missing."""

    def identity(self) -> str:
        """The seed, and how numbers are drawn from it."""
        return f"random {self._seed}, torch {torch.__version__}"

    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        # Hashed, because torch takes the lower 32 bits of a seed only.
        digest = hashlib.sha256(f"{self._seed} {layer} {expert}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        for out in (gate, up, down, *biases):
            deviation = float(out.shape[1]) ** -0.5 if out.dim() == 2 else 1.0
            # Drawn apart, because what is drawn into other strides are other numbers.
            out.copy_(torch.empty(out.shape, dtype=out.dtype).normal_(0.0, deviation, generator=generator))


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
