"""Amounts and names for people."""

from __future__ import annotations

PLACEMENTS = {
    "placed": "this plan's",
    "popularity": "the most popular",
    "random": "at random",
    "worst": "the least popular",
}
"""Residents by the keys of a plan's placement.relative_time."""


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
