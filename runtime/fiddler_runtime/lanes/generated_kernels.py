"""Experts on the simulated accelerator: the generated kernels, on one core, from the packed bytes.

A layer's share is one call without Python's lock. torch's operations, one after another, would each wait for that lock
in turns with the thread of the CPU lane: what no GPU does, and no latency model describes.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch

from .. import arena
from ..kernels import KernelLibrary, make_pointers
from ..makespan import CPU, IDLE
from ..plan import ExpertForm
from .device import Device
from .expert import PackedExpert, pack_expert_into
from .kernel_choice import choose
from .recording import perform
from .resident_kernels import Choice, ExpertKernels, Held, Work

SIMULATED = Choice("packed", ((0, "unpacked"),), "simulated")


def kernels_on(device: Device, library: KernelLibrary, isa: str | None = None) -> ExpertKernels:
    """How experts are computed on that device. Close it after use.

    isa  of the simulated accelerator; None for the first usable one. On a GPU that was not seen before this measures.
    """
    form = library.spec.expert
    if device.kind == "simulated":
        return GeneratedKernels(form, library, isa)
    return ExpertKernels(form, device.torch_device, choose(form, device.torch_device))


class GeneratedKernels(ExpertKernels):
    """Of the first rows of a split expert, a shape that nothing was generated for, torch computes the share."""

    def __init__(self, form: ExpertForm, library: KernelLibrary, isa: str | None) -> None:
        super().__init__(form, torch.device("cpu"), SIMULATED)
        self._kernels = library.open(isa, 1)
        self.isa = self._kernels.isa

    def __str__(self) -> str:
        return f"generated, {self.isa}, 1 thread"

    def close(self) -> None:
        self._kernels.close()

    def hold(self, experts: MutableMapping[int, Any]) -> Held:
        for expert, room in zip(list(experts), self._rooms(len(experts)), strict=True):
            pack_expert_into(experts[expert], room.numbers)
            experts[expert] = room
        return Held(self.form, experts)

    def slot(self) -> Held:
        return Held(self.form, dict(enumerate(self._rooms(1))))

    def _rooms(self, count: int) -> list[PackedExpert]:
        if not count:
            return []
        # On huge pages, as in the CPU lane: off them weights are read more slowly.
        words = arena.allocate(count * self.form.packed_bytes).view(torch.int32)
        return [PackedExpert(self.form, room) for room in words.view(count, -1)]

    def run(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        held: Held,
        shares: Work,
        out: torch.Tensor,
    ) -> None:
        if held.form != self.form:
            super().run(hidden, rows, weights, held, shares, out)
            return
        if not shares:
            return
        # A choice for each share, of the tokens that have it.
        ids = np.full((len(hidden), len(shares)), -1, np.int64)
        scale = np.zeros(ids.shape, np.float32)
        token, factor = rows.numpy(), weights.numpy()
        for choice, share in enumerate(shares):
            part = slice(share.start, share.stop)
            ids[token[part], choice] = choice
            np.add.at(scale[:, choice], token[part], factor[part])  # some may have chosen it twice
        pointers = make_pointers([held.packed(share.expert).words.data_ptr() for share in shares])
        result = torch.empty_like(out)
        self._kernels.moe(hidden, torch.from_numpy(ids), torch.from_numpy(scale), pointers, result)
        out.add_(result)

    def run_masked(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: Held, out: torch.Tensor
    ) -> None:
        if not held.experts:
            return
        count = 1 + max(held.experts)
        strategy = np.full(count, IDLE, np.uint8)
        strategy[list(held.experts)] = CPU  # that is, of this call
        pointers = make_pointers([held.packed(e).words.data_ptr() if e in held.experts else None for e in range(count)])
        result = torch.empty_like(out)
        chosen = ids.to(torch.int64).contiguous()
        perform(self._kernels.moe, hidden, chosen, weights.contiguous(), pointers, result, strategy)
        out.add_(result)
