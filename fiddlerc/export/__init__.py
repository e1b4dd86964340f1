"""A Hugging Face model as an ONNX file in which every MoE layer is one fiddlerc::Experts node."""

from __future__ import annotations

from .onnx_file import DType, export_onnx

__all__ = ["DType", "export_onnx"]
