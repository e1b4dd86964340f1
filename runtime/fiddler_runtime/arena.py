"""Host memory for packed experts: large, aligned, huge-page friendly."""

from __future__ import annotations

import contextlib
import mmap

import torch


def allocate(nbytes: int) -> torch.Tensor:
    """A bf16 tensor of nbytes of zeroed host memory, page-aligned, on huge pages where the system grants them.

    Memory is taken from the system page by page as it is first written.
    """
    memory = mmap.mmap(-1, nbytes + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Kernels without transparent huge pages refuse the advice; ordinary pages serve as well.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        # Parts that are on different memory nodes (Kernels.settle) do not become one mapping again, of which a process
        # may have 65,530, unless the whole had a page before.
        memory[nbytes] = 1
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=nbytes // 2)
