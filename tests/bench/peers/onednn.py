"""oneDNN as torch ships it, with weights reordered once for its own kernels."""

from __future__ import annotations

import torch

from ..kernels.contender import Contender, Weights
from ..kernels.shapes import Shape


class Peer(Contender):
    name = "onednn"
    has_layer = False  # it has matrix products, no MoE layer

    def __init__(self) -> None:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ImportError("oneDNN multiplies bf16 with AVX-512 or AVX-NE-CONVERT, which this CPU has not")

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        super().prepare(weights, shape, layer)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._experts = [
            tuple(reorder(w.contiguous()) for w in (*weights.gate_up[e].chunk(2), weights.down[e]))
            for e in range(weights.count)
        ]

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self._experts[e]
        linear = torch.ops.mkldnn._linear_pointwise
        middle = linear(x, gate, None, "swish", [], "") * linear(x, up, None, "none", [], "")
        return linear(middle, down, None, "none", [], "")

    def close(self) -> None:
        super().close()
        del self._experts
