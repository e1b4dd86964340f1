"""What a strategy is, and the arithmetic that several share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..ir import Steps
from .setting import Bools, Floats, Setting

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepTimes:
    """us float64 [steps]: whole steps; hits int64 [steps]: expert choices that found their expert on the
    accelerator."""

    us: Floats
    hits: Ints


class Policy(Protocol):
    """One strategy. Frozen: what it carries from step to step lives in one call of `replay`.

    kernels            whose CPU kernels its times are of
    needs_accelerator  it has nothing to do without one
    chunk_tokens       prompts are computed in parts of at most so many tokens; 0: at once
    beams_together     the beams of a search are one batch; otherwise one step after the other
    """

    @property
    def name(self) -> str: ...
    @property
    def kernels(self) -> str: ...
    @property
    def needs_accelerator(self) -> bool: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def beams_together(self) -> bool: ...

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """The steps one after the other."""
        ...


@dataclass(frozen=True)
class Strategy:
    """What most strategies have in common."""

    name: str
    kernels: str = "ours"
    needs_accelerator: bool = True
    chunk_tokens: int = 0
    beams_together: bool = True


def hits(counts: npt.NDArray[np.integer], resident: Bools) -> Ints:
    """Choices of resident experts, int64 [steps]: counts [steps, layers, experts], resident [layers, experts]."""
    found: Ints = np.where(resident, counts, 0).sum(axis=(1, 2), dtype=np.int64)
    return found


def arrivals_us(gpu_us: Floats, copied: Bools, start_us: Floats, stream_us: float) -> Floats:
    """When the accelerator has computed everything, float64 [steps].

    gpu_us, copied [steps, experts]: the copied ones come one after the other, in order of index, and are computed as
    they arrive, after `start_us` [steps] of other work.
    """
    finish, arrived = start_us.copy(), np.zeros(len(start_us))
    for expert in np.flatnonzero(copied.any(axis=0)):
        one = copied[:, expert]
        arrived = arrived + np.where(one, stream_us, 0.0)
        finish = np.where(one, np.maximum(finish, arrived) + gpu_us[:, expert], finish)
    return finish


def overlapped_us(counts: Ints, resident: Bools, copied: Bools, setting: Setting) -> Floats:
    """A layer whose CPU and accelerator work side by side, float64 [steps]; counts, copied [steps, experts]."""
    lat = setting.latencies
    at_home = (counts > 0) & resident
    on_cpu = (counts > 0) & ~resident & ~copied
    gpu = setting.gpu_us(counts)
    accelerator = arrivals_us(gpu, copied, np.where(at_home, gpu, 0.0).sum(axis=1), lat.stream_us)
    accelerator = np.where((at_home | copied).any(axis=1), accelerator + lat.gpu_overhead_us, 0.0)
    slow = np.where(copied.any(axis=1), 1.0 + lat.contention, 1.0)
    cpu = lat.cpu_overhead_us + slow * np.where(on_cpu, setting.cpu_us(counts), 0.0).sum(axis=1)
    return np.maximum(np.where(on_cpu.any(axis=1), cpu, 0.0), accelerator)
