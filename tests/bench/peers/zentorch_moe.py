"""zentorch, AMD's plugin of torch: prepacked linear layers for one expert, its fused operator for a layer."""

from __future__ import annotations

import torch
import zentorch  # noqa: F401  registers torch.ops.zentorch

from ..kernels.contender import Contender, Weights, need_avx512_bf16
from ..kernels.shapes import Shape


class Peer(Contender):
    name = "zentorch"

    def __init__(self) -> None:
        need_avx512_bf16()

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        super().prepare(weights, shape, layer)
        self._experts = []
        if layer:
            # The operator keeps packed copies by itself, made when an expert first has tokens: here all do.
            ids = torch.arange(weights.count * shape.top_k).view(-1, shape.top_k) % weights.count
            self.layer(torch.zeros(len(ids), shape.hidden_size, dtype=torch.bfloat16), ids, torch.ones(ids.shape))
            return
        pack = torch.ops.zentorch.zentorch_weight_prepack_for_linear
        self._experts = [
            tuple(pack(w.clone()) for w in (*weights.gate_up[e].chunk(2), weights.down[e]))
            for e in range(weights.count)
        ]

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self._experts[e]
        linear = torch.ops.zentorch.zentorch_linear_unary
        middle = linear(x, gate, is_weight_prepacked=True, post_op="silu") * linear(x, up, is_weight_prepacked=True)
        return linear(middle, down, is_weight_prepacked=True)

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(
            out, x, self.weights.gate_up, self.weights.down, None, None, topk_weights, ids.int(), False, "silu"
        )
        return out

    def regions(self, e: int) -> list[torch.Tensor]:
        return list(self._experts[e]) if self._experts else super().regions(e)

    def close(self) -> None:
        super().close()
        self._experts = []
        torch.ops.zentorch.zentorch_flush_moe_weight_cache()
