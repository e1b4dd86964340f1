"""Which expert to fetch for the next layer while this one is computed: the plan's prefetch table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .store import ExpertStore


class Ahead:
    """Guesses the next layer's expert, and remembers which one was fetched.

    table  int16 [layers, experts, 2], see plan.Tables
    """

    def __init__(self, table: npt.NDArray[np.int16], store: ExpertStore) -> None:
        self._table = table.astype(np.int64)
        self._store = store
        self._fetched: tuple[int, int] | None = None

    def guess(self, row: int, counts: npt.NDArray[np.int32]) -> tuple[int, int] | None:
        """(row, expert) of the next layer that most of this layer's choices speak for; ties: the lower index.

        counts  int32 [experts], this layer's. None after the last layer, and where no choice says anything.
        """
        self._fetched = None
        if row + 1 == len(self._table):
            return None
        active = np.flatnonzero(counts)
        named = self._table[row, active]
        votes = np.bincount((named + 1).ravel(), np.repeat(counts[active], named.shape[1]), minlength=2)[1:]
        expert = int(votes.argmax())
        if votes[expert] == 0 or expert not in self._store.packed[row + 1]:
            return None
        self._fetched = (row + 1, expert)
        return self._fetched

    def fetched_for(self, row: int) -> int | None:
        """The expert that was fetched for that layer by the guess just before."""
        return self._fetched[1] if self._fetched is not None and self._fetched[0] == row else None
