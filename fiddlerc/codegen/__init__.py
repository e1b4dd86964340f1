"""Generates the C++ kernels of one expert shape: `generate` renders the templates for the chosen instruction sets."""

from __future__ import annotations

from fiddler_runtime.machine import KNOWN_ISAS

from ..ir import ExpertForm, Machine
from .names import format_name
from .render import generate
from .selection import Candidate, finalists, select
from .targets import target_on

__all__ = ["KNOWN_ISAS", "candidates", "format_name", "generate"]


def candidates(isa: str, expert: ExpertForm, machine: Machine) -> tuple[tuple[str, Candidate], ...]:
    """An instruction set's blockings that are worth measuring, the cost model's choice first (selection.py)."""
    return finalists(select(target_on(isa, machine), expert, machine))
