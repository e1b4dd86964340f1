"""The trace file: safetensors whose metadata has one key, our header as JSON.

One key, because safetensors writes metadata in no fixed order and the same trace must give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError, hinted
from fiddler_runtime.safetensors_header import TensorInfo, read_header
from fiddler_runtime.whole_file import write_whole
from fiddlerc.ir import ModelSpec, Trace

from .check import check

FORMAT = 1
_KEY = "fiddlerc-trace"
_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_COUNTS = "counts"
_ROWS = ("experts", "sequence", "position", "phase")
_Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Header:
    format: int
    model_fingerprint: str
    model_name: str
    source: str
    sha256: str


def write_trace(trace: Trace, path: Path) -> None:
    """Writes the file at once or not at all; the same trace gives the same bytes. Raises FiddlerError if it cannot."""
    arrays: dict[str, npt.NDArray[Any]] = {_COUNTS: trace.counts}
    rows = (trace.experts, trace.sequence, trace.position, trace.phase)
    arrays |= {name: array for name, array in zip(_ROWS, rows, strict=True) if array is not None}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = _Header(FORMAT, trace.model_fingerprint, trace.model_name, trace.source, _digest(arrays))
    data = save(arrays, metadata={_KEY: strict.dump(header).decode()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise FiddlerError(
            f"cannot write the trace {path}",
            found=error.strerror or str(error),
            expected="a folder to write to, with room for it",
            hint="-o ANOTHER_FILE",
        ) from None


@hinted("fiddlerc trace MODEL --text FILE -o trace.safetensors")
def read_trace(path: Path, spec: ModelSpec) -> Trace:
    """Reads a trace of the model `spec`. For one from an ONNX file, any trace of as many layers, experts and choices.

    Raises FiddlerError if the file is no trace or a damaged one, of a newer version, or of another model.
    """
    what = f"the trace {path}"
    contents = read_header(path, what)
    header = _read_header(contents.metadata, what)
    # An ONNX file is mostly another model's export, whose trace is the only one that there can be.
    if header.model_fingerprint != spec.fingerprint and not spec.from_onnx:
        raise FiddlerError(
            f"{what} is of another model",
            found=f"{header.model_name} ({header.model_fingerprint})",
            expected=f"{spec.name} ({spec.fingerprint})",
            hint="record one of this model: fiddlerc trace MODEL --text FILE -o trace.safetensors",
        )
    if set(contents.tensors) not in ({_COUNTS}, {_COUNTS, *_ROWS}):
        raise FiddlerError(
            f"{what} is not valid",
            found="tensors " + ", ".join(sorted(contents.tensors)),
            expected=f"{_COUNTS}, alone or with {', '.join(_ROWS)}",
        )
    data = path.read_bytes()
    arrays = {name: _array(data, info, what) for name, info in contents.tensors.items()}
    if _digest(arrays) != header.sha256:
        raise FiddlerError(
            f"{what} is damaged",
            found=f"sha256 {_digest(arrays)[:16]}…",
            expected=f"{header.sha256[:16]}…",
            hint="record or copy it again",
        )
    trace = Trace(
        model_fingerprint=header.model_fingerprint,
        model_name=header.model_name,
        source=header.source,
        counts=arrays[_COUNTS],
        experts=arrays.get("experts"),
        sequence=arrays.get("sequence"),
        position=arrays.get("position"),
        phase=arrays.get("phase"),
    )
    check(trace, spec, what)
    return trace


def _read_header(metadata: Mapping[str, str], what: str) -> _Header:
    if set(metadata) != {_KEY}:
        raise FiddlerError(
            f"{what} is not a trace",
            found="a safetensors file without its header",
            expected="a file that `fiddlerc trace` wrote",
        )
    value = strict.parse(metadata[_KEY].encode(), f"the header of {what}")
    # The version first: a newer header may well have other keys.
    version = value.get("format") if isinstance(value, dict) else None
    if type(version) is int and version > FORMAT:
        raise FiddlerError(
            f"{what} was written by a newer fiddlerc",
            found=f"format {version}",
            expected=f"format {FORMAT}",
            hint="pip install --upgrade fiddlerc",
        )
    header = strict.decode(_Header, value, f"the header of {what}")
    if header.format != FORMAT:
        raise FiddlerError(f"{what} is not valid", found=f"format {header.format}", expected=f"format {FORMAT}")
    return header


def _array(data: bytes, info: TensorInfo, what: str) -> npt.NDArray[Any]:
    if info.dtype not in _DTYPES:
        raise FiddlerError(
            f"{what} is not valid", found=f"{info.name} of {info.dtype}", expected="one of " + ", ".join(_DTYPES)
        )
    dtype = _DTYPES[info.dtype]
    # The file may have changed since its header was read.
    if len(data) < info.offset + info.nbytes:
        raise FiddlerError(f"{what} is truncated", found=f"{len(data)} bytes", expected=info.offset + info.nbytes)
    flat = np.frombuffer(data, dtype, count=info.nbytes // dtype.itemsize, offset=info.offset)
    array: npt.NDArray[Any] = flat.reshape(info.shape).astype(dtype.newbyteorder("="))
    return array


def _digest(arrays: _Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
