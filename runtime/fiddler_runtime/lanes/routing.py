"""Which tokens go to which expert, sorted by expert, for the accelerator's lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..makespan import RESIDENT, STREAMED


@dataclass(frozen=True)
class Share:
    """One expert's part of a Routing: rows[start:stop] and weights[start:stop]."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class Routing:
    """The accelerator's share of a layer.

    rows      int64 [n], token of each choice, grouped by expert; on the device
    weights   fp32 [n], its weight
    resident  experts whose weights are there
    streamed  experts to copy first, the one with most tokens first (design.md, dispatch: Johnson's rule)
    """

    rows: torch.Tensor
    weights: torch.Tensor
    resident: tuple[Share, ...]
    streamed: tuple[Share, ...]


def route(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    counts: npt.NDArray[np.int32],
    strategy: npt.NDArray[np.uint8],
    device: torch.device,
) -> Routing:
    """Sorts a layer's choices by expert.

    topk_ids int64 [T, k] and topk_weights fp32 [T, k] on the CPU, contiguous; counts and strategy [E] as the dispatcher
    gave them. Ids outside [0, E) belong to no expert.
    """
    experts = counts.size
    flat = topk_ids.numpy().reshape(-1)
    # 16 bits: numpy sorts them by radix, in order of arrival within an expert. Foreign ids go to the end.
    keys = np.where((flat >= 0) & (flat < experts), flat, experts).astype(np.uint16)
    order = np.argsort(keys, kind="stable")
    stops = np.cumsum(counts)

    def shares(chosen: npt.NDArray[np.intp]) -> tuple[Share, ...]:
        return tuple(Share(e, int(stops[e] - counts[e]), int(stops[e])) for e in chosen.tolist())

    streamed = np.flatnonzero(strategy == STREAMED)
    return Routing(
        rows=torch.from_numpy(order // topk_ids.shape[1]).to(device),
        weights=topk_weights.view(-1)[torch.from_numpy(order)].to(device),
        resident=shares(np.flatnonzero(strategy == RESIDENT)),
        streamed=shares(streamed[np.argsort(-counts[streamed], kind="stable")]),
    )
