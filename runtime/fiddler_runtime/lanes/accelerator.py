"""The accelerator's two lanes of a layer, as one piece of work for its compute queue."""

from __future__ import annotations

import time
from concurrent.futures import Future

import torch

from ..store import ExpertStore
from .device import Device
from .resident_kernels import ExpertKernels
from .routing import Routing
from .streamed import StreamedLane

Result = tuple[torch.Tensor, int]


class AcceleratorLanes:
    """Lanes (a) and (b) of one engine."""

    def __init__(
        self, device: Device, store: ExpertStore, kernels: ExpertKernels, streamed: StreamedLane | None
    ) -> None:
        self._device = device
        self._store = store
        self._kernels = kernels
        self._resident = [kernels.hold(experts) for experts in store.resident]
        self._streamed = streamed

    def submit(
        self, row: int, hidden: torch.Tensor, routing: Routing, ahead: tuple[int, int] | None = None
    ) -> Future[Result]:
        """Queues the layer's share; hidden bf16 [T, H] on the device.

        ahead  (row, expert) to fetch for a later layer once this one's copies are on their way
        """
        # Here: memory is the stream's that it was taken on, and whoever calls reads the result. The queue's thread adds
        # to it, outside the caller's inference mode.
        with torch.inference_mode(False):
            out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return self._device.submit(self._run, row, hidden, routing, ahead, out)

    def prefetch(self, row: int, expert: int) -> Future[None]:
        """Queues fetching an expert ahead, where the layer has no work for the accelerator."""
        return self._device.submit(self._fetch, row, expert)

    def join(self, future: Future[Result]) -> Result:
        """(out fp32 [T, H] on the device, time.perf_counter_ns() when the compute queue's thread was done)."""
        return self._device.join(future)

    def give_back(self, row: int) -> None:
        """Gives the accelerator the memory of experts that were taken out of the store's residents of that layer."""
        self._device.join(self._device.submit(self._kernels.give_back, self._resident[row]))
        self._device.release()

    def _run(
        self, row: int, hidden: torch.Tensor, routing: Routing, ahead: tuple[int, int] | None, out: torch.Tensor
    ) -> Result:
        packed, streamed = self._store.packed[row], self._streamed
        if streamed is None:
            self._run_resident(row, hidden, routing, out)
            return out, time.perf_counter_ns()
        # The copies first: the resident experts are computed while they run.
        arrivals = streamed.start(routing, packed)
        self._run_resident(row, hidden, routing, out)
        if routing.lent is not None:
            streamed.use_prefetched(hidden, routing, routing.lent, packed, out)
        streamed.finish(hidden, routing, packed, arrivals, out)
        done = time.perf_counter_ns()
        if ahead is not None:
            self._fetch(*ahead)
        return out, done

    def _run_resident(self, row: int, hidden: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
        """Lane (a): experts whose weights are on the accelerator; adds to out fp32 [T, H]."""
        self._kernels.run(hidden, routing.rows, routing.weights, self._resident[row], routing.resident, out)

    def run_masked(
        self, row: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Lane (a) within a captured step: see ExpertKernels.run_masked."""
        self._kernels.run_masked(hidden, ids, weights, self._resident[row], out)

    def prepare_masked(self, tokens: int, top_k: int) -> None:
        """Before the capture of a step of so many tokens: what a capture may not do, building and sending tables."""
        where, width = self._device.torch_device, self._kernels.form.hidden_size
        for held in self._resident:
            hidden = torch.zeros(tokens, width, dtype=torch.bfloat16, device=where)
            ids = torch.full((tokens, top_k), -1, dtype=torch.int64, device=where)
            self._kernels.run_masked(
                hidden,
                ids,
                torch.zeros(tokens, top_k, device=where),
                held,
                torch.zeros(tokens, width, device=where),
            )

    def _fetch(self, row: int, expert: int) -> None:
        assert self._streamed is not None
        self._streamed.prefetch(self._store.packed[row][expert])
