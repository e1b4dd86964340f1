"""The type of the fixture `golden` (conftest.py): golden(file, what a test generated)."""

from collections.abc import Callable

Golden = Callable[[str, "str | bytes"], None]
