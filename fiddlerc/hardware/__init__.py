"""What a machine can do: the catalogue of known machines, measuring this one, and checking what it lacks."""

from __future__ import annotations

from .calibrate import ModelBytes, measure
from .catalog import catalog_names, load_hardware, require_name, verify_calibration, write_hardware
from .checks import Check, doctor
from .sampling import contradictions
from .tuning import require_this_machine, tune

__all__ = [
    "Check",
    "ModelBytes",
    "catalog_names",
    "contradictions",
    "doctor",
    "load_hardware",
    "measure",
    "require_name",
    "require_this_machine",
    "tune",
    "verify_calibration",
    "write_hardware",
]
