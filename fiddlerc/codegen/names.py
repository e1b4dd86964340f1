"""Names of kernels: fdl_bf16_moe_h4096_i14336 is a library, fdl_bf16_moe_h4096_i14336_m6n4__avx512bf16 a variant of it.

The same name is the symbol, the file, and what plans, benchmarks and golden files call the kernel.
"""

from __future__ import annotations

import re

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import KNOWN_ISAS

_SHAPE = r"fdl_bf16_moe_h([1-9]\d*)_i([1-9]\d*)"
_NAME = re.compile(_SHAPE)
_SYMBOL = re.compile(_SHAPE + r"_m([1-9]\d*)n([1-9]\d*)__([a-z0-9]+)")
_ISA_OF_SUFFIX = {isa.replace("_", ""): isa for isa in KNOWN_ISAS}


def format_name(hidden_size: int, intermediate_size: int) -> str:
    """The library's name."""
    return f"fdl_bf16_moe_h{hidden_size}_i{intermediate_size}"


def parse_name(name: str) -> tuple[int, int]:
    """(hidden_size, intermediate_size) of a library's name. Raises FiddlerError if it is not one."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise FiddlerError("not a kernel name", found=repr(name), expected="fdl_bf16_moe_h<hidden>_i<intermediate>")
    return int(found[1]), int(found[2])


def format_symbol(hidden_size: int, intermediate_size: int, tile_tokens: int, tile_vectors: int, isa: str) -> str:
    """A variant's name: its tile is tile_tokens tokens by tile_vectors vectors of outputs."""
    return f"{format_name(hidden_size, intermediate_size)}_m{tile_tokens}n{tile_vectors}__{isa.replace('_', '')}"


def parse_symbol(symbol: str) -> tuple[int, int, int, int, str]:
    """(hidden_size, intermediate_size, tile_tokens, tile_vectors, isa). Raises FiddlerError if it is no such name."""
    found = _SYMBOL.fullmatch(symbol)
    if found is None or found[5] not in _ISA_OF_SUFFIX:
        raise FiddlerError(
            "not a kernel symbol",
            found=repr(symbol),
            expected="fdl_bf16_moe_h<hidden>_i<intermediate>_m<tokens>n<vectors>__<isa>",
        )
    return int(found[1]), int(found[2]), int(found[3]), int(found[4]), _ISA_OF_SUFFIX[found[5]]
