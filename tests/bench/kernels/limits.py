"""The machine's limits around a call: read bandwidth of the memory that holds the weights, peak of the multiplies."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fiddler_runtime.build import build_kernels
from fiddler_runtime.kernels import Kernels

_PEAK_MS = 3.0
_ROUNDS = 7


class Limits:
    """Probes with a number of threads.

    read_loop  the read loop in use, by name: the fastest that `choose_read_loop` found
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        native: Any = ctypes.CDLL(str(build_kernels(Path(__file__).parents[1] / "limits")))
        native.limits_loop_name.restype = ctypes.c_char_p
        native.limits_read.restype = ctypes.c_double
        native.limits_read.argtypes = [
            ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32,
        ]  # fmt: skip
        self._native = native
        self._loop = 0
        self.names: list[str] = [native.limits_loop_name(i).decode() for i in range(native.limits_loops())]

    @property
    def read_loop(self) -> str:
        return self.names[self._loop]

    def read_gbps(self, regions: Sequence[torch.Tensor]) -> float:
        """GB/s of all threads reading the regions once."""
        addresses = (ctypes.c_void_p * len(regions))(*(region.data_ptr() for region in regions))
        sizes = (ctypes.c_int64 * len(regions))(*(region.nbytes for region in regions))
        seconds = self._native.limits_read(self._loop, addresses, sizes, len(regions), self._kernels.threads)
        return sum(sizes) / seconds / 1e9

    def peak_gflops(self) -> float:
        """GFLOP/s of all threads doing nothing but the kernel's multiply instruction."""
        return self._kernels.peak_gflops(_PEAK_MS)

    def choose_read_loop(self, regions: Sequence[torch.Tensor]) -> dict[str, float]:
        """Takes the read loop that is fastest on this memory. Returns the median GB/s of each."""
        rates: dict[str, list[float]] = {name: [] for name in self.names}
        for _ in range(_ROUNDS):
            for loop, name in enumerate(self.names):
                self._loop = loop
                rates[name].append(self.read_gbps(regions))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        self._loop = max(range(len(self.names)), key=lambda i: medians[self.names[i]])
        return medians
