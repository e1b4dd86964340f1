"""Per-layer decisions at run time: a look-up in the plan's tables, in microseconds and without allocation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import FiddlerError
from .kernels import KernelLibrary, TablesStruct
from .makespan import ALL, CPU, IDLE, RESIDENT, STREAMED, Decision, Latencies, Strategy, choose, dense
from .plan import Tables

__all__ = [
    "ALL",
    "CPU",
    "IDLE",
    "RESIDENT",
    "STREAMED",
    "Decision",
    "Dispatcher",
    "Latencies",
    "Strategy",
    "choose",
    "dense",
]

# Longer than anything, yet a thousand of them still fit a float: what is not allowed is priced so that it never pays.
_NEVER_US = 1e30


class Dispatcher:
    """Decides with the plan's tables through the library's fdl_dispatch.

    library      a loaded kernel library
    tables       the plan's; `tables.resident` [layers, experts] says where experts are
    num_experts  columns of the resident table
    allow        strategies to choose from, see `makespan.choose`

    `counts` int32 [experts], `strategy` uint8 [experts] and `lane_us` float32 [2] (predicted CPU lane, accelerator)
    are views of the last decision, overwritten by the next. One thread at a time.
    Raises FiddlerError if only "resident" is allowed and some expert is not, or if shapes do not agree.
    """

    def __init__(
        self, library: KernelLibrary, tables: Tables, num_experts: int, *, allow: Sequence[Strategy | str] = ALL
    ) -> None:
        unknown = sorted(set(allow) - set(ALL))
        if unknown or not allow:
            raise FiddlerError(
                "cannot dispatch with these strategies",
                found=", ".join(unknown) or "none",
                expected="one or more of " + ", ".join(ALL),
            )
        if tables.resident.ndim != 2 or tables.resident.shape[1] != num_experts:
            raise FiddlerError(
                "the tables are of another model",
                found=f"residents {list(tables.resident.shape)}",
                expected=f"[layers, {num_experts}]",
            )
        if set(allow) == {"resident"} and not tables.resident.all():
            raise FiddlerError(
                "not every expert is on the accelerator, and no other strategy is allowed",
                found=f"{int(tables.resident.sum())} of {tables.resident.size} resident",
                expected="all of them",
                hint="--strategies resident,cpu",
            )
        self.allow = tuple(strategy for strategy in ALL if strategy in allow)
        self.counts: npt.NDArray[np.int32] = np.zeros(num_experts, np.int32)
        self.strategy: npt.NDArray[np.uint8] = np.zeros(num_experts, np.uint8)
        self.lane_us: npt.NDArray[np.float32] = np.zeros(2, np.float32)
        self._library = library

        # Kept alive here: the native side holds pointers into them.
        masked = tables.resident if "resident" in allow else np.zeros_like(tables.resident)
        self._resident = np.ascontiguousarray(masked, np.uint8)
        self._latencies = _priced(dense(tables), self.allow)
        struct = TablesStruct(
            self._latencies.cpu_us.ctypes.data,
            self._latencies.gpu_us.ctypes.data,
            len(self._latencies.cpu_us),
            self._latencies.cpu_overhead_us,
            self._latencies.gpu_overhead_us,
            self._latencies.stream_us,
            self._latencies.contention,
        )
        self._tables = ctypes.byref(struct)
        self._rows = [ctypes.c_void_p(row.ctypes.data) for row in self._resident]
        self._experts = ctypes.c_int32(num_experts)
        self._counts = ctypes.c_void_p(self.counts.ctypes.data)
        self._strategy = ctypes.c_void_p(self.strategy.ctypes.data)
        self._lane_us = ctypes.c_void_p(self.lane_us.ctypes.data)
        self._function = _holding_the_gil(library)

    def decide(self, layer: int, topk_ids: torch.Tensor) -> npt.NDArray[np.uint8]:
        """The strategy of every expert of a layer, uint8 [experts] (IDLE, RESIDENT, STREAMED, CPU): `self.strategy`.

        layer     row of the resident table
        topk_ids  int64, contiguous, on the CPU, any shape; ids outside [0, experts) belong to no expert
        """
        if topk_ids.dtype is not torch.int64 or not topk_ids.is_contiguous() or not topk_ids.is_cpu:
            raise FiddlerError(
                "wrong top-k ids to dispatch",
                found=f"{topk_ids.dtype}, strides {tuple(topk_ids.stride())}, on {topk_ids.device}",
                expected="int64, contiguous, on the CPU",
            )
        status = self._function(
            self._tables,
            topk_ids.data_ptr(),
            topk_ids.numel(),
            self._rows[layer],
            self._experts,
            self._counts,
            self._strategy,
            self._lane_us,
        )
        if status:
            self._library.check(status, "dispatch a layer")
        return self.strategy


def _priced(latencies: Latencies, allow: Sequence[str]) -> Latencies:
    """The same latencies, with what is not allowed at a price that is never the least."""
    cpu_us, stream_us = latencies.cpu_us, latencies.stream_us
    if "cpu" not in allow:
        cpu_us = np.where(np.arange(len(cpu_us)) > 0, np.float32(_NEVER_US), np.float32(0))
    if "streamed" not in allow:
        stream_us = _NEVER_US
    return Latencies(
        cpu_us=cpu_us,
        gpu_us=latencies.gpu_us,
        cpu_overhead_us=latencies.cpu_overhead_us,
        gpu_overhead_us=latencies.gpu_overhead_us,
        stream_us=stream_us,
        contention=latencies.contention,
    )


def _holding_the_gil(library: KernelLibrary) -> Any:
    """fdl_dispatch bound so that the call keeps the GIL: it takes microseconds, getting the GIL back can take 5 ms."""
    function = ctypes.PyDLL(str(library.path)).fdl_dispatch
    function.restype = library.native.fdl_dispatch.restype
    function.argtypes = library.native.fdl_dispatch.argtypes
    return function
