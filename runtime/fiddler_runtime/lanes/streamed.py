"""Lane (b): experts whose weights are copied to the accelerator for this step, one while the one before is computed.

A split expert's first rows come the same way, and with `prefetch` an expert that the next layer is likely to need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..plan import STREAM_SLOTS, ExpertForm
from .device import Device, Ticket
from .expert import DOWN_LANES, GATE_UP_LANES
from .resident_kernels import ExpertKernels, Held
from .routing import Routing, Share


class StreamedLane:
    """Two staging slots on the accelerator, and one more for prefetching.

    The copy engine copies a packed expert into a free slot, or to where it is unpacked from into one, as the kernels
    want it; the compute queue works from another slot. All methods run in the device's compute queue.
    """

    def __init__(self, device: Device, kernels: ExpertKernels, *, prefetch: bool) -> None:
        slots = STREAM_SLOTS + prefetch
        self._device = device
        self._kernels = kernels
        self._slots = [kernels.slot() for _ in range(slots)]
        # A slot may be overwritten after this ticket: the last computation that reads it. At first, what the caller's
        # stream had been given, since a slot's memory may have been something else's until then.
        self._free: list[Ticket] = [device.join(device.submit(device.mark))] * slots
        self._fetched: tuple[torch.Tensor, Ticket] | None = None

    def start(self, routing: Routing, packed: Mapping[int, torch.Tensor]) -> deque[Ticket]:
        """Starts the first copies, as many as there are slots; resident experts can be computed meanwhile."""
        return deque(self._fetch(slot, packed, share) for slot, share in enumerate(routing.streamed[:STREAM_SLOTS]))

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
            slot = index % STREAM_SLOTS
            self._compute(slot, hidden, routing, share, arrivals.popleft(), out)
            if index + STREAM_SLOTS < len(routing.streamed):
                arrivals.append(self._fetch(slot, packed, routing.streamed[index + STREAM_SLOTS]))

    def prefetch(self, packed: torch.Tensor) -> None:
        """Starts to copy an expert that a later call of `use_prefetched` may want; the one before is forgotten."""
        self._fetched = None  # should the copy fail to start
        arrival = self._device.on_copy_engine(self._copy, STREAM_SLOTS, packed, None, after=self._free[STREAM_SLOTS])
        self._fetched = packed, arrival

    def use_prefetched(
        self,
        hidden: torch.Tensor,
        routing: Routing,
        share: Share,
        packed: Mapping[int, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """Computes `share` with the weights of the last `prefetch`; adds to out fp32 [T, H]."""
        # Nobody waits for a prefetch, so nobody saw it fail.
        if self._fetched is None or self._fetched[0] is not packed[share.expert]:
            self.prefetch(packed[share.expert])
        assert self._fetched is not None
        self._compute(STREAM_SLOTS, hidden, routing, share, self._fetched[1], out)

    def _compute(
        self, slot: int, hidden: torch.Tensor, routing: Routing, share: Share, arrival: Ticket, out: torch.Tensor
    ) -> None:
        self._device.wait(arrival)
        one = [replace(share, expert=0)]  # a slot's own
        self._kernels.run(hidden, routing.rows, routing.weights, self._slot(slot, share.first), one, out)
        self._free[slot] = self._device.mark()

    def _fetch(self, slot: int, packed: Mapping[int, torch.Tensor], share: Share) -> Ticket:
        return self._device.on_copy_engine(self._copy, slot, packed[share.expert], share.first, after=self._free[slot])

    def _copy(self, slot: int, packed: torch.Tensor, first: int | None) -> None:
        landing = self._kernels.landing(self._slots[slot])
        if first is None:
            landing.copy_(packed, non_blocking=True)
        else:
            landing = copy_first_rows(packed, landing, self._kernels.form, first)
        self._kernels.landed(landing, self._slot(slot, first))

    def _slot(self, slot: int, first: int | None) -> Held:
        """A slot for all rows of an expert, or for the first `first`."""
        held = self._slots[slot]
        return held if first is None else self._kernels.first_rows(held, first)


def copy_first_rows(packed: torch.Tensor, landing: torch.Tensor, form: ExpertForm, rows: int) -> torch.Tensor:
    """Copies the first `rows` (a multiple of 64) intermediate rows of a packed expert to the beginning of `landing`.

    There they are the packed layout of an expert of so many rows (docs/kernels.md): the returned part of landing. Its
    down biases are zero, since whoever computes the other rows adds them. Every piece is one contiguous copy: a strided
    one from the host would be gathered on the CPU first.
    """
    pairs, all_pairs = rows // 2, -(-form.intermediate_size // 2)
    hidden_pairs, down_blocks = -(-form.hidden_size // 2), -(-form.hidden_size // DOWN_LANES)
    gate_up = rows // GATE_UP_LANES * hidden_pairs * 4 * GATE_UP_LANES
    whole = -(-form.intermediate_size // GATE_UP_LANES) * hidden_pairs * 4 * GATE_UP_LANES
    landing[:gate_up].copy_(packed[:gate_up], non_blocking=True)
    size, whole_size = pairs * DOWN_LANES * 2, all_pairs * DOWN_LANES * 2
    for block in range(down_blocks):
        source, target = whole + block * whole_size, gate_up + block * size
        landing[target : target + size].copy_(packed[source : source + size], non_blocking=True)
    part = landing[: replace(form, intermediate_size=rows).packed_bytes // 2]
    if form.bias:
        biases = rows // GATE_UP_LANES * DOWN_LANES * 2
        source, target = whole + down_blocks * whole_size, gate_up + down_blocks * size
        part[target : target + biases].copy_(packed[source : source + biases], non_blocking=True)
        part[target + biases :].zero_()
    return part
