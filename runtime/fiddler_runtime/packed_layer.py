"""One layer of a packed cache: a safetensors file that appears complete or not at all."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import FiddlerError
from .safetensors_header import read_header

FORMAT = "fiddler-packed/1"
_TENSOR = "experts"
_PAGE = 4096  # the data begin at a multiple of this


@dataclass(frozen=True)
class LayerFile:
    """Where a layer's packed experts lie, or will lie.

    key           of the cache: a file of another one is refused
    experts       of the layer, expert_bytes each
    """

    path: Path
    key: str
    model: str
    layer: int
    experts: int
    expert_bytes: int

    def hashes(self) -> list[str]:
        """The sha256 that was recorded for each expert.

        Raises FiddlerError if the file is missing, shorter or longer than its header says, or another's.
        """
        what = f"the packed layer {self.path}"
        try:
            header = read_header(self.path, what)
        except FiddlerError as error:
            raise FiddlerError(what=error.what, found=error.found, expected=error.expected, hint=self._again) from None
        hashes = header.metadata.get("sha256", "").split()
        info = header.tensors.get(_TENSOR)
        if (
            (header.metadata.get("format"), header.metadata.get("key")) != (FORMAT, self.key)
            or header.metadata.get("layer") != str(self.layer)
            or info is None
            or (info.dtype, info.shape) != ("BF16", (self.experts, self.expert_bytes // 2))
            or info.offset % _PAGE != 0
            or len(hashes) != self.experts
        ):
            raise FiddlerError(
                f"{what} is not of this cache",
                found=", ".join(f"{key} {header.metadata.get(key)}" for key in ("format", "key", "layer")),
                expected=f"format {FORMAT}, key {self.key}, layer {self.layer}",
                hint=self._again,
            )
        return hashes

    def map(self) -> torch.Tensor:
        """bf16 [experts, expert_bytes / 2], read-only; its pages are shared by all processes that map the file.

        Raises FiddlerError as `hashes` does.
        """
        self.hashes()
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        nbytes = self.experts * self.expert_bytes
        with warnings.catch_warnings():
            # torch cannot mark a tensor as read-only, and says so.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(memory, dtype=torch.bfloat16, count=nbytes // 2, offset=len(memory) - nbytes)
        return flat.view(self.experts, -1)

    def check(self, expert: int, packed: torch.Tensor, recorded: str) -> None:
        """Raises FiddlerError unless a mapped expert has the sha256 that was recorded."""
        found = sha256(packed)
        if found != recorded:
            raise FiddlerError(
                f"the packed layer {self.path} is damaged",
                found=f"other bytes for expert {expert}: sha256 {found}",
                expected=recorded,
                hint=self._again,
            )

    @property
    def _again(self) -> str:
        return f"rm {self.path}   (it is packed again when it is next needed)"


class LayerWriter:
    """Writes a layer's file under another name, and publishes it with its last expert.

    As a context it removes, at the end, what was not completed.
    """

    def __init__(self, target: LayerFile, *, drop_behind: bool) -> None:
        self._target = target
        self._drop_behind = drop_behind
        self._hashes = dict.fromkeys(range(target.experts), "0" * 64)
        self._missing = target.experts
        self._start = len(self._header())
        self._path = target.path.with_name(f".{target.path.name}.partial")
        self._file = self._path.open("wb", buffering=0)

    def write(self, expert: int, packed: torch.Tensor) -> None:
        """Writes and hashes one expert, each expert once. drop_behind: the file does not stay in the page cache."""
        data = packed.view(torch.uint8).numpy().data
        with ThreadPoolExecutor(1, "fiddler-hash") as beside:
            hashing = beside.submit(sha256, packed)
            self._write(data, self._start + expert * len(data))
            self._hashes[expert] = hashing.result()
        self._missing -= 1
        if self._missing == 0:
            self._write(memoryview(self._header()), 0)
            os.fsync(self._file.fileno())
            if self._drop_behind:
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._file.close()
            os.rename(self._path, self._target.path)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def _header(self) -> bytes:
        """Of the same length whatever the hashes."""
        target = self._target
        metadata = {
            "format": FORMAT,
            "key": target.key,
            "model": target.model,
            "layer": str(target.layer),
            "sha256": " ".join(self._hashes.values()),
        }
        entry = {
            "dtype": "BF16",
            "shape": [target.experts, target.expert_bytes // 2],
            "data_offsets": [0, target.experts * target.expert_bytes],
        }
        text = json.dumps({"__metadata__": metadata, _TENSOR: entry}).encode()
        length = -(-(8 + len(text)) // _PAGE) * _PAGE - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def sha256(packed: torch.Tensor) -> str:
    """Of the tensor's bytes, in hexadecimal digits."""
    return hashlib.sha256(packed.view(torch.uint8).numpy().data).hexdigest()
