"""Lane (b): experts whose weights are copied to the accelerator for this step, one while the one before is computed.

A split expert's first rows come the same way, and with `prefetch` an expert that the next layer is likely to need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch

from ..plan import packed_bytes
from .device import Device, Ticket
from .expert import DOWN_LANES, GATE_UP_LANES, run_expert, unpack_expert_into
from .routing import Routing, Share

SLOTS = 2


class StreamedLane:
    """Two staging slots on the accelerator, one more for prefetching, and one landing buffer for packed weights.

    The copy engine copies a packed expert to the landing buffer and unpacks it into a free slot, while the compute
    queue works from another slot. All methods run in the device's compute queue.
    """

    def __init__(self, device: Device, hidden_size: int, intermediate_size: int, *, prefetch: bool) -> None:
        def room(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device.torch_device)

        slots = SLOTS + prefetch
        self._device = device
        self._hidden_size, self._intermediate_size = hidden_size, intermediate_size
        self._landing = room(packed_bytes(hidden_size, intermediate_size) // 2)
        self._slots = [
            (room(2 * intermediate_size * hidden_size), room(hidden_size * intermediate_size)) for _ in range(slots)
        ]
        # A slot may be overwritten after this ticket: the last computation that reads it.
        self._free: list[Ticket] = [None] * slots
        self._fetched: Ticket = None

    def start(self, routing: Routing, packed: Mapping[int, torch.Tensor]) -> deque[Ticket]:
        """Starts the first copies, as many as there are slots; resident experts can be computed meanwhile."""
        return deque(self._fetch(slot, packed, share) for slot, share in enumerate(routing.streamed[:SLOTS]))

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
            self._compute(slot, hidden, routing, share, arrivals.popleft(), out)
            if index + SLOTS < len(routing.streamed):
                arrivals.append(self._fetch(slot, packed, routing.streamed[index + SLOTS]))

    def prefetch(self, packed: torch.Tensor) -> None:
        """Starts to copy an expert that a later call of `use_prefetched` may want; the one before is forgotten."""
        self._fetched = self._device.on_copy_engine(self._copy, SLOTS, packed, None, after=self._free[SLOTS])

    def use_prefetched(self, hidden: torch.Tensor, routing: Routing, share: Share, out: torch.Tensor) -> None:
        """Computes `share` with the weights of the last `prefetch`; adds to out fp32 [T, H]."""
        self._compute(SLOTS, hidden, routing, share, self._fetched, out)

    def _compute(
        self, slot: int, hidden: torch.Tensor, routing: Routing, share: Share, arrival: Ticket, out: torch.Tensor
    ) -> None:
        self._device.wait(arrival)
        part = slice(share.start, share.stop)
        run_expert(hidden, routing.rows[part], routing.weights[part], *self._matrices(slot, share.first), out)
        self._free[slot] = self._device.mark()

    def _fetch(self, slot: int, packed: Mapping[int, torch.Tensor], share: Share) -> Ticket:
        return self._device.on_copy_engine(self._copy, slot, packed[share.expert], share.first, after=self._free[slot])

    def _copy(self, slot: int, packed: torch.Tensor, first: int | None) -> None:
        if first is None:
            landed = self._landing
            landed.copy_(packed, non_blocking=True)
        else:
            landed = copy_first_rows(packed, self._landing, self._hidden_size, self._intermediate_size, first)
        unpack_expert_into(landed, *self._matrices(slot, first))

    def _matrices(self, slot: int, first: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2 rows, H] and down [H, rows] in a slot; all rows of an expert, or the first `first`."""
        rows, hidden = self._intermediate_size if first is None else first, self._hidden_size
        gate_up, down = self._slots[slot]
        return gate_up[: 2 * rows * hidden].view(2 * rows, hidden), down[: hidden * rows].view(hidden, rows)


def copy_first_rows(
    packed: torch.Tensor, landing: torch.Tensor, hidden_size: int, intermediate_size: int, rows: int
) -> torch.Tensor:
    """Copies the first `rows` (a multiple of 64) intermediate rows of a packed expert to the beginning of `landing`.

    There they are the packed layout of an expert of hidden_size x rows (docs/kernels.md): the returned part of landing.
    Every piece is one contiguous copy: a strided one from the host would be gathered on the CPU first.
    """
    pairs, all_pairs = rows // 2, -(-intermediate_size // 2)
    gate_up = rows // GATE_UP_LANES * -(-hidden_size // 2) * 4 * GATE_UP_LANES
    whole = -(-intermediate_size // GATE_UP_LANES) * -(-hidden_size // 2) * 4 * GATE_UP_LANES
    landing[:gate_up].copy_(packed[:gate_up], non_blocking=True)
    size = pairs * DOWN_LANES * 2
    for block in range(-(-hidden_size // DOWN_LANES)):
        source = whole + block * all_pairs * DOWN_LANES * 2
        target = gate_up + block * size
        landing[target : target + size].copy_(packed[source : source + size], non_blocking=True)
    return landing[: packed_bytes(hidden_size, rows) // 2]
