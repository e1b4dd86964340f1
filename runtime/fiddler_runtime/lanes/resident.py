"""Lane (a): experts whose weights are on the accelerator."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .expert import UnpackedExpert, run_expert
from .routing import Routing


def run_resident(
    hidden: torch.Tensor,
    routing: Routing,
    experts: Mapping[int, UnpackedExpert],
    out: torch.Tensor,
) -> None:
    """Adds the resident experts' share to out fp32 [T, H], in the device's compute queue.

    hidden bf16 [T, H]; experts: those whose weights are there.
    """
    for share in routing.resident:
        part = slice(share.start, share.stop)
        run_expert(hidden, routing.rows[part], routing.weights[part], experts[share.expert], out)
