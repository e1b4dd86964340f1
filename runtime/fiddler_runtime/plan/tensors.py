"""tables.safetensors: the tables to bytes and back, the same bytes on every machine and with every library version."""

from __future__ import annotations

import json
import struct

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from ..errors import FiddlerError
from .schema import Tables

_DTYPES = {"int32": "I32", "float32": "F32", "int16": "I16", "uint8": "U8"}
# In file order: wide types first, so that every tensor is aligned.
_TYPES = {
    "tokens": "int32",
    "cpu_us": "float32",
    "regime_shares": "float32",
    "gpu_us": "float32",
    "rest_us": "float32",
    "rest_kv_us": "float32",
    "scalars_us": "float32",
    "contention": "float32",
    "decode_streams": "int32",
    "popularity": "float32",
    "prefetch": "int16",
    "resident": "uint8",
}
MAX_BYTES = 1 << 28
"""More than any model's tables need; a size beyond it is not read into memory."""


def encode_tables(tables: Tables) -> bytes:
    """The safetensors file, canonical: tensors in the order above, header keys sorted, padded with spaces to 8 bytes.

    Not written by the safetensors library: it fixes neither the order nor the padding across its versions, and a plan's
    bytes must not depend on them.
    """
    index: dict[str, object] = {}
    data = []
    offset = 0
    for name, dtype in _TYPES.items():
        value = np.ascontiguousarray(getattr(tables, name))
        raw = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        index[name] = {
            "data_offsets": [offset, offset + len(raw)],
            "dtype": _DTYPES[dtype],
            "shape": list(value.shape),
        }
        data.append(raw)
        offset += len(raw)
    header = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"".join(data)


def decode_tables(data: bytes, where: str) -> Tables:
    """The tables in a file's bytes. Raises FiddlerError if they are not exactly what `encode_tables` would write.

    Values are not checked here: see checks.check_tables.
    """
    try:
        # The library checks lengths and offsets before it allocates anything.
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FiddlerError(f"{where} is damaged", found=f"no safetensors file ({error})") from None
    if set(arrays) != set(_TYPES):
        odd = sorted(set(arrays) ^ set(_TYPES))[0]
        kind = "an unknown tensor" if odd in arrays else "no tensor"
        raise FiddlerError(f"{where} is damaged", found=f"{kind} {odd!r}", expected=", ".join(sorted(_TYPES)))
    for name, dtype in _TYPES.items():
        if arrays[name].dtype != np.dtype(dtype):
            raise FiddlerError(f"{where} is damaged", found=f"{name} of {arrays[name].dtype.name}", expected=dtype)
    tables = Tables(**arrays)
    if encode_tables(tables) != data:
        raise FiddlerError(
            f"{where} is damaged", found="other bytes than its tables have", expected="the canonical file"
        )
    return tables
