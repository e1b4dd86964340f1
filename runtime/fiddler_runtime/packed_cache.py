"""Packed experts on disk: made once from a checkpoint, then mapped by every process that runs the model.

    DIR/packed-h4096-i14336-<key>/
      layer-00003.safetensors    one decoder layer: bf16 [experts, packed_bytes / 2], sha256s in the metadata
      .lock                      held by the process that packs

The key is made of what identifies the weights, their shapes and the packed layout: a cache never serves other weights.
A layer appears complete, by one rename, or not at all: an interrupted packing goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from . import arena
from .errors import FiddlerError, FiddlerWarning
from .kernels import Kernels
from .packed_layer import FORMAT, LayerFile, LayerWriter
from .plan import LAYOUT_VERSION, ModelSpec
from .progress import BYTES, Progress
from .reading import buffers, read_ahead
from .text import format_bytes
from .weights import ExpertWeights

FOLDER = "fiddler-packed"
"""Where a cache lies beside its checkpoint."""


class PackedCache:
    """The packed experts of one model's weights. Opening it writes nothing.

    folder   the caches' common folder; this one lies in `path` below it
    weights  have passed their `check`
    Raises FiddlerError for weights that nothing identifies.
    """

    def __init__(self, folder: Path, spec: ModelSpec, weights: ExpertWeights) -> None:
        identity = weights.identity()
        if identity is None:
            raise FiddlerError(
                "these weights cannot have a packed cache",
                found="tensors in memory, which nothing identifies",
                expected="weights from a checkpoint",
                hint="leave out packed_cache",
            )
        key = _key(spec, identity)
        self.path = folder / f"packed-h{spec.hidden_size}-i{spec.intermediate_size}-{key}"
        self._spec = spec
        self._weights = weights
        self._expert_bytes = spec.expert.packed_bytes
        self._files = {
            layer: LayerFile(
                self.path / f"layer-{layer:05}.safetensors", key, spec.name, layer, spec.num_experts, self._expert_bytes
            )
            for layer in spec.moe_layers
        }

    @staticmethod
    def open(where: bool | str | Path | None, spec: ModelSpec, weights: ExpertWeights) -> PackedCache | None:
        """The cache in the folder `where`; True: beside the checkpoint; False or None: none.

        Raises FiddlerError if there is no such place, and as the constructor does.
        """
        if where is False or where is None:
            return None
        if where is not True:
            return PackedCache(Path(where), spec, weights)
        if weights.home is None:
            raise FiddlerError(
                "no place for a packed cache",
                found="weights that come from no folder",
                expected="a folder",
                hint="packed_cache='DIR'",
            )
        return PackedCache(weights.home / FOLDER, spec, weights)

    @property
    def nbytes(self) -> int:
        """Of all packed experts."""
        return len(self._files) * self._spec.num_experts * self._expert_bytes

    def missing_bytes(self) -> int:
        """Disk space that `fill` would take."""
        return sum(file.experts * file.expert_bytes for file in self._files.values() if _error(file) is not None)

    def free_bytes(self) -> int:
        """Free disk space where the cache lies or will lie."""
        return shutil.disk_usage(_existing(self.path)).free

    def fill(self, kernels: Kernels, *, drop_behind: bool = False, progress: Progress | None = None) -> int:
        """Packs the layers that are missing or broken as far as their files' headers and sizes tell; returns the bytes.

        Three things at once: an expert is read, the one before is packed by all of the kernels' threads, the one before
        that is written and hashed. Another process that packs the same cache is waited for.
        drop_behind  what was written does not stay in the page cache
        Warns (FiddlerWarning) of broken layers. Raises FiddlerError if the folder cannot be written or the disk is
        full; finished layers stay.
        """
        if self.missing_bytes() == 0:
            return 0
        with _os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with self._locked(progress):
                for stale in self.path.glob(".*.partial"):  # left by a process that was killed
                    stale.unlink()
                missing = self._missing()  # now, as another process may have packed while this one waited
                return self._pack(missing, kernels, drop_behind, progress)

    def _missing(self) -> set[int]:
        errors = {layer: _error(file) for layer, file in self._files.items()}
        for layer, error in errors.items():
            if error is not None and self._files[layer].path.exists():
                warnings.warn(f"{error.line}; it is packed again", FiddlerWarning, stacklevel=5)
        return {layer for layer, error in errors.items() if error is not None}

    def _pack(self, layers: set[int], kernels: Kernels, drop_behind: bool, progress: Progress | None) -> int:
        order = [item for item in self._weights.order(self._spec) if item[0] in layers]
        total = len(order) * self._expert_bytes
        packed = arena.allocate(self._expert_bytes)
        writers: dict[int, LayerWriter] = {}
        writing: Future[None] | None = None
        with contextlib.ExitStack() as partial, ThreadPoolExecutor(1, "fiddler-writer") as thread:
            experts = partial.enter_context(contextlib.closing(read_ahead(self._weights, order, buffers(self._spec))))
            for number, (layer, expert, read) in enumerate(experts):
                if progress is not None:
                    progress("packing experts" + BYTES, number * self._expert_bytes, total)
                if writing is not None:
                    writing.result()
                kernels.pack(*read.matrices, packed, read.biases)
                if layer not in writers:
                    writer = LayerWriter(self._files[layer], drop_behind=drop_behind)
                    writers[layer] = partial.enter_context(writer)
                writing = thread.submit(writers[layer].write, expert, packed)
            if writing is not None:
                writing.result()
        if progress is not None:
            progress("packing experts" + BYTES, total, total)
        return total

    def map(self) -> list[torch.Tensor]:
        """Every layer, mapped: bf16 [experts, packed_bytes / 2] by position in spec.moe_layers, read-only.

        All processes that map a cache share its memory; pages come from the disk when they are first used.
        Raises FiddlerError if a layer is missing or broken.
        """
        with _os_errors(self.path):
            return [file.map() for file in self._files.values()]

    def verify(self, *, threads: int, progress: Progress | None = None) -> None:
        """Reads every byte. Raises FiddlerError naming an expert that is not as it was written."""
        done = 0
        with _os_errors(self.path), ThreadPoolExecutor(threads, "fiddler-verify") as pool:
            for file in self._files.values():
                for _ in pool.map(file.check, range(file.experts), file.map(), file.hashes()):
                    if progress is not None:
                        progress("verifying" + BYTES, done, self.nbytes)
                    done += file.expert_bytes
        if progress is not None:
            progress("verifying" + BYTES, done, self.nbytes)

    @contextlib.contextmanager
    def _locked(self, progress: Progress | None) -> Iterator[None]:
        """Holds the cache's lock; a process that dies lets go of it."""
        label = "waiting for another process that packs"
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress is not None:
                    progress(label, 0, 1)
                fcntl.flock(file, fcntl.LOCK_EX)
                if progress is not None:
                    progress(label, 1, 1)
            yield


def _key(spec: ModelSpec, identity: str) -> str:
    """Everything that the bytes of a packed cache depend on."""
    parts = {
        "format": FORMAT,
        "layout": LAYOUT_VERSION,
        "weights": identity,
        "expert": dataclasses.asdict(spec.expert),
        "experts": spec.num_experts,
        "layers": spec.moe_layers,
        "tensors": dataclasses.asdict(spec.expert_tensors),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _error(file: LayerFile) -> FiddlerError | None:
    """What is wrong with a layer's file, as far as its header and size tell."""
    try:
        file.hashes()
    except FiddlerError as error:
        return error
    return None


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """What the file system refuses, in our words."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        free = f", {format_bytes(shutil.disk_usage(_existing(path)).free)} free" if full else ""
        raise FiddlerError(
            f"cannot use the packed cache {path}",
            found=(error.strerror or str(error)) + free,
            expected="a writable folder with room for it",
            hint="--packed-cache OTHER_FOLDER   (layers that are finished stay and are used next time)",
        ) from None
