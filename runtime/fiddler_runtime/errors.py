"""The two ways fiddler speaks up: an error that stops, a warning that does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FiddlerError(Exception):
    """A user's mistake or a machine's lack, told in one line and a hint.

    what      the thing that went wrong, naming the file or option concerned
    found     what was there
    expected  what would have been right
    hint      a command, or the change to make, that mends it
    """

    def __init__(
        self,
        what: str,
        *,
        found: object | None = None,
        expected: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.hint = hint
        super().__init__(self.line if hint is None else f"{self.line}\nhint: {hint}")

    @property
    def line(self) -> str:
        """The error in one line, without the hint."""
        details = []
        if self.found is not None:
            details.append(f"found {self.found}")
        if self.expected is not None:
            details.append(f"expected {self.expected}")
        return f"{self.what}: {', '.join(details)}" if details else self.what


class FiddlerWarning(UserWarning):
    """Something works, but not as well as the user may believe."""


def install(extras: str) -> str:
    """The command that installs what some parts need."""
    return f"pip install '.[{extras}]'   (in fiddlerc's own folder)"


@contextmanager
def hinted(hint: str) -> Iterator[None]:
    """Errors from inside that have no hint get this one. A decorator too."""
    try:
        yield
    except FiddlerError as error:
        if error.hint is not None:
            raise
        raise FiddlerError(error.what, found=error.found, expected=error.expected, hint=hint) from None
