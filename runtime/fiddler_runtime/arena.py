"""Host memory for packed experts: large, aligned, huge-page friendly, and counted before it is asked for."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch

from .errors import FiddlerError
from .text import format_bytes


def allocate(nbytes: int) -> torch.Tensor:
    """A bf16 tensor of nbytes of zeroed host memory, page-aligned, on huge pages where the system grants them.

    Memory is taken from the system page by page as it is first written.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Kernels without transparent huge pages refuse the advice; ordinary pages serve as well.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def available_bytes() -> int:
    """Host memory that can still be had: what the system reports as available, within the control group's limit."""
    available = _meminfo("MemAvailable")
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" without a limit
        used = int((group / "memory.current").read_text())
        reclaimable = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        available = min(available, limit - used + reclaimable)
    return available


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise FiddlerError("cannot tell how much memory is free", found=f"no {key} in /proc/meminfo")


def require(what: str, needed: int, available: int, hint: str) -> None:
    """Raises FiddlerError, with both figures, if less is available than needed."""
    if needed > available:
        raise FiddlerError(
            f"not enough memory for {what}",
            found=f"{format_bytes(available)} available",
            expected=f"{format_bytes(needed)}",
            hint=hint,
        )
