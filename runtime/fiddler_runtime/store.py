"""Where every expert of a model lives: on the accelerator, unpacked, or in host memory, packed for the kernels."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import arena
from .errors import FiddlerWarning
from .kernels import Kernels, make_pointers, warn_of_far_memory
from .lanes.device import Device, UnpackedExpert
from .lanes.pinning import Pin
from .machine import available_bytes, refuses_placement
from .packed_cache import PackedCache
from .plan import ModelSpec
from .progress import BYTES, Progress
from .reading import Room, buffers, read_ahead
from .residents import Place
from .text import format_bytes
from .weights import ExpertWeights

LOADING = "loading experts" + BYTES
SETTLING = "bringing experts to their memory nodes" + BYTES


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
    pins: list[Pin]

    @property
    def places(self) -> npt.NDArray[np.bool_]:
        """Which experts are resident, bool [rows, experts]."""
        mask = np.zeros((len(self.resident), len(self.pointers[0])), np.bool_)
        for row, experts in enumerate(self.resident):
            mask[row, list(experts)] = True
        return mask

    def give_up(self, place: Place, kernels: Kernels, device: Device) -> None:
        """Moves a resident expert to host memory. Its memory on the accelerator is the lanes' to give back."""
        row, expert = place
        # Not of the lane's memory: that is what there is too little of.
        here = self.resident[row][expert].to(torch.device("cpu"))
        packed = arena.allocate(kernels.library.packed_bytes)
        kernels.settle(packed)
        kernels.pack(*here.matrices, packed, here.biases)
        del self.resident[row][expert]
        self.packed[row][expert] = packed
        self.pointers[row][expert] = packed.data_ptr()
        self.pins.append(device.pin(packed))

    def close(self) -> None:
        """Gives pinned memory back to the system's paging; the tensors are freed with the store."""
        for pin in self.pins:
            pin.undo()


def place(
    spec: ModelSpec,
    rooms: Mapping[Place, UnpackedExpert],
    weights: ExpertWeights,
    kernels: Kernels,
    device: Device,
    *,
    cache: PackedCache | None = None,
    progress: Progress | None = None,
) -> ExpertStore:
    """Puts every expert into its room on the accelerator, or, where it has none, packed into host memory: from
    `weights`, or from the packed `cache`.

    rooms  by (row, expert): the memory of the residents (residents.reserve), which is filled
    `weights` has passed its check; each expert is read once, none if the cache is complete.
    """
    layers = spec.moe_layers
    missing = [[e for e in range(spec.num_experts) if (row, e) not in rooms] for row in range(len(layers))]
    if cache is None:
        packed, memories, settled = _read(spec, missing, rooms, weights, kernels, device, progress)
    else:
        cache.fill(kernels, drop_behind=weights.drop_behind, progress=progress)
        packed, memories = _map(missing, rooms, cache, kernels, device, progress)
        settled = _settle(packed, kernels, progress)
    if not settled:
        warn_of_far_memory(f"experts of {spec.name}")
    # Last: pinning touches every page, and would bring them in before the kernels' threads do.
    unit = kernels.library.packed_bytes
    pins: list[Pin] = []
    try:
        for memory in memories:
            pins.append(device.pin(memory, unit_bytes=unit, mapped=cache is not None))
    except BaseException:
        for pin in pins:
            pin.undo()
        raise
    residents: tuple[dict[int, UnpackedExpert], ...] = tuple({} for _ in layers)
    for row, expert in sorted(rooms):
        residents[row][expert] = rooms[row, expert]
    _warn_of_pageable(spec, sum(pin.bytes for pin in pins), sum(memory.nbytes for memory in memories))
    return ExpertStore(
        resident=residents,
        packed=packed,
        pointers=tuple(
            make_pointers([here[e].data_ptr() if e in here else None for e in range(spec.num_experts)])
            for here in packed
        ),
        pins=pins,
    )


