"""What a machine can do: the catalogue of known machines, measuring this one, and checking what it lacks."""

from __future__ import annotations

from .catalog import catalog_names, load_hardware, verify_calibration, write_hardware

__all__ = ["catalog_names", "load_hardware", "verify_calibration", "write_hardware"]
