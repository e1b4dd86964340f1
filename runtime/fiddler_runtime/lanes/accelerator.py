"""The accelerator's two lanes of a layer, as one piece of work for its compute queue."""

from __future__ import annotations

import time
from concurrent.futures import Future

import torch

from ..store import ExpertStore
from .device import Device
from .resident import run_resident
from .routing import Routing
from .streamed import StreamedLane

Result = tuple[torch.Tensor, float]


class AcceleratorLanes:
    """Lanes (a) and (b) of one engine."""

    def __init__(self, device: Device, store: ExpertStore, streamed: StreamedLane | None) -> None:
        self._device = device
        self._store = store
        self._streamed = streamed

    def submit(self, row: int, hidden: torch.Tensor, routing: Routing) -> Future[Result]:
        """Queues the layer's share; hidden bf16 [T, H] on the device."""
        return self._device.submit(self._run, row, hidden, routing)

    def join(self, future: Future[Result]) -> Result:
        """(out fp32 [T, H] on the device, microseconds the compute queue's thread was busy)."""
        return self._device.join(future)

    def _run(self, row: int, hidden: torch.Tensor, routing: Routing) -> Result:
        started = time.perf_counter_ns()
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        packed = self._store.packed[row]
        if routing.streamed and self._streamed is not None:
            # The copies first: the resident experts are computed while they run.
            arrivals = self._streamed.start(routing, packed)
            run_resident(hidden, routing, self._store.resident[row], out)
            self._streamed.finish(hidden, routing, packed, arrivals, out)
        else:
            run_resident(hidden, routing, self._store.resident[row], out)
        return out, (time.perf_counter_ns() - started) / 1e3
