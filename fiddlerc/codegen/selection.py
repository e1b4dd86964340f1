"""How a kernel cuts its work: candidates, what is impossible about them, and a cost for the others. Pure arithmetic.

A cost is in multiply-unit slots for one packed row (two inputs of 32 outputs) and all tokens. The model knows what an
instruction set needs (targets.py) and how large the machine's caches are; the few numbers below are of all CPUs alike.
It is deliberately independent of measured bandwidths: two calibrations of a machine give the same kernels.
docs/kernels.md, Selection, has its terms, docs/kernels-measured.md what they were held against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.text import format_bytes

from ..ir import Blocking, ExpertForm, Machine, NarrowTile
from .targets import Target

UNIT_TOKENS = 252
"""Most tokens of an expert that pass over its weights together; rendered into the library."""

ROW_LANES = 32
ROW_BYTES = ROW_LANES * 4
K_BLOCKS = (128, 256, 512, 1024, 2048, 4096)
FETCH_BYTES = (1024, 2048, 4096, 8192, 16384, 32768)
SMALL_TOKENS = tuple(range(1, 17))
LARGE_TOKENS = (24, 32, 48, 64, 128, UNIT_TOKENS)

# What a core takes for a row from memory: 128 bytes at 22 GB/s and 3.7 GHz (AMD Zen 4, both of two cores reading).
_MEMORY_SLOTS = 21.0
# Instructions in an out-of-order window: Zen 4's; Zen 5's is of 448.
_WINDOW = 320
# Prefetch instructions reach a little less than the hardware's own prefetching.
_FETCH_COST = 1.03
# Several places are streams that the hardware's prefetching follows. Without fetching a little ahead AVX2 is up to 1.2
# times slower on Zen 3.
_PLACES_UNFETCHED = 1.1
# Independent sums that hide a multiply's latency: 4 cycles, 2 a cycle.
_LATENCY_SUMS = 8
_LOOP_INSTRUCTIONS = 3
_ISSUE_PER_SLOT = 3  # six instructions a cycle beside two multiplies
# Several tiles read a block's weights from the second-level cache again: so long for a vector of them. Held against
# AVX2 on Zen 4, where tile 2 x 4 takes 1.6 to 1.8 times as long as 4 x 2, which is bound by its multiplies.
_VECTOR_FROM_L2_SLOTS = 6.0
_PASS_SLOTS = 40.0  # entering a tile's loop and leaving it, beside moving its sums
# A CPU with eight tiles: 16 rows of 16 sums, each of 32 products, take a cycle a row (16.0 a product measured); its
# second-level cache gives some 40 bytes a cycle, not beside what comes from memory, since both go through the same
# buffers; and moving a tile of sums to memory and back holds up the products for so long (Emerald Rapids).
TILE_ROWS, TILE_INPUTS, _TILE_TOKENS, _TILE_VECTORS, _TILE_REGISTERS = 16, 32, 48, 2, 8
TILE_UNIT_TOKENS = -(-UNIT_TOKENS // _TILE_TOKENS) * _TILE_TOKENS
_L2_BYTES_PER_SLOT, _TILE_MOVE_SLOTS = 40.0, 23.0
_L1_SHARE = 0.5  # of a first-level cache, for inputs or what is fetched
_TYPICAL_L1, _TYPICAL_L2 = 32 << 10, 1 << 20  # where the machine does not tell


@dataclass(frozen=True)
class Candidate:
    """A blocking and its cost over the least possible one: geometric means over few and over many tokens."""

    blocking: Blocking
    small: float
    large: float

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """Least first: the cost to 0.1 %, then the smaller depth block, the shorter distance, and fetching less."""
        cut = self.blocking
        return round(self.small * self.large, 3), cut.k_block, cut.fetch_bytes, -cut.fetch_tokens


@dataclass(frozen=True)
class Selection:
    """Candidates of one instruction set, best first, and why the first is."""

    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]

    @property
    def blocking(self) -> Blocking:
        """The best one."""
        return self.candidates[0].blocking


def select(target: Target, expert: ExpertForm, machine: Machine | None) -> Selection:
    """Ranks every blocking that this instruction set and the machine's caches permit.

    machine: None, or a cache size of 0, takes 32 KiB of L1 and 1 MiB of L2 a core.
    """
    l1 = machine.l1d_bytes if machine is not None and machine.l1d_bytes else _TYPICAL_L1
    l2 = machine.l2_bytes if machine is not None and machine.l2_bytes else _TYPICAL_L2
    depth = max(expert.hidden_size, expert.intermediate_size)
    rejected: list[str] = []
    candidates = []
    for tokens, vectors in _tiles(target):
        narrow = _narrow_tiles(target, tokens, vectors)
        for k_block in _k_blocks(target, tokens, vectors, depth, l1, l2, rejected):
            for fetch_bytes in _fetch_bytes(target, l1):
                first = Blocking(tokens, vectors, narrow, k_block, 1, fetch_bytes)
                for fetch_tokens in range(1, 1 + (target.tiles_from or 1 + most_of_one_pass(target, first))):
                    blocking = replace(first, fetch_tokens=fetch_tokens)
                    candidates.append(
                        Candidate(
                            blocking, _mean(target, blocking, SMALL_TOKENS), _mean(target, blocking, LARGE_TOKENS)
                        )
                    )
    if not candidates:
        raise FiddlerError(
            f"no depth block of {target.isa} kernels fits this machine's caches",
            found=f"{format_bytes(l1)} of L1 and {format_bytes(l2)} of L2 a core",
            expected=f"room for {K_BLOCKS[0]} inputs of {UNIT_TOKENS} tokens",
            hint="fiddlerc doctor   (or correct machine.l2_bytes in hw.json)",
        )
    ranked = tuple(sorted(candidates, key=lambda candidate: candidate.rank))
    return Selection(ranked, (*_explain(target, ranked, l2), *dict.fromkeys(rejected)))


def finalists(selection: Selection) -> tuple[tuple[str, Candidate], ...]:
    """What is worth measuring: the best, and for each parameter the best candidates that differ in it alone.

    Each with what differs, in words; the first with none.
    """
    best = selection.candidates[0]
    found: list[tuple[str, Candidate]] = [("", best)]

    def nearest(name: str, most: int) -> None:
        value = getattr(best.blocking, name)
        others = [c for c in selection.candidates if _differs(c.blocking, best.blocking) == {name}]
        # One on either side at least, where there is: the model may be off in either direction.
        below = [c for c in others if getattr(c.blocking, name) < value]
        above = [c for c in others if getattr(c.blocking, name) > value]
        for side in (below, above):
            for candidate in side[:most]:
                found.append((f"{name} {getattr(candidate.blocking, name)}", candidate))

    nearest("k_block", 1)
    nearest("fetch_bytes", 1)
    nearest("fetch_tokens", 2)
    for candidate in selection.candidates:
        shape = candidate.blocking.tile_tokens, candidate.blocking.tile_vectors
        if shape != (best.blocking.tile_tokens, best.blocking.tile_vectors):
            found.append((f"tile {shape[0]} x {shape[1]}", candidate))
            break
    return tuple(found)


def registers(target: Target, tokens: int, vectors: int) -> int:
    """Vector registers of a tile: its sums, and the weights of all vectors with one token's inputs, or the reverse."""
    weights, inputs = target.weight_registers, target.input_registers
    operands = min(vectors * weights + inputs, weights + tokens * inputs)
    return tokens * vectors + operands + target.constants


