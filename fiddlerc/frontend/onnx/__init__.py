"""From an ONNX file to a ModelSpec: which nodes are MoE layers, and which initializers are their experts.

Reads the graph, never the weights. The runtime then needs the names alone.
"""

from __future__ import annotations

from .model import load_file, with_cache

__all__ = ["load_file", "with_cache"]
