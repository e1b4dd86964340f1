"""The orders in which checkpoints keep an expert: views of the bytes as they are stored, so that nothing is rearranged.

`Kernels.pack` takes such views; so what is read from a shard is packed from where it was read to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import arena
from .plan import ExpertForm, ExpertTensors


def views(stored: torch.Tensor, count: int, shape: Sequence[int], names: ExpertTensors) -> tuple[torch.Tensor, ...]:
    """Those `count` matrices [outputs, inputs], or biases [outputs], that lie in one tensor's part for an expert.

    stored  [count * elements of one], in the checkpoint's order
    """
    outputs, *inputs = shape
    if names.transposed and inputs:
        both = stored.view(*inputs, count * outputs).t()
    else:
        both = stored.view(count * outputs, *inputs)
    if names.interleaved:
        return tuple(both[place::count] for place in range(count))
    return tuple(both[place * outputs : (place + 1) * outputs] for place in range(count))


def whole(parts: Sequence[torch.Tensor], names: ExpertTensors) -> torch.Tensor | None:
    """What `parts` are the `views` of, if they are."""
    first = parts[0]
    elements = first.numel() * len(parts)
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if not 0 < elements <= room:
        return None
    stored = first.as_strided((elements,), (1,))
    same = zip(views(stored, len(parts), first.shape, names), parts, strict=True)
    return stored if all(a.data_ptr() == b.data_ptr() and a.stride() == b.stride() for a, b in same) else None


@dataclass(frozen=True)
class StoredExpert:
    """An expert in host memory as its checkpoint keeps it, bf16.

    matrices  views: gate [I, H], up [I, H], down [H, I]
    biases    views: gate [I], up [I], down [H]; empty where there are none
    """

    form: ExpertForm
    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    biases: tuple[torch.Tensor, ...]

    @staticmethod
    def empty(form: ExpertForm, names: ExpertTensors) -> StoredExpert:
        """Room for one expert, uninitialised."""
        memory = arena.allocate(form.bytes)

        def room(count: int, *shape: int) -> tuple[torch.Tensor, ...]:
            nonlocal memory
            elements = count * torch.Size(shape).numel()
            stored, memory = memory[:elements], memory[elements:]
            return views(stored, count, shape, names)

        def pair(joined: bool, *shape: int) -> tuple[torch.Tensor, ...]:
            return room(2, *shape) if joined else room(1, *shape) + room(1, *shape)

        rows, width = form.intermediate_size, form.hidden_size
        gate, up = pair(names.gate == names.up, rows, width)
        (down,) = room(1, width, rows)
        biases = pair(names.gate_bias == names.up_bias, rows) + room(1, width) if form.bias else ()
        return StoredExpert(form, (gate, up, down), biases)
