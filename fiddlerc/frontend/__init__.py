"""From a model directory, an ONNX file or a built-in name to a ModelSpec. Reads headers and graphs, never weights."""

from __future__ import annotations

from .load import load_model
from .onnx import with_cache
from .zoo import zoo_names

__all__ = ["load_model", "with_cache", "zoo_names"]
