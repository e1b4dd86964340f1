"""Latency of the kernels' thread pool: parallel regions with nothing to do."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fiddler_runtime.build import build_kernels
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import usable_cores

_REGIONS = 2000
_GAPS_US = (0, 20, 1000)
_SOURCES = Path(__file__).parents[1] / "pool"
_HEADERS = Path(__file__).parents[3] / "templates" / "include"


def measure(threads: int) -> list[dict[str, Any]]:
    """Median and 99th percentile, in us, of empty regions and of regions that all threads enter, by the gap between.

    After 20 us the workers still spin; after 1,000 us they sleep and have to be woken.
    """
    if threads > usable_cores():
        raise FiddlerError(
            "more threads than CPUs tell nothing of the pool", found=threads, expected=f"at most {usable_cores()}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(_SOURCES, folder, dirs_exist_ok=True)
        shutil.copytree(_HEADERS, folder / "include")
        native: Any = ctypes.CDLL(str(build_kernels(folder)))
    native.pool_open.restype = ctypes.c_void_p
    native.pool_close.argtypes = (ctypes.c_void_p,)
    pool = native.pool_open(threads)
    rows = []
    for gap in _GAPS_US:
        row: dict[str, Any] = {"threads": threads, "gap_us": gap}
        for name in ("empty", "meet"):
            run = getattr(native, f"pool_{name}")
            run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
            run.restype = None
            times = np.zeros(_REGIONS, np.int64)
            run(pool, gap * 1000, _REGIONS, times.ctypes.data)
            row[name] = {"median_us": float(np.median(times)) / 1e3, "p99_us": float(np.quantile(times, 0.99)) / 1e3}
        rows.append(row)
    native.pool_close(pool)
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """As a table."""
    lines = [
        "| threads | us between regions | empty region: median, p99 us | all threads meet: median, p99 us |",
        "| --- " * 4 + "|",
    ]
    for row in rows:
        empty, meet = (f"{row[k]['median_us']:.2f}, {row[k]['p99_us']:.2f}" for k in ("empty", "meet"))
        lines.append(f"| {row['threads']} | {row['gap_us']} | {empty} | {meet} |")
    return "\n".join(lines)
