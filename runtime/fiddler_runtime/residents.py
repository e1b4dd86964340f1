"""The residents' memory on the accelerator: taken before anything is read, and given up, the least popular first, where
there is not enough of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .errors import FiddlerError, FiddlerWarning
from .lanes.device import Device, UnpackedExpert
from .plan import Header, MemoryItem, ModelSpec
from .text import format_bytes

Place = tuple[int, int]
"""(row of spec.moe_layers, expert)"""

_LATER = ("KV cache", "activations", "keys and values")  # as fiddlerc/placement/budget.py names them


def later(header: Header) -> list[MemoryItem]:
    """Of the plan's memory budget what is taken while the model runs, beside what is loaded before."""
    return [item for item in header.memory if item.item.startswith(_LATER)]


def by_popularity(resident: npt.NDArray[np.bool_], popularity: npt.NDArray[np.float32]) -> Sequence[Place]:
    """The residents, the most popular first."""
    places = [(int(row), int(expert)) for row, expert in np.argwhere(resident)]
    return sorted(places, key=lambda place: (-float(popularity[place]), place))


def reserve(
    spec: ModelSpec,
    resident: npt.NDArray[np.bool_],
    popularity: npt.NDArray[np.float32],
    device: Device,
    *,
    keep_bytes: int = 0,
    all_needed: bool = False,
) -> dict[Place, UnpackedExpert]:
    """Memory for as many of the residents as there is room for, the most popular first.

    keep_bytes  of the accelerator's memory stay free
    all_needed  nothing else may run an expert
    Warns (FiddlerWarning) about those that were given up. Raises FiddlerError if all_needed and some were.
    """
    rooms: dict[Place, UnpackedExpert] = {}
    for place in by_popularity(resident, popularity):
        try:
            rooms[place] = device.room(spec.expert)
        except torch.OutOfMemoryError:
            break
    while rooms and (free := device.free_bytes()) is not None and free < keep_bytes:
        del rooms[next(reversed(rooms))]
    missing = int(resident.sum()) - len(rooms)
    if missing:
        device.release()
        tell(spec, missing, len(rooms), all_needed=all_needed)
    return rooms


def tell(spec: ModelSpec, missing: int, left: int, *, all_needed: bool) -> None:
    """Says that so many residents were given up and so many are left: a warning, or an error if all_needed."""
    size = format_bytes(missing * spec.expert_bytes)
    if all_needed:
        raise FiddlerError(
            f"not enough accelerator memory for {spec.name}",
            found=f"room for {left} of {left + missing} experts",
            expected=f"{size} more: only resident experts are permitted",
            hint="--strategies resident,cpu",
        )
    warnings.warn(
        f"{missing} of {left + missing} resident experts of {spec.name} were given up, the least popular first: the "
        f"accelerator has not enough free memory for {size} of them; hint: fiddlerc compile ... --gpu-memory SIZE",
        FiddlerWarning,
        stacklevel=3,
    )
