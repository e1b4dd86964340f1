"""docs/reproduction.md shows what the command prints."""

from __future__ import annotations

from pathlib import Path

from tests.bench import reproduction

DOCUMENT = Path(__file__).parents[2] / "docs" / "reproduction.md"


def test_the_page_has_the_commands_tables() -> None:
    shown = DOCUMENT.read_text().split(reproduction.BEGIN)[1].split(reproduction.END)[0]
    assert shown == reproduction.tables(), "python -m tests.bench.reproduction --write docs/reproduction.md"
