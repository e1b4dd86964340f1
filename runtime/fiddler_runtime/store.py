"""Where every expert of a model lives: on the accelerator, unpacked, or in host memory, packed for the kernels."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import arena
from .kernels import Kernels, make_pointers
from .lanes.device import Device, UnpackedExpert
from .packed_cache import PackedCache
from .plan import ModelSpec
from .progress import BYTES, Progress
from .reading import Room, buffers, read_ahead
from .weights import ExpertWeights

LOADING = "loading experts" + BYTES


@dataclass(frozen=True)
class ExpertStore:
    """The experts of a model, placed. Rows are positions in spec.moe_layers.

    resident  per row: the experts on the accelerator
    packed    per row: expert -> bf16 [packed_bytes / 2] in host memory, 64-byte aligned
    pointers  per row: the packed experts' addresses by expert, null where there is none
    """

    resident: tuple[dict[int, UnpackedExpert], ...]
    packed: tuple[dict[int, torch.Tensor], ...]
    pointers: tuple[ctypes.Array[ctypes.c_void_p], ...]
    resident_bytes: int
    arena_bytes: int
    unpin: tuple[Callable[[], None], ...]

    def close(self) -> None:
        """Gives pinned memory back to the system's paging; the tensors are freed with the store."""
        for undo in self.unpin:
            undo()


def place(
    spec: ModelSpec,
    resident: npt.NDArray[np.bool_],
    weights: ExpertWeights,
    kernels: Kernels,
    device: Device,
    *,
    cache: PackedCache | None = None,
    progress: Progress | None = None,
) -> ExpertStore:
    """Puts every expert where `resident` bool [layers, experts] says: from `weights`, or from the packed `cache`.

    `weights` has passed its check; each expert is read once, none if the cache is complete.
    """
    layers = spec.moe_layers
    missing = [[e for e in range(spec.num_experts) if not resident[row, e]] for row in range(len(layers))]
    if cache is None:
        packed, residents, memories = _read(spec, missing, weights, kernels, device, progress)
    else:
        cache.fill(kernels, drop_behind=weights.drop_behind, progress=progress)
        packed, residents, memories = _map(spec, missing, cache, kernels, device, progress)
    # Last: pinning touches every page, and would bring them in before the kernels' threads do.
    unpin = tuple(device.pin(memory, mapped=cache is not None) for memory in memories)
    return ExpertStore(
        resident=residents,
        packed=packed,
        pointers=tuple(
            make_pointers([here[e].data_ptr() if e in here else None for e in range(spec.num_experts)])
            for here in packed
        ),
        resident_bytes=int(resident.sum()) * spec.expert_bytes,
        arena_bytes=int((~resident).sum()) * kernels.library.packed_bytes,
        unpin=unpin,
    )


_Placed = tuple[tuple[dict[int, torch.Tensor], ...], tuple[dict[int, UnpackedExpert], ...], list[torch.Tensor]]
"""Packed and resident experts by row, and the memory that the packed ones lie in."""


def _read(
    spec: ModelSpec,
    missing: list[list[int]],
    weights: ExpertWeights,
    kernels: Kernels,
    device: Device,
    progress: Progress | None,
) -> _Placed:
    """Every expert from `weights`: at no time are more than reading.BUFFERS held beside the finished ones."""
    row_of = {layer: row for row, layer in enumerate(spec.moe_layers)}
    arenas = [arena.allocate(len(experts) * kernels.library.packed_bytes) if experts else None for experts in missing]
    packed = tuple(
        {} if memory is None else dict(zip(experts, memory.view(len(experts), -1).unbind(), strict=True))
        for experts, memory in zip(missing, arenas, strict=True)
    )
    residents: tuple[dict[int, UnpackedExpert], ...] = tuple({} for _ in missing)
    turn = buffers(spec)

    def room(layer: int, expert: int) -> Room:
        direct = device.torch_device.type == "cpu" and expert not in packed[row_of[layer]]
        return UnpackedExpert.empty(spec.expert) if direct else turn(layer, expert)

    order = weights.order(spec)
    with contextlib.closing(read_ahead(weights, order, room)) as experts:
        for number, (layer, expert, read) in enumerate(experts):
            if progress is not None:
                progress(LOADING, number * spec.expert_bytes, len(order) * spec.expert_bytes)
            row = row_of[layer]
            if expert in packed[row]:
                kernels.pack(*read.matrices, packed[row][expert], read.biases)
            else:
                residents[row][expert] = read.to(device.torch_device)
    if progress is not None:
        progress(LOADING, len(order) * spec.expert_bytes, len(order) * spec.expert_bytes)
    return packed, residents, [memory for memory in arenas if memory is not None]


def _map(
    spec: ModelSpec,
    missing: list[list[int]],
    cache: PackedCache,
    kernels: Kernels,
    device: Device,
    progress: Progress | None,
) -> _Placed:
    """Packed experts where they lie on disk; residents unpacked from there."""
    memories = cache.map()
    packed = tuple({e: memory[e] for e in experts} for experts, memory in zip(missing, memories, strict=True))
    residents: tuple[dict[int, UnpackedExpert], ...] = tuple({} for _ in missing)
    wanted = [(row, e) for row in range(len(missing)) for e in range(spec.num_experts) if e not in packed[row]]
    staging: UnpackedExpert | None = None
    for number, (row, expert) in enumerate(wanted):
        if progress is not None:
            progress(LOADING, number * spec.expert_bytes, len(wanted) * spec.expert_bytes)
        if staging is None or device.torch_device.type == "cpu":
            staging = UnpackedExpert.empty(spec.expert)
        kernels.unpack(memories[row][expert], *staging.matrices, staging.biases)
        residents[row][expert] = staging.to(device.torch_device)
    if progress is not None and wanted:
        progress(LOADING, len(wanted) * spec.expert_bytes, len(wanted) * spec.expert_bytes)
    return packed, residents, memories