def working_set(target: Target, k_block: int) -> int:
    """Bytes that several tiles pass over again and again: a unit's inputs and sums, a block of weights and the next."""
    tokens = TILE_UNIT_TOKENS if target.tiles_from else UNIT_TOKENS
    return tokens * (k_block * target.element_bytes + ROW_BYTES) + 2 * k_block // 2 * ROW_BYTES


def slots(target: Target, tokens: int, vectors: int) -> float:
    """Multiply-unit slots that a tile takes for a pair of inputs: the multiplies, or what holds them up."""
    multiplies = tokens * vectors * target.multiplies
    loads = vectors * target.weight_loads + tokens * target.input_loads
    instructions = _instructions(target, tokens, vectors)
    latency = max(1.0, _LATENCY_SUMS / (tokens * vectors))
    return max(multiplies * latency, loads, instructions / _ISSUE_PER_SLOT)


def most_of_one_pass(target: Target, blocking: Blocking) -> int:
    """The most tokens that one pass over a row is enough for."""
    tiles = (*blocking.narrow_tiles, NarrowTile(blocking.tile_tokens, blocking.tile_vectors))
    return max((tile.tokens for tile in tiles if tile.vectors * target.lanes == ROW_LANES), default=0)


def row_slots(target: Target, blocking: Blocking, tokens: int) -> float:
    """Slots for one packed row and so many tokens of an expert, the memory's time included."""
    if 0 < target.tiles_from <= tokens:
        return _tile_row_slots(blocking, tokens)
    row_vectors = ROW_LANES // target.lanes
    sizes = _tile_sizes(target, blocking, tokens)
    columns = [row_vectors // _vectors(blocking, size) for size in sizes]
    compute = sum(slots(target, m, _vectors(blocking, m)) * n for m, n in zip(sizes, columns, strict=True))
    if sum(columns) == 1:
        fetches = tokens >= blocking.fetch_tokens
        core = target.core
        if core.places > 1:
            behind = 1.0 if fetches else _PLACES_UNFETCHED
        else:
            reach = _WINDOW / core.rows_in_flight / _instructions(target, tokens, row_vectors)
            cycles = _least(target, tokens) * target.lanes / 16  # of 64 bytes of multiplies
            fetched = _FETCH_COST if cycles >= core.fetch_cycles else core.too_fast
            behind = fetched if fetches else max(1.0, 1.0 / reach)
        return max(_MEMORY_SLOTS * behind, compute)
    # Several passes: a block's sums are loaded and stored once each, while the next block is fetched. One tile's blocks
    # are half as deep.
    compute = max(compute, len(sizes) * row_vectors * _VECTOR_FROM_L2_SLOTS)
    moved = 2.0 * tokens * row_vectors + _PASS_SLOTS * sum(columns)
    return max(_MEMORY_SLOTS, compute + moved / (blocking.k_block / (4 if len(sizes) == 1 else 2)))


def last_tokens(target: Target, blocking: Blocking) -> int:
    """So many tokens for the last of several tiles, where the others can be so few all the same; or 0.

    Half as many as the largest, where a tile of so many has all of a row's vectors and the largest has not: it takes
    one pass, with as many sums. Two tiles of AVX2 with 8 tokens are 5 x 2 and 3 x 4 then, not 4 x 2 twice.
    """
    least = -(-blocking.tile_tokens // 2)
    return least if _vectors(blocking, least) * target.lanes == ROW_LANES > blocking.tile_vectors * target.lanes else 0


def _tile_sizes(target: Target, blocking: Blocking, tokens: int) -> list[int]:
    """Tokens of each register tile: Parts of task.hpp."""
    count = -(-tokens // blocking.tile_tokens)
    least = last_tokens(target, blocking)
    last = [least] if least and count > 1 and tokens - least <= (count - 1) * blocking.tile_tokens else []
    equal, rest = count - len(last), tokens - sum(last)
    return [rest // equal + (index < rest % equal) for index in range(equal)] + last


def _tile_row_slots(blocking: Blocking, tokens: int) -> float:
    """The same of tiles: the last ones of a unit are filled up to the others' rows."""
    tiles = -(-tokens // TILE_ROWS)
    rows = tiles * -(-tokens // tiles)
    passes = -(-tiles * TILE_ROWS // blocking.tile_tokens)
    multiplies = rows * _TILE_VECTORS / (TILE_INPUTS / 2)
    # Both operands of several passes come from the second-level cache, of one the tokens. Sums are moved with chunks.
    loads = (ROW_BYTES * passes + 4 * rows) / _L2_BYTES_PER_SLOT
    moved = _TILE_MOVE_SLOTS * tiles * _TILE_VECTORS / (blocking.k_block / 2)
    return max(multiplies, _MEMORY_SLOTS + loads) + moved


def _tiles(target: Target) -> Iterator[tuple[int, int]]:
    """The tallest tile that the registers hold, for each width that divides a packed row."""
    if target.tiles_from:
        yield _TILE_TOKENS, _TILE_VECTORS
        return
    vectors = 1
    while vectors <= ROW_LANES // target.lanes:
        tokens = max((m for m in range(1, 64) if registers(target, m, vectors) <= target.registers), default=0)
        if tokens:
            yield tokens, vectors
        vectors *= 2


def _narrow_tiles(target: Target, tokens: int, vectors: int) -> tuple[NarrowTile, ...]:
    """Fewer tokens leave registers for more of the row: it is then read in fewer passes, or in one."""
    wider = [(m, n) for m, n in _tiles(target) if n > vectors and m < tokens]
    return tuple(NarrowTile(m, n) for m, n in sorted(wider))


def _k_blocks(
    target: Target, tokens: int, vectors: int, depth: int, l1: int, l2: int, rejected: list[str]
) -> Iterator[int]:
    for k_block in K_BLOCKS:
        if k_block > K_BLOCKS[0] and k_block // 2 >= depth:
            continue  # of several tiles the same as the one before: all of the depth
        if (size := working_set(target, k_block)) > target.l2_share * l2:
            rejected.append(f"not k_block {k_block}: {format_bytes(size)} of the {format_bytes(l2)} L2")
            continue
        # Where a row takes several passes, a tile's inputs are read again.
        inputs = tokens * k_block * target.element_bytes
        if vectors * target.lanes < ROW_LANES and inputs > _L1_SHARE * l1:
            rejected.append(
                f"not k_block {k_block} with tile {tokens} x {vectors}: its inputs are {format_bytes(inputs)} of the "
                f"{format_bytes(l1)} L1"
            )
            continue
        yield k_block


def _fetch_bytes(target: Target, l1: int) -> Iterator[int]:
    """Distances that hide the latency, of one place several times over, and leave the cache room."""
    for distance in FETCH_BYTES:
        if distance >= target.core.rows_ahead * ROW_BYTES and distance <= _L1_SHARE * l1:
            yield distance


def _instructions(target: Target, tokens: int, vectors: int) -> int:
    loads = vectors * target.weight_instructions + tokens * target.input_instructions
    return loads + tokens * vectors * target.multiplies + _LOOP_INSTRUCTIONS


def _vectors(blocking: Blocking, tokens: int) -> int:
    return next((t.vectors for t in blocking.narrow_tiles if tokens <= t.tokens), blocking.tile_vectors)


def _mean(target: Target, blocking: Blocking, tokens: Sequence[int]) -> float:
    ratios = [row_slots(target, blocking, m) / max(_MEMORY_SLOTS, _least(target, m)) for m in tokens]
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def _least(target: Target, tokens: int) -> float:
    """Slots of the multiplies that so many tokens need for a packed row."""
    each = 2 / TILE_INPUTS if 0 < target.tiles_from <= tokens else target.multiplies
    return ROW_LANES / target.lanes * each * tokens


def _differs(a: Blocking, b: Blocking) -> set[str]:
    return {name for name in Blocking.__dataclass_fields__ if getattr(a, name) != getattr(b, name)}


def _explain(target: Target, ranked: Sequence[Candidate], l2: int) -> tuple[str, ...]:
    best = ranked[0]
    chosen = best.blocking
    tokens, vectors = chosen.tile_tokens, chosen.tile_vectors
    row = ROW_LANES // target.lanes
    if target.tiles_from:
        return _explain_tiles(target, best, l2)
    loads = vectors * target.weight_loads + tokens * target.input_loads
    size = working_set(target, chosen.k_block)
    lines = [
        f"tile {tokens} x {vectors}: {registers(target, tokens, vectors)} of {target.registers} registers; "
        f"{tokens * vectors * target.multiplies} multiplies beside {loads} loads",
        *(
            f"up to {tile.tokens} tokens {tile.vectors} vectors: fewer passes over a row"
            for tile in chosen.narrow_tiles
        ),
        f"k_block {chosen.k_block}: {format_bytes(size)} of the {format_bytes(l2)} L2; "
        "larger ones move the sums less often"
        + ("; what does not fit comes from L3 while the tile multiplies" if size > l2 else ""),
    ]
    core = target.core
    fetches = chosen.fetch_tokens <= most_of_one_pass(target, chosen)
    if core.places > 1:
        rows = chosen.fetch_bytes // ROW_BYTES // core.places
        lines.append(
            f"one pass reads {core.places} places of a block's depth in turn, streams that hardware prefetching "
            + (
                f"follows; from {chosen.fetch_tokens} tokens on it fetches {rows} rows ahead at each, no "
                "farther than those streams bear"
                if fetches
                else "keeps ahead of"
            )
        )
    elif fetches:
        at = _instructions(target, chosen.fetch_tokens, row)
        lines.append(
            f"fetches from {chosen.fetch_tokens} tokens on, {chosen.fetch_bytes} bytes ahead, into "
            f"L{core.fetch_level}: a row is then {at} instructions, and {core.rows_in_flight} rows fit the "
            f"out-of-order window up to {_WINDOW // core.rows_in_flight}"
            + (f"; with less than {core.fetch_cycles} cycles a row requests are dropped" if core.fetch_cycles else "")
        )
    else:
        lines.append("never fetches in one pass: the out-of-order window keeps enough rows in flight")
    lines.append(f"predicted {1 / best.small:.0%} of the limit up to 16 tokens, {1 / best.large:.0%} beyond")
    for other in ranked:
        if (other.blocking.tile_tokens, other.blocking.tile_vectors) != (tokens, vectors):
            slower = other.small * other.large / (best.small * best.large) - 1
            lines.append(
                f"not tile {other.blocking.tile_tokens} x {other.blocking.tile_vectors}: predicted {slower:.1%} slower"
            )
            break
    return tuple(lines)


def _explain_tiles(target: Target, best: Candidate, l2: int) -> tuple[str, ...]:
    chosen = best.blocking
    tokens, vectors = chosen.tile_tokens, chosen.tile_vectors
    products = tokens // TILE_ROWS * vectors
    return (
        f"tile {tokens} x {vectors}: sums in {products} of {_TILE_REGISTERS} tile registers; {products} products for "
        f"{products + 1} loads",
        f"tiles from {target.tiles_from} tokens on, vectors for fewer",
        f"k_block {chosen.k_block}: {format_bytes(working_set(target, chosen.k_block))} of the {format_bytes(l2)} L2, "
        "which sums of several blocks need as well; larger ones move the sums less often",
        f"one pass reads {target.core.places} places of a block's depth in turn, fetched a tile ahead at each; several "
        "fetch the next depth block as evenly as they can",
        f"predicted {1 / best.small:.0%} of the limit up to 16 tokens, {1 / best.large:.0%} beyond",
    )
