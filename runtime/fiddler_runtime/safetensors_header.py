"""The header of a safetensors file, read strictly and without its data.

A file is an 8-byte little-endian length, that many bytes of JSON, then the data. Nothing in the header is trusted:
every rule of the format that a broken download or a hostile file may break has its own error.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import strict
from .errors import FiddlerError

DOWNLOAD_AGAIN = "download the file again"
# The reference implementation's limit; the longest real headers are a few megabytes.
_MAX_HEADER_BYTES = 100_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    dtype   safetensors' name of it, e.g. BF16
    offset  of its first byte from the beginning of the file
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of plain floating weights.

        Raises FiddlerError for any other: a quantised tensor means nothing without its scales.
        """
        try:
            return _FLOATS[self.dtype]
        except KeyError:
            raise FiddlerError(
                f"the tensor {self.name} in {self.file.name} cannot be used",
                found=self.dtype,
                expected=f"one of {', '.join(_FLOATS)}",
                hint="use the model's bf16 release: quantised checkpoints are not supported",
            ) from None


@dataclass(frozen=True)
class Header:
    """A safetensors file's tensors by name, and its free-text metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path, what: str) -> Header:
    """Reads the header and holds the file against it; `what` names the file for people, e.g. 'the shard x.safetensors'.

    Raises FiddlerError if the file cannot be read, is no safetensors file, or is not as long as its header says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise FiddlerError(
                    f"{what} is truncated",
                    found=f"{size} bytes",
                    expected="at least the 8 of a safetensors file",
                    hint=DOWNLOAD_AGAIN,
                )
            if length > _MAX_HEADER_BYTES:
                raise FiddlerError(
                    f"{what} is not a safetensors file",
                    found=f"a header of {length} bytes",
                    expected=f"at most {_MAX_HEADER_BYTES}",
                    hint=DOWNLOAD_AGAIN,
                )
            if length > size - 8:
                raise FiddlerError(
                    f"{what} is truncated",
                    found=f"{size} bytes",
                    expected=f"at least {length + 8}, its header",
                    hint=DOWNLOAD_AGAIN,
                )
            text = file.read(length)
    except OSError as error:
        raise FiddlerError(f"cannot read {what}", found=error.strerror or str(error)) from None
    try:
        value = strict.parse(text, f"the header of {what}")
    except FiddlerError as error:
        raise FiddlerError(error.what, found=error.found, expected=error.expected, hint=DOWNLOAD_AGAIN) from None
    return _check(value, path, what, start=8 + length, size=size)


def _check(value: Any, path: Path, what: str, *, start: int, size: int) -> Header:
    where = f"the header of {what}"
    if not isinstance(value, dict):
        raise _invalid(where, value, "an object")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise _invalid(f"{where}, __metadata__", metadata, "text by key")
    tensors = {name: _tensor(name, entry, path, f"{where}, {name}", start) for name, entry in value.items()}
    expected = max((t.offset + t.nbytes for t in tensors.values()), default=start)
    if size != expected:
        raise FiddlerError(
            f"{what} is {'truncated' if size < expected else 'longer than its header says'}",
            found=f"{size} bytes",
            expected=str(expected),
            hint=DOWNLOAD_AGAIN,
        )
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any, path: Path, where: str, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(where, entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _invalid(f"{where}, dtype", dtype, "one of " + ", ".join(_BITS))
    if not _naturals(shape):
        raise _invalid(f"{where}, shape", shape, "a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(f"{where}, data_offsets", offsets, "a begin and an end")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if (end - begin) * 8 != bits:
        raise _invalid(f"{where}, data_offsets", f"{end - begin} bytes", f"{-(-bits // 8)} for {dtype} {shape}")
    return TensorInfo(name, path, dtype, tuple(shape), start + begin, end - begin)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _invalid(where: str, found: object, expected: str) -> FiddlerError:
    return FiddlerError(f"{where}: not valid", found=str(found)[:60], expected=expected, hint=DOWNLOAD_AGAIN)
