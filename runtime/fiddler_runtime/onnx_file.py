"""Which tensors an ONNX file has and where their bytes lie, read strictly and without the graph.

A file is one protobuf message (github.com/onnx/onnx, onnx.proto). Of it only the initializers are looked at; all else,
nodes and weights alike, is skipped by its length. Nothing in it is trusted: whatever a broken download or a hostile
file may break has its own error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import FiddlerError
from .safetensors_header import DOWNLOAD_AGAIN, TensorInfo

# Field numbers of onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, EXTERNAL, LOCATION = 1, 2, 8, 13, 14
FLOATS, INT32S, RAW, DOUBLES = 4, 5, 9, 10
DATA_FIELDS = (FLOATS, INT32S, 6, 7, RAW, DOUBLES, 11)
"""All fields of a tensor that hold its elements."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# TensorProto.DataType -> safetensors' name and bytes, of what weights, scales and zero points can be.
_TYPES = {1: ("F32", 4), 10: ("F16", 2), 11: ("F64", 8), 16: ("BF16", 2), 2: ("U8", 1), 3: ("I8", 1)}
# Which types each field holds. All but int32_data, one varint per element, lie as they do in memory.
_HOLDS = {
    RAW: ("F32", "F16", "F64", "BF16", "U8", "I8"),
    FLOATS: ("F32",),
    DOUBLES: ("F64",),
    INT32S: ("F16", "BF16", "U8", "I8"),
}
_LONGEST_NAME = 1 << 16
_WINDOW = 1 << 16


@dataclass(frozen=True)
class VarintTensor(TensorInfo):
    """A tensor whose elements are a list of varints (TensorProto.int32_data); nbytes is the list's."""


@dataclass(frozen=True)
class Field:
    """One field of a message: its number, and its value (varints) or where its bytes are in the file."""

    number: int
    wire: int
    value: int
    start: int
    end: int


class Wire:
    """A file in protobuf's wire format, read in small pieces wherever it is asked for."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self.what = what
        self.size = os.fstat(file.fileno()).st_size
        self._at, self._window = 0, b""

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message between two offsets. Raises FiddlerError where they are not well-formed."""
        while start < end:
            key, start = self._varint(start, end)
            number, wire = key >> 3, key & 7
            value, stop = 0, start
            if wire == _VARINT:
                value, stop = self._varint(start, end)
            elif wire == _LENGTH:
                length, start = self._varint(start, end)
                stop = start + length
            elif wire in (_FIXED64, _FIXED32):
                stop = start + (8 if wire == _FIXED64 else 4)
            else:
                raise self.invalid(f"wire type {wire} at byte {start}", "0, 1, 2 or 5")
            if number == 0:
                raise self.invalid(f"field number 0 at byte {start}", "1 or more")
            if stop > self.size:
                raise FiddlerError(
                    f"{self.what} is truncated",
                    found=f"{self.size} bytes",
                    expected=f"at least {stop}",
                    hint=DOWNLOAD_AGAIN,
                )
            if stop > end:
                raise self.invalid(f"a field up to byte {stop}", f"at most {end}, where its message ends")
            yield Field(number, wire, value, start, stop)
            start = stop

    def read(self, found: Field) -> bytes:
        """A field's value as it is in the file: whole, so not for weights."""
        return self._bytes(found.start, found.end)

    def varints(self, found: Field) -> list[int]:
        """A repeated integer's values: one varint, or a packed list of them (for what is short)."""
        if found.wire == _VARINT:
            return [found.value]
        if found.wire != _LENGTH:
            raise self.invalid(f"wire type {found.wire} at byte {found.start}", "integers")
        values, at = [], found.start
        while at < found.end:
            value, at = self._varint(at, found.end)
            values.append(value)
        return values

    def invalid(self, found: str, expected: str) -> FiddlerError:
        """The error for a file that is not well-formed."""
        return FiddlerError(
            f"{self.what} is not a valid ONNX file", found=found, expected=expected, hint=DOWNLOAD_AGAIN
        )

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, where the next field begins); 64 bits at most."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise self.invalid(f"an integer that goes on at byte {at}", "its end before that of its message")
            byte = self._bytes(at, at + 1)[0]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value, at
        raise self.invalid(f"an integer of over 64 bits before byte {at}", "at most 64 bits")

    def _bytes(self, start: int, end: int) -> bytes:
        begin = start - self._at
        if begin < 0 or end - self._at > len(self._window):
            self._window = os.pread(self._file.fileno(), max(_WINDOW, end - start), start)
            self._at, begin = start, 0
            if len(self._window) < end - start:
                raise FiddlerError(f"{self.what} was truncated while it was read", found=start, expected=end)
        return self._window[begin : begin + end - start]


