"""How kernels are cut: the choice for known machines, and what no choice may do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import Accelerator, Machine
from fiddlerc.codegen import KNOWN_ISAS, candidates, generate, selection
from fiddlerc.codegen.targets import TARGETS, target_on
from fiddlerc.ir import Blocking, ExpertForm, NarrowTile

MIXTRAL = ExpertForm(4096, 14336)


NO_AMX = tuple(isa for isa in KNOWN_ISAS if isa != "amx_bf16")


def machine(l1: int, l2: int, isa: tuple[str, ...] = NO_AMX, cpu: str = "made-up") -> Machine:
    none = Accelerator("none", "none", 0, "")
    return Machine(cpu, 2, isa, l1 << 10, l2 << 10, 32 << 20, 1, 16 << 30, none)


ZEN4, ZEN5, DESKTOP = machine(32, 1024), machine(48, 1024), machine(32, 512, ("avx2", "scalar"))
SAPPHIRE = machine(48, 2048, KNOWN_ISAS)
XEON = "Intel(R) Xeon(R) Gold 6126 CPU @ 2.60GHz"
SKYLAKE, BROADWELL = machine(32, 1024, NO_AMX[1:], XEON), machine(32, 256, ("avx2", "scalar"), XEON)
HIDDEN_AMX = machine(48, 2048, NO_AMX, "Intel(R) Xeon(R) Platinum 8480+")

# The first is what was measured to be best on Zen 4 (docs/kernels-measured.md).
CHOICES = {
    ("avx512_bf16", "zen4"): Blocking(14, 2, (), 1024, 7, 8192),
    ("avx512_bf16", "sapphire"): Blocking(14, 2, (), 2048, 1, 4096),
    ("avx512_bf16", "desktop"): Blocking(14, 2, (), 512, 7, 8192),
    ("avx512f", "zen4"): Blocking(14, 2, (), 512, 3, 8192),
    ("avx512f", "sapphire"): Blocking(14, 2, (), 1024, 1, 4096),
    ("avx512f", "desktop"): Blocking(14, 2, (), 256, 3, 8192),
    ("amx_bf16", "zen4"): Blocking(48, 2, (), 512, 1, 4096),
    ("amx_bf16", "sapphire"): Blocking(48, 2, (), 1024, 1, 4096),
    ("avx2", "zen4"): Blocking(6, 2, (NarrowTile(3, 4),), 512, 3, 8192),
    ("avx2", "sapphire"): Blocking(6, 2, (NarrowTile(3, 4),), 1024, 1, 4096),
    ("avx2", "desktop"): Blocking(6, 2, (NarrowTile(3, 4),), 512, 1, 1024),
}


@pytest.mark.parametrize(("isa", "name"), CHOICES)
def test_known_machines(isa: str, name: str) -> None:
    there = {"zen4": ZEN4, "sapphire": SAPPHIRE, "desktop": DESKTOP}[name]
    assert selection.select(target_on(isa, there), MIXTRAL, there).blocking == CHOICES[isa, name]


machines = st.builds(machine, st.sampled_from([16, 32, 48, 64]), st.sampled_from([256, 512, 1024, 1280, 2048, 4096]))
forms = st.builds(ExpertForm, st.integers(1, 20000), st.integers(1, 20000))


@pytest.mark.slow
@given(st.sampled_from(KNOWN_ISAS), forms, machines)
def test_every_candidate_fits(isa: str, form: ExpertForm, there: Machine) -> None:
    target = TARGETS[isa]
    for candidate in selection.select(target, form, there).candidates:
        cut = candidate.blocking
        for tokens, vectors in (
            (cut.tile_tokens, cut.tile_vectors),
            *((t.tokens, t.vectors) for t in cut.narrow_tiles),
        ):
            if not target.tiles_from:  # whose tiles are given by the instruction set
                assert selection.registers(target, tokens, vectors) <= target.registers
            assert selection.ROW_LANES % (vectors * target.lanes) == 0
        assert selection.working_set(target, cut.k_block) <= target.l2_share * there.l2_bytes
        assert cut.fetch_bytes <= there.l1d_bytes // 2


@pytest.mark.slow
@given(st.sampled_from(KNOWN_ISAS), forms, machines)
def test_the_choice_is_the_cheapest_and_tells_why(isa: str, form: ExpertForm, there: Machine) -> None:
    found = selection.select(TARGETS[isa], form, there)
    assert [c.rank for c in found.candidates] == sorted(c.rank for c in found.candidates)
    assert found.reasons[0].startswith(f"tile {found.blocking.tile_tokens} x {found.blocking.tile_vectors}: ")
    assert all(c.small >= 1 - 1e-9 and c.large >= 1 - 1e-9 for c in found.candidates), "faster than the limit"


@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_more_cache_never_means_a_smaller_block(isa: str) -> None:
    blocks = [
        selection.select(TARGETS[isa], MIXTRAL, machine(32, l2)).blocking.k_block for l2 in (256, 512, 1024, 2048)
    ]
    assert blocks == sorted(blocks)


@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_more_tokens_never_cost_less(isa: str) -> None:
    target = TARGETS[isa]
    cut = selection.select(target, MIXTRAL, ZEN4).blocking
    costs = [selection.row_slots(target, cut, tokens) for tokens in range(1, 253)]
    # Two half tiles may take longer than one that is full; from tile to tile it grows.
    whole = costs[cut.tile_tokens - 1 :: cut.tile_tokens]
    assert whole == sorted(whole)


@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_tiles_hold_all_tokens_and_none_is_small(isa: str) -> None:
    cut = selection.select(TARGETS[isa], MIXTRAL, ZEN4).blocking
    for tokens in range(1, 253):
        sizes = selection._tile_sizes(TARGETS[isa], cut, tokens)
        assert sum(sizes) == tokens and max(sizes) <= cut.tile_tokens
        assert len(sizes) == 1 or min(sizes) >= cut.tile_tokens // 2
    assert isa != "avx2" or selection._tile_sizes(TARGETS[isa], cut, 8) == [5, 3]


def test_the_library_has_the_same_tiles() -> None:
    text = generate(64, 96, ("amx_bf16",), machine=SAPPHIRE).files["include/fiddler/task.hpp"]
    most = CHOICES["amx_bf16", "sapphire"].tile_tokens // selection.TILE_ROWS
    assert f"kTileRows = {selection.TILE_ROWS}, kTileInputs = {selection.TILE_INPUTS}, kPassTiles = {most}," in text


def test_finalists_differ_from_the_choice_in_one_parameter() -> None:
    (first, best), *others = candidates("avx512_bf16", MIXTRAL, ZEN4)
    assert first == "" and best.blocking == CHOICES["avx512_bf16", "zen4"]
    assert {change.split()[0] for change, _ in others} == {"k_block", "fetch_bytes", "fetch_tokens", "tile"}
    assert len({candidate.blocking for _, candidate in others} | {best.blocking}) == len(others) + 1


@pytest.mark.parametrize(
    ("there", "places", "level"),
    [(ZEN4, 1, 2), (ZEN5, 1, 1), (SAPPHIRE, 4, 1), (SKYLAKE, 4, 1), (DESKTOP, 4, 1), (None, 4, 1)],
)
def test_cores_read_and_fetch_as_was_measured(there: Machine | None, places: int, level: int) -> None:
    sources = generate(64, 96, ("avx2", "scalar"), machine=there)
    for variant in sources.spec.variants:
        text = sources.files[f"{variant.symbol}.cpp"]
        assert f"kPlaces = {places};" in text and f"kFetchLevel = {level};" in text
        assert any(f"reads {places} places" in reason for reason in variant.reasons) == (places > 1)


@pytest.mark.parametrize(
    ("there", "places", "level"),
    [(ZEN4, 1, 2), (ZEN5, 1, 1), (SAPPHIRE, 4, 1), (HIDDEN_AMX, 4, 1), (SKYLAKE, 4, 1), (DESKTOP, 1, 2), (None, 1, 2)],
)
def test_avx512_reads_four_places_on_intels_cpus(there: Machine | None, places: int, level: int) -> None:
    sources = generate(64, 96, ("avx512_bf16", "avx512f"), machine=there)
    for variant in sources.spec.variants:
        text = sources.files[f"{variant.symbol}.cpp"]
        assert f"kPlaces = {places};" in text and f"kFetchLevel = {level};" in text


@pytest.mark.parametrize(("there", "rows"), [(SAPPHIRE, 8), (SKYLAKE, 8), (BROADWELL, 8), (DESKTOP, 2)])
def test_intels_cpus_fetch_farther_ahead(there: Machine, rows: int) -> None:
    (reason,) = (r for r in generate(64, 96, ("avx2",), machine=there).spec.variants[0].reasons if "4 places" in r)
    assert f"it fetches {rows} rows ahead at each" in reason


def test_what_was_chosen_is_what_is_generated() -> None:
    cut = Blocking(13, 2, (), 256, 4, 4096)
    sources = generate(64, 96, ("avx512_bf16",), machine=ZEN4, blockings={"avx512_bf16": cut})
    (variant,) = sources.spec.variants
    assert variant.blocking == cut
    text = sources.files[f"{variant.symbol}.cpp"]
    for line in ("kTokens = 13;", "kDepthPairs = 128;", "kFetchTokens = 4;", "kFetchBytes = 4096;"):
        assert line in text
    assert "kFetchLevel = 2;" in text
    units = f"kUnitTokens = {selection.UNIT_TOKENS}, kTileUnitTokens = {selection.TILE_UNIT_TOKENS};"
    assert units in sources.files["shape.hpp"]


def test_caches_that_nobody_told_of_are_taken_as_typical() -> None:
    for there in (None, machine(0, 0)):
        assert selection.select(TARGETS["avx512_bf16"], MIXTRAL, there).blocking == CHOICES["avx512_bf16", "zen4"]


def test_caches_too_small_for_anything_are_refused() -> None:
    with pytest.raises(FiddlerError, match="no depth block of avx2 kernels fits"):
        selection.select(TARGETS["avx2"], MIXTRAL, machine(32, 16))
