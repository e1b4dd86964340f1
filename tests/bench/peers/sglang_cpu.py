"""SGLang's CPU kernels (`fused_experts_cpu`), which vLLM's wheel carries."""

from __future__ import annotations

import torch

from ..kernels.contender import Contender, Weights, need_avx512_bf16
from ..kernels.shapes import Shape
from .vllm_cpu import load_operators

_UNQUANTISED = 0


class Peer(Contender):
    name = "sglang"

    def __init__(self) -> None:
        need_avx512_bf16()
        load_operators()

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        super().prepare(weights, shape, layer)
        self._packed = [torch.ops._C.convert_weight_packed(weight) for weight in (weights.gate_up, weights.down)]

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        gate_up, down = (weight[e : e + 1] for weight in self._packed)
        return self._run(x, gate_up, down, torch.ones(x.shape[0], 1), torch.zeros(x.shape[0], 1, dtype=torch.int32))

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return self._run(x, *self._packed, topk_weights, ids.int())

    @staticmethod
    def _run(
        x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        nothing = [None] * 5  # scales and zero points
        torch.ops._C.fused_experts_cpu(
            out, x, gate_up, down, topk_weights, ids, _UNQUANTISED, *nothing, None, None, None, None, None, True
        )
        return out

    def regions(self, e: int) -> list[torch.Tensor]:
        return [weight[e] for weight in self._packed]

    def close(self) -> None:
        super().close()
        del self._packed
