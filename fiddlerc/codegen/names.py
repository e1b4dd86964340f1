"""Names of kernels: fdl_bf16_moe_h4096_i14336 is a library, fdl_bf16_moe_h4096_i14336_m14n2__avx512bf16 its variant.

An activation other than SwiGLU and biases follow the shape: fdl_bf16_moe_h2880_i2880_gptoss_bias. The same name is the
symbol, the file, and what plans, benchmarks and golden files call the kernel.
"""

from __future__ import annotations

from ..ir import ExpertForm

_PLAIN = "silu"


def format_name(expert: ExpertForm) -> str:
    """The library's name."""
    activation = "" if expert.activation == _PLAIN else f"_{expert.activation}"
    return f"fdl_bf16_moe_h{expert.hidden_size}_i{expert.intermediate_size}{activation}{'_bias' * expert.bias}"


def format_symbol(expert: ExpertForm, tile_tokens: int, tile_vectors: int, isa: str) -> str:
    """A variant's name: its tile is tile_tokens tokens by tile_vectors vectors of outputs."""
    return f"{format_name(expert)}_m{tile_tokens}n{tile_vectors}__{isa.replace('_', '')}"
