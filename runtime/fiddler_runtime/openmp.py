"""The threads that torch's CPU operations run on, for our own parallel regions.

After each of its regions torch's OpenMP threads spin for milliseconds, waiting for the next. Threads of our own would
share the CPUs with them; regions on the same team start at once instead.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class TeamStruct(ctypes.Structure):
    """struct fdl_team."""

    _fields_ = (("parallel", ctypes.c_void_p), ("thread_num", ctypes.c_void_p))


def torch_team(threads: int) -> TeamStruct | None:
    """torch's team of the calling thread.

    None if torch does not run on just as many threads (a team that changes its size at every region is slow), or if no
    OpenMP runtime of the GNU interface is found in it (LLVM's and Intel's have that too).
    """
    if threads == 1 or torch.get_num_threads() != threads:
        return None
    try:
        # Looked up through torch's library, so that it is the runtime torch uses, should there be several.
        native = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = native.GOMP_parallel, native.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    return TeamStruct(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
