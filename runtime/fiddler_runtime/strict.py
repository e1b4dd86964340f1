"""Strict JSON: frozen dataclasses in, the same bytes out; nothing unknown, missing or of another type passes.

Used for every JSON file of ours (plan.json, hw.json). A Hugging Face config.json is not ours and is read leniently.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from .errors import FiddlerError

T = TypeVar("T")
_MAX_INT = 2**63 - 1


def parse(text: bytes, where: str) -> Any:
    """JSON bytes to Python objects. Raises FiddlerError on bad UTF-8, bad JSON, duplicate keys, NaN and infinities."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise FiddlerError(f"{where} is not valid", found=f"the key {key!r} twice", expected="each key once")
            out[key] = value
        return out

    def constant(name: str) -> Any:
        raise FiddlerError(f"{where} is not valid", found=name, expected="finite numbers")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    # ValueError: bad UTF-8, bad JSON, and integers of more digits than Python converts.
    except (ValueError, RecursionError) as error:
        raise FiddlerError(f"{where} is not valid JSON", found=str(error)) from None


def load(path: Path, what: str) -> Any:
    """Reads and parses a JSON file; `what` names it for people, e.g. 'hardware file hw.json'."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FiddlerError(f"cannot read {what}", found=error.strerror or str(error)) from None
    return parse(data, what)


def dump(value: Any) -> bytes:
    """Canonical JSON: sorted keys, two-space indent, newline at the end. `value` may hold dataclasses and tuples."""
    text = json.dumps(encode(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def encode(value: Any) -> Any:
    """Dataclasses to dicts and tuples to lists, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(cls: type[T], value: Any, where: str) -> T:
    """Builds the dataclass `cls` from parsed JSON.

    Raises FiddlerError naming the path of the first unknown key, missing key, or value of another type.
    """
    return typing.cast(T, _decode(cls, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args or isinstance(value, bool) != isinstance(args[0], bool):
            raise _wrong(where, value, "one of " + ", ".join(map(repr, args)))
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        plain = [a for a in args if a is not type(None)]
        if len(plain) == 1:
            return _decode(plain[0], value, where)
        for arg in plain:
            if _is_plain(arg, value):
                return value
        raise _wrong(where, value, " or ".join(getattr(a, "__name__", str(a)) for a in plain))
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        for key in value:
            if not _is_plain(str, key):
                raise _wrong(where, key, "keys of valid text")
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and _is_plain(int, value):
        value = float(value)
    if not _is_plain(kind, value):
        raise _wrong(where, value, {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind])
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            raise FiddlerError(f"unknown key in {where}", found=repr(key), expected="one of " + ", ".join(names))
    for name in names:
        if name not in value:
            raise FiddlerError(f"missing key in {where}", found="no " + repr(name), expected=", ".join(names))
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    if kind is not str or not isinstance(value, str):
        return False
    # JSON can spell half of a surrogate pair ("\ud800"), which is no text and could not be written back.
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _wrong(where: str, value: Any, expected: str) -> FiddlerError:
    # In ASCII: what a hostile file holds must not reach a terminal as control characters.
    shown = json.dumps(value)
    return FiddlerError(f"wrong value for {where}", found=shown[:60], expected=expected)
