"""Latency models: from a machine's raw samples, or its limits, to the curves that dispatch tables are made of."""

from __future__ import annotations

from .model import fit, transfer_errors

__all__ = ["fit", "transfer_errors"]
