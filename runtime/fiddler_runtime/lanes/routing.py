"""Which tokens go to which expert, sorted by expert, for the accelerator's lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..makespan import RESIDENT, STREAMED


@dataclass(frozen=True)
class Share:
    """One expert's part of a Routing: rows[start:stop] and weights[start:stop].

    first  of a split expert, how many of its intermediate rows are computed here, the first ones; None: all
    """

    expert: int
    start: int
    stop: int
    first: int | None = None


@dataclass(frozen=True)
class Routing:
    """The accelerator's share of a layer.

    rows      int64 [n], token of each choice, grouped by expert; on the device
    weights   fp32 [n], its weight
    resident  experts whose weights are there
    streamed  experts to copy first, the one with most tokens first (design.md, dispatch: Johnson's rule); a split one
              last
    lent      the expert that was fetched ahead, if it is wanted; then it is not among the resident ones
    """

    rows: torch.Tensor
    weights: torch.Tensor
    resident: tuple[Share, ...]
    streamed: tuple[Share, ...]
    lent: Share | None = None


def route(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    counts: npt.NDArray[np.int32],
    strategy: npt.NDArray[np.uint8],
    send: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    split: tuple[int, int] | None = None,
    lent: int | None = None,
) -> Routing:
    """Sorts a layer's choices by expert.

    topk_ids int64 [T, k] and topk_weights fp32 [T, k] on the CPU, contiguous; counts, strategy [E] and split as the
    dispatcher gave them; send: as Device.send. Ids outside [0, E) belong to no expert. lent: the expert that was
    fetched ahead, if any
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
    resident = shares(np.flatnonzero(strategy == RESIDENT))
    last = () if split is None else tuple(replace(s, first=split[1]) for s in shares(np.array([split[0]])))
    return Routing(
        rows=send("rows", torch.from_numpy(order // topk_ids.shape[1])),
        weights=send("scale", topk_weights.view(-1)[torch.from_numpy(order)]),
        resident=tuple(share for share in resident if share.expert != lent),
        streamed=shares(streamed[np.argsort(-counts[streamed], kind="stable")]) + last,
        lent=next((share for share in resident if share.expert == lent), None),
    )
