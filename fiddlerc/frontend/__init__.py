"""From a model directory or a built-in name to a ModelSpec. Reads headers and config.json, never weights."""

from __future__ import annotations

from .load import load_model
from .zoo import zoo_names

__all__ = ["load_model", "zoo_names"]
