"""transformers' own experts module, with its `grouped_mm` implementation. (`torch` has the eager loop.)"""

from __future__ import annotations

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ..kernels.contender import Contender, Weights
from ..kernels.shapes import Shape


class Peer(Contender):
    name = "transformers"
    packs = False
    has_expert = False  # for one expert it is what torch eager is

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        super().prepare(weights, shape, layer)
        config = MixtralConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            experts_implementation="grouped_mm",
        )
        with torch.device("meta"):
            self._module = MixtralExperts(config)
        self._module.gate_up_proj = torch.nn.Parameter(weights.gate_up, requires_grad=False)
        self._module.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._module(x, ids, topk_weights)
        return y

    def close(self) -> None:
        super().close()
        del self._module
