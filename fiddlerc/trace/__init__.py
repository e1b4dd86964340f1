"""Which experts text chooses: recording it, keeping it in a file, and the statistics that placement rests on."""

from __future__ import annotations

from .counts import from_counts
from .file import read_trace, write_trace
from .record import record
from .statistics import popularity, successors
from .steps import sample_steps

__all__ = [
    "from_counts",
    "popularity",
    "read_trace",
    "record",
    "sample_steps",
    "successors",
    "write_trace",
]
