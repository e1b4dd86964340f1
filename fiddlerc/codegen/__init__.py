"""Generates the C++ kernels of one expert shape: `generate` renders the templates for the chosen instruction sets."""

from __future__ import annotations

from fiddler_runtime.machine import KNOWN_ISAS

from .names import format_name, format_symbol, parse_name, parse_symbol
from .render import generate

__all__ = ["KNOWN_ISAS", "format_name", "format_symbol", "generate", "parse_name", "parse_symbol"]
