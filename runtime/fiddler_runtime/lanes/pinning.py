"""Locking host memory for a GPU's copies: in pieces, as far as the system permits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import FiddlerError

PIECE_BYTES = 1 << 30
"""A refusal costs at most so much, and the driver's lists of pages stay of a reasonable length."""
_PAGE = 4096


@dataclass(frozen=True)
class Pin:
    """Host memory that copies are fast from: `bytes` of it. undo gives it back to the system's paging."""

    bytes: int
    undo: Callable[[], None]


def lock(
    memory: torch.Tensor,
    unit_bytes: int,
    register: Callable[[int, int], object],
    unregister: Callable[[int], None],
    piece_bytes: int = PIECE_BYTES,
) -> Pin:
    """Registers memory from its start, piece by piece, until it is all registered or one piece is refused.

    unit_bytes  no unit lies in two pieces: a copy must not cross from one registration into another
    register(address, nbytes) raises FiddlerError if it is refused; unregister(address) undoes it
    """
    address, total = memory.data_ptr(), memory.nbytes
    # Whole pages too: registrations must not share one.
    least = unit_bytes * _PAGE // math.gcd(unit_bytes, _PAGE)
    piece = max(1, piece_bytes // least) * least
    locked: list[int] = []
    done = 0

    def undo(keep: torch.Tensor = memory) -> None:  # which may not be freed before
        while locked:
            unregister(locked.pop())

    try:
        while done < total:
            nbytes = min(piece, total - done)
            register(address + done, nbytes)
            locked.append(address + done)
            done += nbytes
    except FiddlerError:
        pass  # the caller says how much is missing
    except BaseException:
        undo()
        raise
    return Pin(done, undo)
