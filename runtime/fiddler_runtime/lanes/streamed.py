"""Lane (b): experts whose weights are copied to the accelerator for this step, one while the one before is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch

from .device import Device, Ticket
from .expert import run_expert, unpack_expert_into
from .routing import Routing

SLOTS = 2


class StreamedLane:
    """Two staging slots on the accelerator and one landing buffer for packed weights.

    The copy engine copies a packed expert to the landing buffer and unpacks it into a free slot, while the compute
    queue works from the other slot. `start` and `finish` run in the device's compute queue.
    """

    def __init__(self, device: Device, hidden_size: int, intermediate_size: int, packed_bytes: int) -> None:
        def room(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device.torch_device)

        self._device = device
        self._landing = room(packed_bytes // 2)
        self._slots = [
            (room(2 * intermediate_size, hidden_size), room(hidden_size, intermediate_size)) for _ in range(SLOTS)
        ]
        # A slot may be overwritten after this ticket: the last computation that reads it.
        self._free: list[Ticket] = [None] * SLOTS

    def start(self, routing: Routing, packed: Mapping[int, torch.Tensor]) -> deque[Ticket]:
        """Starts the first copies, as many as there are slots; resident experts can be computed meanwhile."""
        return deque(self._fetch(slot, packed[share.expert]) for slot, share in enumerate(routing.streamed[:SLOTS]))

    def finish(
        self,
        hidden: torch.Tensor,
        routing: Routing,
        packed: Mapping[int, torch.Tensor],
        arrivals: deque[Ticket],
        out: torch.Tensor,
    ) -> None:
        """Computes the streamed experts in the order in which they arrive; adds to out fp32 [T, H]."""
        for index, share in enumerate(routing.streamed):
            slot = index % SLOTS
            self._device.wait(arrivals.popleft())
            part = slice(share.start, share.stop)
            run_expert(hidden, routing.rows[part], routing.weights[part], *self._slots[slot], out)
            self._free[slot] = self._device.mark()
            if index + SLOTS < len(routing.streamed):
                arrivals.append(self._fetch(slot, packed[routing.streamed[index + SLOTS].expert]))

    def _fetch(self, slot: int, packed: torch.Tensor) -> Ticket:
        return self._device.on_copy_engine(self._copy, slot, packed, after=self._free[slot])

    def _copy(self, slot: int, packed: torch.Tensor) -> None:
        self._landing.copy_(packed, non_blocking=True)
        unpack_expert_into(self._landing, *self._slots[slot])
