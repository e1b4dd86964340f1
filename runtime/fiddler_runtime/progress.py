"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (label, done, total), from 0 to total."""

BYTES = " (bytes)"
"""Ends the labels of work that counts bytes, so that a display can show GB/s."""
