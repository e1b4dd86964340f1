"""What a curve is fitted to: measured times, each beside the times that the machine's limits would allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ceiling:
    """A device's bytes per microsecond and floating-point operations per microsecond."""

    bytes_per_us: float
    flops_per_us: float


@dataclass(frozen=True)
class Work:
    """Pieces of work, one per element of the float64 arrays.

    size        what the curve runs over: tokens of an expert, or bytes of a copy
    read_us     moving its bytes at the limit of the memory or link
    compute_us  its arithmetic at the limit of the device; 0 for a copy
    """

    size: Floats
    read_us: Floats
    compute_us: Floats

    def __getitem__(self, keep: npt.NDArray[np.bool_]) -> Work:
        return Work(self.size[keep], self.read_us[keep], self.compute_us[keep])

    @property
    def roofline_us(self) -> Floats:
        """The time no implementation can beat."""
        return np.maximum(self.read_us, self.compute_us)


def expert_work(hidden_size: int, intermediate_size: int, tokens: npt.ArrayLike, ceiling: Ceiling) -> Work:
    """One SwiGLU expert in bf16: 3·H·I weights read once, 6·H·I operations a token."""
    size = np.asarray(tokens, np.float64)
    weights = 3.0 * hidden_size * intermediate_size
    read = np.full_like(size, 2.0 * weights / ceiling.bytes_per_us)
    return Work(size, read, 2.0 * weights * size / ceiling.flops_per_us)


def copy_work(nbytes: npt.ArrayLike, ceiling: Ceiling) -> Work:
    """Copies of that many bytes."""
    size = np.asarray(nbytes, np.float64)
    return Work(size, size / ceiling.bytes_per_us, np.zeros_like(size))


def join(parts: Sequence[Work]) -> Work:
    """Several pieces of work as one."""
    return Work(
        np.concatenate([part.size for part in parts]),
        np.concatenate([part.read_us for part in parts]),
        np.concatenate([part.compute_us for part in parts]),
    )
