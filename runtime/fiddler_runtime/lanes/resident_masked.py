"""Lane (a) where nothing may depend on the routing: within a captured step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .expert import UnpackedExpert, expert_result


def run_resident_masked(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Mapping[int, UnpackedExpert],
    out: torch.Tensor,
) -> None:
    """Adds the resident experts' share to out fp32 [T, H]: each computes every token, and what a token did not choose
    counts nothing.

    hidden bf16 [T, H]; ids integer and weights fp32 [T, k]. All residents of a layer are read in each step: with few of
    them that is little beside the CPU lane, with many it is not. A kernel that takes the ids on the device, and reads
    only the experts that were chosen, belongs here.
    """
    for expert in sorted(experts):
        chosen = ids == expert
        weight = (weights * chosen).sum(-1, keepdim=True)
        share = expert_result(hidden, experts[expert]) * weight
        # Not by its weight of 0 alone: 0 times an infinity of another token's result would be no number.
        out.add_(share.masked_fill_(chosen.any(-1, keepdim=True).logical_not(), 0.0))
