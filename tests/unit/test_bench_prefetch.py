"""The bench of prefetch instructions: it runs, and says so where it cannot."""

from __future__ import annotations

import pytest
from bench import prefetch

from fiddler_runtime.machine import missing_flags


@pytest.mark.slow
def test_each_pace_has_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if missing := missing_flags("avx2"):
        pytest.skip(f"CPU flags are missing here: {' '.join(missing)}")
    monkeypatch.setattr(prefetch, "BYTES", 1 << 20)
    assert prefetch.main(["--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [int(line.split()[3]) for line in lines] == [8 * eights for eights in prefetch.EIGHTS]


def test_a_cpu_without_avx2_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prefetch, "missing_flags", lambda isa: ("fma",))
    assert prefetch.main([]) == 1
    assert "found a CPU without fma" in capsys.readouterr().err
