"""Strict JSON: what passes comes back as the same bytes; everything else is refused with its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError


@dataclass(frozen=True)
class Inner:
    x: int
    y: float


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    kind: Literal["a", "b"]
    maybe: int | None
    inner: Inner
    many: tuple[Inner, ...]
    mixed: dict[str, str | int | float | bool]


GOOD = {
    "name": "é",
    "flag": True,
    "kind": "a",
    "maybe": None,
    "inner": {"x": 1, "y": 0.5},
    "many": [{"x": -1, "y": 2.0}],
    "mixed": {"a": 1, "b": 1.5, "c": "t", "d": False},
}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers(-(2**63) + 1, 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
inner = st.builds(Inner, numbers, floats)
outer = st.builds(
    Outer,
    text,
    st.booleans(),
    st.sampled_from(["a", "b"]),
    st.none() | numbers,
    inner,
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(text, text | numbers | floats | st.booleans(), max_size=3),
)


@given(outer)
def test_values_survive_and_bytes_are_canonical(value: Outer) -> None:
    data = strict.dump(value)
    again = strict.decode(Outer, strict.parse(data, "file"), "file")
    assert again == value
    assert strict.dump(again) == data


BAD: list[tuple[str, Any, str]] = [
    ("name", 1, "text"),
    ("name", None, "text"),
    ("name", "\ud800", "text"),
    ("flag", 1, "true or false"),
    ("flag", "true", "true or false"),
    ("kind", "c", "one of 'a', 'b'"),
    ("kind", ["a"], "one of"),
    ("kind", True, "one of"),
    ("maybe", "1", "an integer"),
    ("maybe", 2**63, "an integer"),
    ("inner", [], "an object"),
    ("inner", {"x": 1}, "y"),
    ("inner", {"x": 1, "y": 1, "z": 1}, "'z'"),
    ("inner", {"x": 1.0, "y": 1}, "an integer"),
    ("inner", {"x": True, "y": 1}, "an integer"),
    ("inner", {"x": 1, "y": True}, "a number"),
    ("inner", {"x": 1, "y": float("inf")}, "a number"),
    ("inner", {"x": 1, "y": 2**70}, "a number"),
    ("many", {}, "a list"),
    ("many", [{"x": 1, "y": 1}, 3], "many[1]"),
    ("mixed", {"a": None}, "mixed.a"),
    ("mixed", {"a": {}}, "mixed.a"),
    ("mixed", {"\udfff": 1}, "keys"),
    ("mixed", [], "an object"),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD)
def test_other_values_are_refused_by_place(key: str, value: Any, words: str) -> None:
    strict.decode(Outer, GOOD, "file")
    with pytest.raises(FiddlerError) as raised:
        strict.decode(Outer, {**GOOD, key: value}, "file")
    assert words in str(raised.value)
    assert f"file.{key}" in str(raised.value)
    str(raised.value).encode()


@pytest.mark.parametrize("key", GOOD)
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(FiddlerError, match=f"no '{key}'"):
        strict.decode(Outer, {k: v for k, v in GOOD.items() if k != key}, "file")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"9" * 10_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'[{"b": {"c": 1, "c": 1}}]', "twice"),
        (b"NaN", "finite"),
        (b"[-Infinity]", "finite"),
    ],
)
def test_text_that_is_not_strict_json(data: bytes, words: str) -> None:
    with pytest.raises(FiddlerError, match=words):
        strict.parse(data, "file")


def test_control_characters_do_not_reach_the_terminal() -> None:
    with pytest.raises(FiddlerError) as raised:
        strict.decode(Outer, {**GOOD, "kind": "\x1b[31m\u202e"}, "file")
    assert str(raised.value).isprintable()