def read_initializers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of an ONNX file by name, with their bytes in it or in files beside it.

    Raises FiddlerError for a file that cannot be read or is not well-formed, a tensor twice, data that is not as long
    as its shape says, and external data that is missing, too short, or outside the file's folder. Tensors of types that
    neither weights nor their scales have (64-bit integers, text) are left out.
    """
    what = f"the ONNX file {path}"
    try:
        with path.open("rb") as file:
            wire = Wire(file, what)
            graphs = [part for part in wire.fields(0, wire.size) if part.number == MODEL_GRAPH and part.wire == _LENGTH]
            if len(graphs) != 1:
                raise wire.invalid(f"{len(graphs)} graphs", "one")
            tensors: dict[str, TensorInfo] = {}
            sizes: dict[Path, int] = {}
            for part in wire.fields(graphs[0].start, graphs[0].end):
                if part.number != GRAPH_INITIALIZER:
                    continue
                tensor = _Tensor.read(wire, part)
                if tensor.name in tensors:
                    raise wire.invalid(f"the initializer {tensor.name} twice", "each name once")
                if tensor.data_type in _TYPES:
                    tensors[tensor.name] = tensor.locate(wire, path, sizes)
            return tensors
    except OSError as error:
        raise FiddlerError(
            f"cannot read {what}",
            found=error.strerror or str(error),
            expected="an ONNX file",
            hint="fiddlerc export-onnx MODEL_DIR -o FILE.onnx",
        ) from None


@dataclass
class _Tensor:
    """A TensorProto as it is written."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    external: bool = False
    entries: dict[str, str] = field(default_factory=dict)
    data: list[Field] = field(default_factory=list)

    @classmethod
    def read(cls, wire: Wire, message: Field) -> _Tensor:
        tensor = cls()
        for part in wire.fields(message.start, message.end):
            if part.number == DIMS:
                tensor.dims += wire.varints(part)
            elif part.number == DATA_TYPE:
                tensor.data_type = part.value
            elif part.number == NAME:
                tensor.name = _text(wire, part)
            elif part.number == LOCATION:
                tensor.external = part.value == 1
            elif part.number == EXTERNAL:
                entry = {p.number: _text(wire, p) for p in wire.fields(part.start, part.end) if p.number in (1, 2)}
                tensor.entries[entry.get(1, "")] = entry.get(2, "")
            elif part.number in DATA_FIELDS:
                tensor.data.append(part)
        if any(size >= 1 << 63 for size in tensor.dims):
            raise wire.invalid(f"a negative size of the initializer {tensor.name}", "sizes of 0 and more")
        return tensor

    def locate(self, wire: Wire, path: Path, sizes: dict[Path, int]) -> TensorInfo:
        """Where the elements are. sizes: of the external files that were seen."""
        dtype, element = _TYPES[self.data_type]
        shape, nbytes = tuple(self.dims), math.prod(self.dims) * element
        if self.external:
            if self.data:
                raise wire.invalid(f"data of {self.name} both inside and outside", "one of the two")
            file, offset = self._outside(wire, path, nbytes, sizes)
            return TensorInfo(self.name, file, dtype, shape, offset, nbytes)
        if len(self.data) > 1 or any(part.wire != _LENGTH for part in self.data):
            raise FiddlerError(
                f"{wire.what} has the initializer {self.name} in several pieces",
                found=f"{len(self.data)} fields",
                expected="raw data, or one packed list",
                hint="onnx.save(onnx.load(FILE), NEW_FILE) writes it so",
            )
        part = self.data[0] if self.data else Field(RAW, _LENGTH, 0, 0, 0)
        if dtype not in _HOLDS.get(part.number, ()):
            raise wire.invalid(f"elements of {self.name} ({dtype}) in field {part.number}", "a field for their type")
        found = part.end - part.start
        if part.number == INT32S:
            return VarintTensor(self.name, path, dtype, shape, part.start, found)
        if found != nbytes:
            raise wire.invalid(f"{found} bytes of {self.name}", f"{nbytes} for {dtype} {list(shape)}")
        return TensorInfo(self.name, path, dtype, shape, part.start, nbytes)

    def _outside(self, wire: Wire, path: Path, nbytes: int, sizes: dict[Path, int]) -> tuple[Path, int]:
        """The external file and the offset in it."""
        location = self.entries.get("location", "")
        parts = PurePosixPath(location).parts
        # A model must not name files elsewhere. Links are the user's own: Hugging Face's cache consists of them.
        if not parts or location.startswith("/") or ".." in parts or "\\" in location or "\0" in location:
            raise wire.invalid(f"data of {self.name} in {location!r}", "a file in the folder of the ONNX file")
        file = path.parent / location
        if file not in sizes:
            if not file.is_file():
                raise FiddlerError(
                    f"{wire.what} is incomplete",
                    found=f"no {location} beside it, which has {self.name}",
                    expected="its external data",
                    hint="copy or download the whole folder again",
                )
            sizes[file] = file.stat().st_size
        offset, length = (_number(wire, self, key, default) for key, default in (("offset", 0), ("length", nbytes)))
        if length != nbytes:
            raise wire.invalid(f"{length} bytes of {self.name} in {location}", f"{nbytes} for its type and shape")
        if offset + nbytes > sizes[file]:
            raise FiddlerError(
                f"the external data {file} is truncated",
                found=f"{sizes[file]} bytes",
                expected=f"at least {offset + nbytes}, the end of {self.name}",
                hint=DOWNLOAD_AGAIN,
            )
        return file, offset


