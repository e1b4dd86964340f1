"""What a machine is, as far as a plan depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AcceleratorKind = Literal["cuda", "simulated", "none"]


@dataclass(frozen=True)
class Accelerator:
    """The device that runs strategies (a) and (b).

    `simulated` is torch on the CPU in a thread of its own: the same decisions and data movement without a GPU.
    """

    kind: AcceleratorKind
    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """The record that hw.json, plans and benchmarks carry. isa lists our kernel ISAs that run here, best first."""

    cpu: str
    cores: int
    isa: tuple[str, ...]
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    numa_nodes: int
    memory_bytes: int
    accelerator: Accelerator
