"""`fiddlerc pack`: a packed cache, ahead of time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import fiddler_runtime
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.loading import open_library
from fiddler_runtime.packed_cache import PackedCache
from fiddler_runtime.preflight import survey_packing
from fiddler_runtime.progress import Progress

from .loading import OnPreflight


@dataclass(frozen=True)
class PackRequest:
    """What `fiddlerc pack` was asked. packed_cache: a folder, or True for beside the checkpoint."""

    model_dir: Path
    packed_cache: bool | Path = True
    verify: bool = False
    threads: int | None = None
    trust_binaries: bool = False


@dataclass(frozen=True)
class PackResult:
    """Where the cache lies, its size, how much of it was written now, and what that took.

    verify_s  of reading every byte; None where that was not asked for
    """

    path: str
    experts: int
    total_bytes: int
    written_bytes: int
    pack_s: float
    verify_s: float | None


def pack(
    plan: Path, request: PackRequest, *, progress: Progress | None = None, on_preflight: OnPreflight | None = None
) -> PackResult:
    """Packs what is missing of the model's cache, then reads all of it if asked to.

    Raises FiddlerError for too little disk or memory before any work; for a full disk; for bytes that have changed.
    """
    loaded = fiddler_runtime.load_plan(plan, trust_binaries=request.trust_binaries)
    spec = loaded.header.model
    weights = fiddler_runtime.ExpertWeights.load(request.model_dir)
    weights.check(spec)
    cache = PackedCache.open(request.packed_cache, spec, weights)
    if cache is None:
        raise FiddlerError("no place for a packed cache", found="False", expected="a folder", hint="--packed-cache DIR")
    needs = survey_packing(spec, cache)
    if on_preflight is not None:
        on_preflight(needs)
    needs.check()
    weights.drop_behind = needs.crowded
    with open_library(loaded, progress=progress).open(threads=request.threads) as kernels:
        started = time.perf_counter()
        written = cache.fill(kernels, drop_behind=needs.crowded, progress=progress)
        packed = time.perf_counter()
        if request.verify:
            cache.verify(threads=kernels.threads, progress=progress)
        verified = time.perf_counter()
    return PackResult(
        path=str(cache.path),
        experts=spec.total_experts,
        total_bytes=cache.nbytes,
        written_bytes=written,
        pack_s=packed - started,
        verify_s=verified - packed if request.verify else None,
    )
