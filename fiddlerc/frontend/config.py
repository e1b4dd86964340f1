"""The values that are used of a config.json, each required or with transformers' own default, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fiddler_runtime.checkpoint import config_value
from fiddler_runtime.errors import FiddlerError

# Far beyond any model; keeps a mistyped size from becoming an endless loop.
_LARGEST = 2**31 - 1


class Config:
    """A config.json and where it came from."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer. Absent or null gives the default; without one that is an error."""
        value = config_value(self.values, key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= _LARGEST:
            raise self.wrong(key, value, "a positive integer")
        return value

    def count(self, key: str) -> int:
        """An integer from 0; absent or null is 0."""
        value = config_value(self.values, key)
        if value is None:
            return 0
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise self.wrong(key, value, "an integer from 0")
        return value

    def given(self, key: str) -> Any:
        """Whatever is there; None if it is absent or null."""
        return config_value(self.values, key)

    def is_null(self, key: str) -> bool:
        """Whether the key is there with the value null."""
        return key in self.values and self.values[key] is None

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """The same, with values for keys that are absent."""
        return Config({**defaults, **self.values}, self.where)

    def text(self, key: str) -> str:
        """Text that must be there."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, value, "text")
        return value

    def flag(self, key: str) -> bool:
        """True or false; absent or null is false."""
        value = self.values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def layers(self, key: str) -> tuple[int, ...]:
        """A list of layer numbers; absent or null is none."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(key, value, "a list of layer numbers")
        return tuple(value)

    def wrong(self, key: str, found: object, expected: str) -> FiddlerError:
        """The error for a value that cannot be used; None stands for one that is not there."""
        if found is None:
            return FiddlerError(
                f"{self.where} lacks a key",
                found=f"no {key}",
                expected=f"{key}, {expected}",
                hint="download the model's config.json again",
            )
        return FiddlerError(
            f"wrong value for {key} in {self.where}",
            found=str(found)[:60],
            expected=expected,
            hint="download the model's config.json again",
        )
