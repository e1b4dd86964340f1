"""Host memory for packed experts: large, aligned, huge-page friendly."""

from __future__ import annotations

import contextlib
import mmap

import torch

_HUGE = 2 << 20  # of x86-64


def allocate(nbytes: int) -> torch.Tensor:
    """A bf16 tensor of nbytes of zeroed host memory, page-aligned, on huge pages where the system grants them.

    Memory is taken from the system page by page as it is first written.
    """
    # Linux, from 6.7 on, begins a mapping at a huge page if its length is a multiple of one.
    length = (nbytes + mmap.PAGESIZE + _HUGE - 1) // _HUGE * _HUGE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(memory, "MADV_NOHUGEPAGE")
    # A page beyond the end: parts that are on different memory nodes (Kernels.settle) become one mapping again, of
    # which a process may have 65,530, only if the whole had a page before.
    memory[length - 1] = 1
    _advise(memory, "MADV_HUGEPAGE")
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=nbytes // 2)


def _advise(memory: mmap.mmap, advice: str) -> None:
    # Kernels without transparent huge pages refuse the advice; ordinary pages serve as well.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(getattr(mmap, advice))
