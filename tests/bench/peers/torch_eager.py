"""torch eager: three F.linear in bf16 for each expert, as Fiddler's published code and transformers' eager loop."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from ..kernels.contender import Contender


class Peer(Contender):
    name = "torch"
    packs = False

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.weights.gate_up[e].chunk(2)
        return linear(silu(linear(x, gate)) * linear(x, up), self.weights.down[e])

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = torch.where(ids == e)
            y = self.expert(e, x[token]) * topk_weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out
