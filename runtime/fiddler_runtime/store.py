"""Where every expert of a model lives: on the accelerator, unpacked, or in host memory, packed for the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import arena
from .kernels import Kernels, make_pointers
from .lanes.device import Device, UnpackedExpert
from .plan import ModelSpec
from .weights import ExpertWeights

Progress = Callable[[str, int, int], None]
STAGING_EXPERTS = 3
"""Experts' worth of accelerator memory that streaming takes: two unpacked slots, one landing buffer.
Prefetching takes one more."""


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
    prefetching: bool = False,
    progress: Progress | None = None,
) -> ExpertStore:
    """Reads every expert once and puts it where `resident` bool [layers, experts] says.

    At no time is more than one expert held beside the finished ones. Raises FiddlerError before any work if memory does
    not suffice or the source is not of this model.
    """
    weights.check(spec)
    packed_bytes = kernels.library.packed_bytes
    _require_memory(spec, int(resident.sum()), packed_bytes, device, STAGING_EXPERTS + prefetching)
    total, done = resident.size, 0
    residents: list[dict[int, UnpackedExpert]] = []
    packed: list[dict[int, torch.Tensor]] = []
    undo: list[Callable[[], None]] = []
    staging: UnpackedExpert | None = None
    for row, layer in enumerate(spec.moe_layers):
        on_device: dict[int, UnpackedExpert] = {}
        on_host: dict[int, torch.Tensor] = {}
        missing = [e for e in range(spec.num_experts) if not resident[row, e]]
        if missing:
            memory = arena.allocate(len(missing) * packed_bytes)
            on_host = dict(zip(missing, memory.view(len(missing), -1).unbind(), strict=True))
        for expert in range(spec.num_experts):
            if progress is not None:
                progress("loading experts", done, total)
            direct = expert not in on_host and device.torch_device.type == "cpu"
            if direct or staging is None:
                read = UnpackedExpert.empty(spec.expert)
                staging = staging if direct else read
            else:
                read = staging
            weights.read(layer, expert, *read.matrices, read.biases)
            if expert in on_host:
                kernels.pack(*read.matrices, on_host[expert], read.biases)
            else:
                on_device[expert] = read if direct else read.to(device.torch_device)
            done += 1
        if missing:
            # After packing: pinning touches every page, and would bring them in before the kernels' threads do.
            undo.append(device.pin(memory))
        residents.append(on_device)
        packed.append(on_host)
    if progress is not None:
        progress("loading experts", total, total)
    pointers = tuple(
        make_pointers([on_host[e].data_ptr() if e in on_host else None for e in range(spec.num_experts)])
        for on_host in packed
    )
    return ExpertStore(
        resident=tuple(residents),
        packed=tuple(packed),
        pointers=pointers,
        resident_bytes=int(resident.sum()) * spec.expert_bytes,
        arena_bytes=(total - int(resident.sum())) * packed_bytes,
        unpin=tuple(undo),
    )


def _require_memory(spec: ModelSpec, residents: int, packed_bytes: int, device: Device, staging: int) -> None:
    total = len(spec.moe_layers) * spec.num_experts
    on_device = residents * spec.expert_bytes
    if device.kind != "none":
        on_device += staging * packed_bytes
    on_host = (total - residents) * packed_bytes + spec.expert_bytes
    free = device.free_bytes()
    if free is None:
        on_host += on_device
    else:
        arena.require(
            f"{residents} resident experts on the {device.kind} device",
            on_device,
            free,
            "compile a plan for less: fiddlerc compile MODEL --hw HW --gpu-memory SIZE -o PLAN",
        )
    arena.require(
        f"the {total} experts of {spec.name}",
        on_host,
        arena.available_bytes(),
        "close other programs, or run on a machine with more memory",
    )
