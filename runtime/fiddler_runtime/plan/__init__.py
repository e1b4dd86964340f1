"""The plan format (plans/README.md specifies it): its types, its strict reader, its atomic writer.

A plan is a directory: plan.json, tables.safetensors, kernels/ (sources) and whatever else plan.json lists. The compiler
writes through `write_plan`; the runtime reads through `read_plan`; nobody else knows the format.
"""

from __future__ import annotations

from .reader import peek_version, read_plan
from .schema import (
    ABI_VERSION,
    ACTIVATIONS,
    BUILD_FILE,
    FORMAT_MAJOR,
    FORMAT_MINOR,
    HEADER,
    LAYOUT_VERSION,
    TABLES,
    Activation,
    CurveSummary,
    ExpertForm,
    ExpertTensors,
    Feature,
    FileEntry,
    HardwareSummary,
    Header,
    KernelSpec,
    KernelVariant,
    MemoryItem,
    ModelSpec,
    Objective,
    Options,
    PlacementSummary,
    Plan,
    Provenance,
    Tables,
    packed_bytes,
)
from .writer import write_plan

__all__ = [
    "ABI_VERSION",
    "ACTIVATIONS",
    "BUILD_FILE",
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "HEADER",
    "LAYOUT_VERSION",
    "TABLES",
    "Activation",
    "CurveSummary",
    "ExpertForm",
    "ExpertTensors",
    "Feature",
    "FileEntry",
    "HardwareSummary",
    "Header",
    "KernelSpec",
    "KernelVariant",
    "MemoryItem",
    "ModelSpec",
    "Objective",
    "Options",
    "PlacementSummary",
    "Plan",
    "Provenance",
    "Tables",
    "packed_bytes",
    "peek_version",
    "read_plan",
    "write_plan",
]
