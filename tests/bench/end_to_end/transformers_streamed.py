"""transformers' own experts, whose weights stay in host memory and are sent to the accelerator layer by layer."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch

from fiddler_runtime import arena
from fiddler_runtime.lanes.device import Device, Ticket
from fiddler_runtime.lanes.expert import UnpackedExpert
from fiddler_runtime.plan import ModelSpec
from fiddler_runtime.progress import Progress
from fiddler_runtime.weights import ExpertWeights

SLOTS = 2
"""Layers' weights on the accelerator: one computes while the next arrives."""


class TransformersStreamed:
    """All experts of every layer are copied in every step, chosen or not, since transformers keeps them in one tensor.

    As ZeRO-Infinity (arXiv 2104.07857) does and better than accelerate's offloading, which waits for each layer's copy:
    from pinned memory, ahead of the computing, in the order in which layers come; the rest of the model stays put.

    module  transformers' experts of one layer, on the meta device
    """

    def __init__(
        self, spec: ModelSpec, weights: ExpertWeights, device: Device, module: Any, progress: Progress | None
    ) -> None:
        self._device, self._spec = device, spec
        self._rows = {layer: row for row, layer in enumerate(spec.moe_layers)}
        self._names = [name for name, _ in module.named_parameters()]
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self._host: list[dict[str, torch.Tensor]] = []
        self._pins = []
        for layer in spec.moe_layers:
            row: dict[str, torch.Tensor] = {}
            for name, shape in shapes.items():
                memory = arena.allocate(2 * torch.Size(shape).numel())
                row[name] = memory[: torch.Size(shape).numel()].view(shape)
            for expert in range(spec.num_experts):
                if progress is not None:
                    progress("loading experts", len(self._host) * spec.num_experts + expert, spec.total_experts)
                read = UnpackedExpert.empty(spec.expert)
                weights.read(layer, expert, *read.matrices, read.biases)
                _put(row, expert, read, module)
            self._pins += [device.pin(tensor) for tensor in row.values()]
            self._host.append(row)
        self._slots = []
        for _ in range(min(SLOTS, len(self._host))):
            there = copy.deepcopy(module)
            for name, shape in shapes.items():
                room = torch.empty(shape, dtype=torch.bfloat16, device=device.torch_device)
                setattr(there, name, torch.nn.Parameter(room, requires_grad=False))
            self._slots.append(there.eval())
        self._free: list[Ticket] = [None] * len(self._slots)
        self._coming: deque[tuple[int, int, Ticket]] = deque()
        self.reset_counters()

    def moe(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See Engine.moe."""
        self._calls["streamed"] += self._spec.num_experts
        return self._device.join(self._device.submit(self._run, self._rows[layer], hidden, ids, weights))

    def _run(self, row: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not self._coming or self._coming[0][0] != row:  # the first layer, or a step that ended in the middle
            self._coming.clear()
            for slot in range(len(self._slots)):
                self._fetch((row + slot) % len(self._host), slot)
        _, slot, arrival = self._coming.popleft()
        self._device.wait(arrival)
        out: torch.Tensor = self._slots[slot](hidden, ids, weights.to(hidden.dtype))
        self._free[slot] = self._device.mark()
        self._fetch((row + len(self._slots)) % len(self._host), slot)
        return out

    def _fetch(self, row: int, slot: int) -> None:
        after = self._free[slot]
        for name in self._names:
            ticket = self._device.copy(getattr(self._slots[slot], name), self._host[row][name], after=after)
        self._coming.append((row, slot, ticket))

    def counters(self) -> dict[str, Any]:
        """expert_calls as Engine.counters has them: experts copied, used or not."""
        return {"expert_calls": dict(self._calls)}

    def reset_counters(self) -> None:
        """Sets them to zero."""
        self._calls = {"resident": 0, "streamed": 0, "cpu": 0}

    def close(self) -> None:
        """Lets the weights go."""
        self._device.synchronize()
        for pin in self._pins:
            pin.undo()
        self._host.clear()
        self._slots.clear()
        self._device.close()


def _put(row: dict[str, torch.Tensor], expert: int, read: UnpackedExpert, module: Any) -> None:
    """An expert's weights where transformers' module has them: perhaps transposed, gate and up perhaps in turns."""
    gate, up, down = read.matrices
    pairs = [("gate_up_proj", torch.stack([gate, up])), ("down_proj", down)]
    if read.biases:
        gate_bias, up_bias, down_bias = read.biases
        pairs += [("gate_up_proj_bias", torch.stack([gate_bias, up_bias])), ("down_proj_bias", down_bias)]
    for name, matrix in pairs:
        if name.startswith("gate_up"):
            both = matrix if getattr(module, "is_concatenated", True) else matrix.transpose(0, 1)
            matrix = both.reshape(-1, *both.shape[2:])
        if getattr(module, "is_transposed", False) and matrix.dim() == 2:
            matrix = matrix.t()
        row[name][expert].copy_(matrix)
