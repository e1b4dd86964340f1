"""Progress where nobody sees a bar: a line now and then."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fiddlerc import cli


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = 100.0, io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(cli, "err", Console(file=log))
    with cli._progress() as progress:
        for step in range(25):
            progress("calibrating: [half]", step, 25)
            progress("loading experts (bytes)", step << 20, 25 << 20)
            now += 1.0
    assert log.getvalue().splitlines() == ["calibrating: [half]: 10 of 25", "calibrating: [half]: 20 of 25"]


def test_bytes_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(cli, "LINES_APART_S", 0.0)
    monkeypatch.setattr(cli, "err", Console(file=log))
    with cli._progress() as progress:
        progress("loading experts (bytes)", 3 << 20, 25 << 20)
    assert log.getvalue() == "loading experts: 3.0 MiB of 25.0 MiB\n"
