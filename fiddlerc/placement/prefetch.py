"""What to fetch while a layer is computed: the experts that the next one is likely to need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CANDIDATES = 2


def make_prefetch(successors: npt.NDArray[np.int32] | None, resident: npt.NDArray[np.bool_]) -> npt.NDArray[np.int16]:
    """The likeliest experts of the next layer that are not resident there, int16 [layers, experts, 2]; -1 for none.

    successors  int32 [layers, experts, experts], see trace.successors; None: nothing is known, and nothing fetched
    resident    bool [layers, experts]
    """
    layers, experts = resident.shape
    table = np.full((layers, experts, CANDIDATES), -1, np.int16)
    if successors is None:
        return table
    for layer in range(layers):
        away = np.where(resident[(layer + 1) % layers], 0, successors[layer])
        order = np.argsort(-away, axis=1, kind="stable")[:, :CANDIDATES]
        seen = np.take_along_axis(away, order, axis=1) > 0
        table[layer, :, : order.shape[1]] = np.where(seen, order, -1)
    return table
