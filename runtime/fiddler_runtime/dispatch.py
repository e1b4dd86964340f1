"""Decides at run time, layer by layer, what runs where: from the plan's tables, in microseconds, without allocation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import FiddlerError
from .kernels import KernelLibrary, TablesStruct
from .makespan import ALL, Strategy, dense, priced
from .plan import Tables


class Dispatcher:
    """Decides with the plan's tables through the library's fdl_dispatch.

    library      a loaded kernel library
    tables       the plan's; `tables.resident` [layers, experts] says where experts are
    num_experts  columns of the resident table
    allow        strategies to choose from, see `makespan.choose`
    rows         intermediate rows of an expert where one of a layer may be split; 0: none is

    `counts` int32 [experts], `strategy` uint8 [experts], `split` int32 [2] (the expert marked SPLIT and how many of its
    rows are streamed, or -1 and 0) and `lane_us` float32 [2] (predicted CPU lane, accelerator) are views of the last
    decision, overwritten by the next. One thread at a time.
    Raises FiddlerError if only "resident" is allowed and some expert is not, or if shapes do not agree.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: Tables,
        num_experts: int,
        *,
        allow: Sequence[Strategy | str] = ALL,
        rows: int = 0,
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
        self.split: npt.NDArray[np.int32] = np.array([-1, 0], np.int32)
        self.lane_us: npt.NDArray[np.float32] = np.zeros(2, np.float32)
        self._library = library
        self._lent: list[tuple[int, int, int]] = []

        # Kept alive here: the native side holds pointers into them.
        masked = tables.resident if "resident" in allow else np.zeros_like(tables.resident)
        self._resident = np.array(masked, np.uint8, order="C")
        self._latencies = priced(dense(tables, rows=rows), self.allow)
        struct = TablesStruct(
            self._latencies.cpu_us.ctypes.data,
            self._latencies.gpu_us.ctypes.data,
            len(self._latencies.cpu_us),
            self._latencies.cpu_overhead_us,
            self._latencies.gpu_overhead_us,
            self._latencies.stream_us,
            self._latencies.contention,
            self._latencies.rows,
        )
        self._struct = struct
        self._tables = ctypes.byref(struct)
        self._rows = [ctypes.c_void_p(row.ctypes.data) for row in self._resident]
        self._experts = ctypes.c_int32(num_experts)
        self._counts = ctypes.c_void_p(self.counts.ctypes.data)
        self._strategy = ctypes.c_void_p(self.strategy.ctypes.data)
        self._split = ctypes.c_void_p(self.split.ctypes.data)
        self._lane_us = ctypes.c_void_p(self.lane_us.ctypes.data)
        self._function = _holding_the_gil(library)

    def decide(self, layer: int, topk_ids: torch.Tensor) -> npt.NDArray[np.uint8]:
        """The strategy of every expert of a layer, uint8 [experts] (IDLE, RESIDENT, STREAMED, CPU, SPLIT).

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
            self._split,
            self._lane_us,
        )
        if status:
            self._library.check(status, "dispatch a layer")
        return self.strategy

    def native_tables(self) -> tuple[int, int]:
        """Addresses of the fdl_tables and of resident uint8 [layers, experts]: valid as long as this object lives."""
        return ctypes.addressof(self._struct), int(self._resident.ctypes.data)

    def move_out(self, layer: int, expert: int) -> None:
        """That expert is not resident any more."""
        self._resident[layer, expert] = 0

    def lend(self, layer: int, expert: int) -> None:
        """Until `take_back`, decides as if that expert were resident: its weights are on their way for this step."""
        self._lent.append((layer, expert, int(self._resident[layer, expert])))
        self._resident[layer, expert] = 1

    def take_back(self) -> None:
        """Ends what `lend` began."""
        while self._lent:
            layer, expert, before = self._lent.pop()
            self._resident[layer, expert] = before


def _holding_the_gil(library: KernelLibrary) -> Any:
    """fdl_dispatch bound so that the call keeps the GIL: it takes microseconds, getting the GIL back can take 5 ms."""
    function = ctypes.PyDLL(str(library.path)).fdl_dispatch
    function.restype = library.native.fdl_dispatch.restype
    function.argtypes = library.native.fdl_dispatch.argtypes
    return function