def _number(wire: Wire, tensor: _Tensor, key: str, default: int) -> int:
    text = tensor.entries.get(key)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise wire.invalid(f"{key} {text[:30]!r} of {tensor.name}", "a number of bytes")
    return int(text)


def _text(wire: Wire, part: Field) -> str:
    if part.wire != _LENGTH or part.end - part.start > _LONGEST_NAME:
        raise wire.invalid(f"{part.end - part.start} bytes at {part.start}", f"text of at most {_LONGEST_NAME}")
    try:
        return wire.read(part).decode()
    except UnicodeDecodeError:
        raise wire.invalid(f"bytes at {part.start} that are not UTF-8", "a name") from None


def read_varints(info: VarintTensor) -> npt.NDArray[Any]:
    """The elements' bits: uint16 [elements] for F16 and BF16, uint8 or int8. Raises FiddlerError for anything else."""
    try:
        with info.file.open("rb") as file:
            raw = np.frombuffer(os.pread(file.fileno(), info.nbytes, info.offset), np.uint8)
    except OSError as error:
        raise FiddlerError(f"cannot read {info.file}", found=error.strerror or str(error)) from None
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    longest = int((ends - starts).max(initial=-1)) + 1
    if raw.size != info.nbytes or ends.size != info.elements or (raw.size and raw[-1] >= 0x80) or longest > 10:
        raise _no_elements(info, f"{ends.size} integers in {raw.size} bytes, the longest of {longest}")
    values = np.zeros(ends.size, np.uint64)
    for place in range(longest):
        longer = ends - starts >= place
        values[longer] |= (raw[starts[longer] + place].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * place)
    signed = values.view(np.int64)
    narrow = signed.astype({"U8": np.uint8, "I8": np.int8}.get(info.dtype, np.uint16))
    if (narrow.astype(np.int64) != signed).any():
        raise _no_elements(info, f"the integer {signed[narrow.astype(np.int64) != signed][0]}")
    return narrow


def _no_elements(info: VarintTensor, found: str) -> FiddlerError:
    expected = f"{info.elements} of {info.dtype}"
    return FiddlerError(f"the initializer {info.name} in {info.file} is damaged", found=found, expected=expected)
