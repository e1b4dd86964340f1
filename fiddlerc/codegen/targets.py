"""What differs between instruction sets, as data: compiler flags, header, and what a register tile costs there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir import Machine


@dataclass(frozen=True)
class Core:
    """How a core's reads from memory get along with its multiplies, found by measuring (docs/kernels-measured.md).

    places          of a block's depth that one pass reads in turn, so many streams from memory
    fetch_level     the cache that one pass fetches into: 1 or 2
    rows_ahead      fetched so far ahead of all places together: of one place twice the most that are in flight; streams
                    that the hardware's own prefetching follows bear less
    rows_in_flight  of one place: plain loads keep memory busy while the out-of-order window holds so many packed rows
    fetch_cycles    with fewer cycles of multiplies for a row (of 64 bytes each), fetching takes `too_fast` times as
                    long as memory: the core drops what it is asked for
    """

    places: int
    fetch_level: int
    rows_ahead: int = 62
    rows_in_flight: int = 0
    fetch_cycles: int = 0
    too_fast: float = 1.0


# Four streams come faster than one, and one that is fetched slower: 25, 20 and 16 GB/s.
ZEN3 = Core(places=4, fetch_level=1, rows_ahead=8)
# avx512_bf16 is fastest with fetching from 7 tokens on, avx512f and avx2 from 3, and to scalar it is all the same.
ZEN4 = Core(places=1, fetch_level=2, rows_in_flight=14, fetch_cycles=12, too_fast=1.55)
# Emerald Rapids: four streams come faster than one, 18 and 15 GB/s, and multiplies do not hold them up where each is
# fetched 1 KiB ahead: with one token 1.15 times as fast as one that is, into the first-level cache 1.05 times again.
# Sapphire Rapids likewise, with every instruction set (avx2: 1.00 to 1.07 times as fast as with Zen 3's two rows).
INTEL = Core(places=4, fetch_level=1, rows_ahead=32)
# avx512_bf16 is fastest with fetching from two tokens on. At the 40 GB/s of one core 31 rows are 100 ns of latency.
ZEN5 = Core(places=1, fetch_level=1, rows_in_flight=31)


@dataclass(frozen=True)
class Target:
    """One instruction set's kernel.

    header, policy  the C++ header below include/fiddler/, and the struct that it multiplies vectors with
    check           the function of cpu.hpp that asks whether it may run
    flags           the compiler flags of its file, and of no other
    element_bytes   of an activation: 2 (bf16) or 4 (fp32)
    tiles_from      so many tokens of an expert and more are multiplied as tiles (AMX), fewer as vectors, and the
                    numbers below are of these. 0: all are vectors
    includes        further headers that its own needs and others do not
    functions       what the names of its functions run, burn in the header end with

    What selection.py counts with, of two consecutive inputs (a pair) of one vector of outputs or one token:
    lanes           outputs in a vector register; a packed row has 32
    registers       vector registers that there are
    constants       of these, held by masks and intermediate products
    weight_registers  for a vector's weights, as one multiply takes them
    weight_loads, weight_instructions  to get those of a pair
    input_registers   for a token's input in all lanes
    input_loads, input_instructions  to get a pair of them
    multiplies      multiply-unit operations for a token's pair and a vector
    l2_share        of the second-level cache, for a unit's inputs and sums and two blocks of weights; the rest is left
                    to the outputs, the stack, and what prefetching brings too early. AVX2's tiles multiply for so
                    long that some inputs may come from the third level: on Zen 3 twice as deep a block is faster
    core            what reads and multiplies; here of a CPU that has no more than the instruction set
    """

    isa: str
    header: str
    policy: str
    check: str
    flags: tuple[str, ...]
    element_bytes: int
    lanes: int
    registers: int
    constants: int
    weight_registers: int
    weight_loads: int
    weight_instructions: int
    input_registers: int
    input_loads: int
    input_instructions: int
    multiplies: int
    l2_share: float = 0.75
    core: Core = ZEN4
    tiles_from: int = 0
    functions: str = ""
    includes: tuple[str, ...] = ()


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")

_ZEN4_L1 = 32 << 10

TARGETS: dict[str, Target] = {
    target.isa: target
    for target in (
        # One vdpbf16ps takes both inputs as they are.
        Target(
            isa="avx512_bf16",
            header="isa_avx512_bf16.hpp",
            policy="Avx512Bf16",
            check="has_avx512_bf16",
            flags=(*_AVX512, "-mavx512bf16"),
            element_bytes=2,
            lanes=16,
            registers=32,
            constants=0,
            weight_registers=1,
            weight_loads=1,
            weight_instructions=1,
            input_registers=1,
            input_loads=1,
            input_instructions=1,
            multiplies=1,
        ),
        # A weight vector becomes two, one after the other: shifted for even inputs, masked for odd ones.
        Target(
            isa="avx512f",
            header="isa_avx512f.hpp",
            policy="Avx512f",
            check="has_avx512f",
            flags=_AVX512,
            element_bytes=4,
            lanes=16,
            registers=32,
            constants=1,
            weight_registers=1,
            weight_loads=2,
            weight_instructions=4,
            input_registers=1,
            input_loads=2,
            input_instructions=2,
            multiplies=2,
        ),
        # Shifted for even inputs; for odd ones the upper halves are blended into that, which takes no mask.
        Target(
            isa="avx2",
            header="isa_avx2.hpp",
            policy="Avx2",
            check="has_avx2",
            flags=("-mavx2", "-mfma"),
            element_bytes=4,
            lanes=8,
            registers=16,
            constants=0,
            weight_registers=1,
            weight_loads=2,
            weight_instructions=3,
            input_registers=1,
            input_loads=2,
            input_instructions=2,
            multiplies=2,
            core=ZEN3,
            l2_share=1.25,
        ),
        # Products and sums apart; a broadcast is a load and a shuffle.
        Target(
            isa="scalar",
            header="isa_scalar.hpp",
            policy="Scalar",
            check="always",
            flags=(),
            element_bytes=4,
            lanes=4,
            registers=16,
            constants=2,
            weight_registers=1,
            weight_loads=2,
            weight_instructions=4,
            input_registers=1,
            input_loads=2,
            input_instructions=4,
            multiplies=4,
            core=ZEN3,
        ),
    )
}

# Of three tokens vectors are 1.10 times as fast as tiles with small experts (Qwen3's, OLMoE's), as fast with large ones
# (Phi-3.5's), of four 0.95 and 0.89 times (Emerald Rapids, one thread, builds of both).
# Half of the second-level cache is left to the sums of a task's blocks.
TARGETS["amx_bf16"] = replace(
    TARGETS["avx512_bf16"],
    isa="amx_bf16",
    header="isa_amx_bf16.hpp",
    check="has_amx_bf16",
    core=INTEL,
    tiles_from=4,
    l2_share=0.5,
    functions="_tiles",
    includes=("amx_tiles.hpp", "isa_avx512_bf16.hpp"),
)


def target_on(isa: str, machine: Machine | None) -> Target:
    """An instruction set's kernel on that machine, or on one that has no more than it (None).

    Of Intel's CPUs, told by their name, two with AMX were measured; they stand for those without, and for those whose
    AMX a hypervisor hides. Of AMD's with AVX-512 two were, which their first-level caches tell apart: Zen 4 has 32 KiB,
    Zen 5 48.
    """
    target = TARGETS[isa]
    if target.tiles_from or machine is None:
        return target
    if "amx_bf16" in machine.isa or "Intel" in machine.cpu:
        return replace(target, core=INTEL)
    if "avx512f" not in machine.isa:
        return target
    return replace(target, core=ZEN5 if machine.l1d_bytes > _ZEN4_L1 else ZEN4)