def _warn_of_pageable(spec: ModelSpec, locked: int, total: int) -> None:
    if locked < total:
        warnings.warn(
            f"only {format_bytes(locked)} of {format_bytes(total)} of packed experts of {spec.name} could be locked in "
            "memory: the GPU copies the others slowly, and nothing overlaps those copies; hint: ulimit -l unlimited",
            FiddlerWarning,
            stacklevel=4,
        )


_Packed = tuple[dict[int, torch.Tensor], ...]
"""Packed experts by row."""


def _read(
    spec: ModelSpec,
    missing: list[list[int]],
    rooms: Mapping[Place, UnpackedExpert],
    weights: ExpertWeights,
    kernels: Kernels,
    device: Device,
    progress: Progress | None,
) -> tuple[_Packed, list[torch.Tensor], bool]:
    """Every expert from `weights`: at no time are more than reading.BUFFERS held beside the finished ones.

    Returns the packed experts, the memory that they lie in, and whether it is where it belongs.
    """
    row_of = {layer: row for row, layer in enumerate(spec.moe_layers)}
    arenas = [arena.allocate(len(experts) * kernels.library.packed_bytes) if experts else None for experts in missing]
    packed = tuple(
        {} if memory is None else dict(zip(experts, memory.view(len(experts), -1).unbind(), strict=True))
        for experts, memory in zip(missing, arenas, strict=True)
    )
    turn = buffers(spec)
    direct = device.torch_device.type == "cpu"

    def room(layer: int, expert: int) -> Room:
        home = rooms.get((row_of[layer], expert)) if direct else None
        return turn(layer, expert) if home is None else home

    order = weights.order(spec)
    settled = True
    with contextlib.closing(read_ahead(weights, order, room)) as experts:
        for number, (layer, expert, read) in enumerate(experts):
            if progress is not None:
                progress(LOADING, number * spec.expert_bytes, len(order) * spec.expert_bytes)
            row = row_of[layer]
            if expert in packed[row]:
                settled &= kernels.settle(packed[row][expert])
                kernels.pack(*read.matrices, packed[row][expert], read.biases)
            elif not direct:
                rooms[row, expert].fill(read)
    if progress is not None:
        progress(LOADING, len(order) * spec.expert_bytes, len(order) * spec.expert_bytes)
    return packed, [memory for memory in arenas if memory is not None], settled


def _map(
    missing: list[list[int]],
    rooms: Mapping[Place, UnpackedExpert],
    cache: PackedCache,
    kernels: Kernels,
    device: Device,
    progress: Progress | None,
) -> tuple[_Packed, list[torch.Tensor]]:
    """Packed experts where they lie on disk; residents unpacked from there."""
    memories = cache.map()
    packed = tuple({e: memory[e] for e in experts} for experts, memory in zip(missing, memories, strict=True))
    nbytes = kernels.library.packed_bytes
    staging: UnpackedExpert | None = None
    for number, (row, expert) in enumerate(sorted(rooms)):
        if progress is not None:
            progress(LOADING, number * nbytes, len(rooms) * nbytes)
        home = rooms[row, expert]
        if device.torch_device.type == "cpu":
            staging = home
        elif staging is None:
            staging = home.to(torch.device("cpu"))
        kernels.unpack(memories[row][expert], *staging.matrices, staging.biases)
        if staging is not home:
            home.fill(staging)
    if progress is not None and rooms:
        progress(LOADING, len(rooms) * nbytes, len(rooms) * nbytes)
    return packed, memories


def _settle(packed: _Packed, kernels: Kernels, progress: Progress | None) -> bool:
    """Brings mapped experts, which lie where they were read or written, to the nodes of the threads that read them.

    Not where they do not all fit into memory: what is moved now would be dropped and read again.
    """
    experts = [expert for row in packed for expert in row.values()]
    total = len(experts) * kernels.library.packed_bytes
    if len(kernels.nodes) < 2 or total > available_bytes():
        return True
    if refuses_placement():
        return False
    settled = True
    for number, expert in enumerate(experts):
        if progress is not None:
            progress(SETTLING, number * expert.nbytes, total)
        settled &= kernels.settle(expert, present=True)
    if progress is not None:
        progress(SETTLING, total, total)
    return settled
