"""The bench of register tiles: what it times is the whole product."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from bench import tiles
from bench.kernels.shapes import load_shape

from fiddler_runtime.machine import missing_flags


@pytest.mark.slow
@pytest.mark.parametrize("isa", tiles.ISAS)
def test_every_tile_is_computed_and_its_operations_counted(isa: str, tmp_path: Path) -> None:
    if missing := missing_flags(isa):
        pytest.skip(f"{isa} needs CPU flags that are missing here: {' '.join(missing)}")
    library, most = tiles.build(isa, tmp_path)
    for tokens in range(1, most + 1):
        assert library.tiles(tokens, 3) == 3 * tokens * 32 * tiles.SIZE * 2
        sums = library.results()[: tokens * 32]
        assert sums == [tiles.SIZE] * len(sums)
        ctypes.memset(library.results(), 0, 4 * len(sums))  # the next one has to write them all


def test_deciles_are_printed_by_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tiles, "measure", lambda isa, rounds: ([100.0] * 5, [[0.5] * rounds, [0.8, 0.9]]))
    tiles.main(["--isa", "scalar", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "scalar       peak 100.0 GFLOP/s (100.0-100.0)",
        "scalar        1 tokens       50% (50%-50%)",
        "scalar        2 tokens       85% (80%-90%)",
    ]


@pytest.mark.slow
def test_experts_take_turns_with_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WEIGHTS_BYTES", 1 << 20)
    found = tiles.measure_expert("scalar", load_shape("128x256"), 2)
    assert list(found) == ["tile of 2", "expert,   2", "expert,   8", "expert,  32", "expert, 252"]
    for shares in found.values():
        assert len(shares) == 2
        assert all(0 < share < 2 for share in shares)


def test_an_expert_is_printed_beside_the_tile_of_its_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiles, "measure_expert", lambda *_: {"tile of 2": [0.5, 1.0], "expert,   2": [0.4, 0.9]})
    tiles.main(["--isa", "scalar", "--rounds", "2", "--expert", "128x256"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "scalar       tile of 2       75% (50%-100%)",
        "scalar       expert,   2     65% (40%-90%)",
        "scalar         of the tile   85% (80%-90%)",
    ]
