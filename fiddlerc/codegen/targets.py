"""What differs between instruction sets, as data: compiler flags, header, register tile, depth block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One instruction set's kernel.

    header, policy  the C++ header below include/fiddler/ and the struct in it
    check           the function of cpu.hpp that asks whether it may run
    flags           the compiler flags of its file, and of no other
    element_bytes   of an activation: 2 (bf16) or 4 (fp32)
    tile_tokens, tile_vectors  the register tile of many tokens
    narrow_tiles    (most tokens, vectors): wider rows for fewer tokens
    k_block         inputs whose weights stay in the second-level cache while many tokens pass
    """

    isa: str
    header: str
    policy: str
    check: str
    flags: tuple[str, ...]
    element_bytes: int
    tile_tokens: int
    tile_vectors: int
    narrow_tiles: tuple[tuple[int, int], ...]
    k_block: int


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")

NEAR_BLOCK = 128
"""Inputs whose weights (16 KiB) and their successors are in the first-level cache together while few tokens pass."""

# A packed row is 4 zmm or 8 ymm; vectors must divide that.
TARGETS: dict[str, Target] = {
    target.isa: target
    for target in (
        # 6 x 4 sums + 4 weights + 1 broadcast = 29 of 32 registers. 2048 inputs x 64 outputs = 256 KiB, in any L2.
        Target(
            isa="avx512_bf16",
            header="isa_avx512_bf16.hpp",
            policy="Avx512Bf16",
            check="has_avx512_bf16",
            flags=(*_AVX512, "-mavx512bf16"),
            element_bytes=2,
            tile_tokens=6,
            tile_vectors=4,
            narrow_tiles=(),
            k_block=2048,
        ),
        # Each weight vector becomes two (even and odd inputs): 8 x 2 sums + 4 weights + 2 broadcasts = 22 of 32.
        Target(
            isa="avx512f",
            header="isa_avx512f.hpp",
            policy="Avx512f",
            check="has_avx512f",
            flags=_AVX512,
            element_bytes=4,
            tile_tokens=8,
            tile_vectors=2,
            narrow_tiles=((3, 4),),
            k_block=1024,
        ),
        # 4 x 2 sums + 4 weights + 2 broadcasts = 14 of 16 registers.
        Target(
            isa="avx2",
            header="isa_avx2.hpp",
            policy="Avx2",
            check="has_avx2",
            flags=("-mavx2", "-mfma"),
            element_bytes=4,
            tile_tokens=4,
            tile_vectors=2,
            narrow_tiles=((1, 8), (2, 4)),
            k_block=1024,
        ),
        Target(
            isa="scalar",
            header="isa_scalar.hpp",
            policy="Scalar",
            check="always",
            flags=(),
            element_bytes=4,
            tile_tokens=2,
            tile_vectors=2,
            narrow_tiles=(),
            k_block=1024,
        ),
    )
}
