"""Names of kernels: fdl_bf16_moe_h4096_i14336 is a library, fdl_bf16_moe_h4096_i14336_m14n2__avx512bf16 a variant of it.

An activation other than SwiGLU and biases follow the shape: fdl_bf16_moe_h2880_i2880_gptoss_bias. The same name is the
symbol, the file, and what plans, benchmarks and golden files call the kernel.
"""

from __future__ import annotations

import re

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import KNOWN_ISAS

from ..ir import ACTIVATIONS, ExpertForm

_PLAIN = "silu"
# The longest first: gelu_tanh begins like gelu.
_OTHERS = "|".join(sorted(set(ACTIVATIONS) - {_PLAIN}, key=len, reverse=True))
_FORM = rf"fdl_bf16_moe_h([1-9]\d*)_i([1-9]\d*)(?:_({_OTHERS}))?(_bias)?"
_NAME = re.compile(_FORM)
_SYMBOL = re.compile(_FORM + r"_m([1-9]\d*)n([1-9]\d*)__([a-z0-9]+)")
_ISA_OF_SUFFIX = {isa.replace("_", ""): isa for isa in KNOWN_ISAS}


def format_name(expert: ExpertForm) -> str:
    """The library's name."""
    activation = "" if expert.activation == _PLAIN else f"_{expert.activation}"
    return f"fdl_bf16_moe_h{expert.hidden_size}_i{expert.intermediate_size}{activation}{'_bias' * expert.bias}"


def parse_name(name: str) -> ExpertForm:
    """The experts that a library is for. Raises FiddlerError if it is no library's name."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise FiddlerError(
            "not a kernel name",
            found=repr(name),
            expected="fdl_bf16_moe_h<hidden>_i<intermediate>[_<activation>][_bias]",
        )
    return _form(found)


def format_symbol(expert: ExpertForm, tile_tokens: int, tile_vectors: int, isa: str) -> str:
    """A variant's name: its tile is tile_tokens tokens by tile_vectors vectors of outputs."""
    return f"{format_name(expert)}_m{tile_tokens}n{tile_vectors}__{isa.replace('_', '')}"


def parse_symbol(symbol: str) -> tuple[ExpertForm, int, int, str]:
    """(experts, tile_tokens, tile_vectors, isa). Raises FiddlerError if it is no such name."""
    found = _SYMBOL.fullmatch(symbol)
    if found is None or found[7] not in _ISA_OF_SUFFIX:
        raise FiddlerError(
            "not a kernel symbol",
            found=repr(symbol),
            expected="fdl_bf16_moe_h<hidden>_i<intermediate>[_<activation>][_bias]_m<tokens>n<vectors>__<isa>",
        )
    return _form(found), int(found[5]), int(found[6]), _ISA_OF_SUFFIX[found[7]]


def _form(found: re.Match[str]) -> ExpertForm:
    activation = next(name for name in ACTIVATIONS if name == (found[3] or _PLAIN))
    return ExpertForm(int(found[1]), int(found[2]), activation, bias=found[4] is not None)
