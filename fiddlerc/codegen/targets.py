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
    k_block         inputs whose weights stay in the second-level cache while several tiles pass over them
    fetch_tokens    from so many tokens on one pass over the weights fetches them explicitly
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
    fetch_tokens: int


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")

# A packed row is 2 zmm or 4 ymm; vectors must divide that.
TARGETS: dict[str, Target] = {
    target.isa: target
    for target in (
        # 14 x 2 sums + 2 weights + 1 broadcast = 31 of 32 registers. 1024 inputs x 32 outputs: 64 KiB, twice in any L2.
        Target(
            isa="avx512_bf16",
            header="isa_avx512_bf16.hpp",
            policy="Avx512Bf16",
            check="has_avx512_bf16",
            flags=(*_AVX512, "-mavx512bf16"),
            element_bytes=2,
            tile_tokens=14,
            tile_vectors=2,
            narrow_tiles=(),
            k_block=1024,
            fetch_tokens=7,
        ),
        # Each weight vector becomes two (even and odd inputs): 12 x 2 sums + 4 weights + 2 broadcasts = 30 of 32.
        Target(
            isa="avx512f",
            header="isa_avx512f.hpp",
            policy="Avx512f",
            check="has_avx512f",
            flags=_AVX512,
            element_bytes=4,
            tile_tokens=12,
            tile_vectors=2,
            narrow_tiles=(),
            k_block=1024,
            fetch_tokens=4,
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
            narrow_tiles=((2, 4),),
            k_block=1024,
            fetch_tokens=2,
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
            fetch_tokens=2,
        ),
    )
}
