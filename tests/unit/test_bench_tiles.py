"""The bench of register tiles: it builds and runs, and counts the operations that were done."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import tiles

from fiddler_runtime.machine import missing_flags


@pytest.mark.slow
@pytest.mark.parametrize("isa", tiles.ISAS)
def test_every_tile_runs_and_its_operations_are_counted(isa: str, tmp_path: Path) -> None:
    if missing := missing_flags(isa):
        pytest.skip(f"{isa} needs CPU flags that are missing here: {' '.join(missing)}")
    library, most = tiles.build(isa, tmp_path)
    for tokens in range(1, most + 1):
        assert library.tiles(tokens, 3) == 3 * tokens * 32 * tiles.SIZE * 2


def test_shares_are_printed_by_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tiles, "shares", lambda isa, rounds: [[0.5] * rounds, [0.8, 0.9]])
    tiles.main(["--isa", "scalar", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["scalar        1 tokens   50% (50%)", "scalar        2 tokens   85% (90%)"]
