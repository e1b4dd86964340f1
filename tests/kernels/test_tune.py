"""`fiddlerc compile --tune` with real builds of a tiny shape. Figures are checked for sense, never for speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fiddler_runtime.machine import refused, this_machine
from fiddler_runtime.plan import read_plan
from fiddlerc import codegen, pipeline
from fiddlerc.cli import run_command_line
from fiddlerc.hardware import load_hardware, tuning, write_hardware
from fiddlerc.ir import Blocking, Tuning

DEMO = Path(__file__).parents[2] / "examples" / "tiny-mixtral"


@pytest.fixture
def hw(tmp_path: Path) -> Path:
    """The catalogue's samples under this machine's name."""
    known = load_hardware("epyc-zen5-2c")
    here = dataclasses.replace(known.machine, **_of_this_cpu())
    write_hardware(dataclasses.replace(known, name="here", machine=here), tmp_path / "hw.json")
    return tmp_path / "hw.json"


def _of_this_cpu() -> dict[str, object]:
    machine = this_machine("none")
    return {name: getattr(machine, name) for name in ("cpu", "cores", "isa", "l1d_bytes", "l2_bytes", "l3_bytes")}


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "EFFORT", tuning.Effort((1, 16), 2, 1e-3, 1))
    found = codegen.candidates
    monkeypatch.setattr(pipeline.codegen, "candidates", lambda *arguments: found(*arguments)[:2])


def compile_tuned(hw: Path, output: Path, *extra: str) -> int:
    return run_command_line(["compile", str(DEMO), "--hw", str(hw), "--tune", "-o", str(output), *extra])


@pytest.mark.slow
def test_what_was_measured_is_in_the_plan(hw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_tuned(hw, tmp_path / "plan", "--isa", "scalar", "--json") == 0
    told = json.loads(capsys.readouterr().out)["tuning"]
    spec = read_plan(tmp_path / "plan").header.kernels
    assert spec.tuning is not None
    assert (spec.tuning.isa, spec.tuning.tokens, spec.tuning.rounds) == ("scalar", (1, 16), 2) == (
        told["isa"], tuple(told["tokens"]), told["rounds"],
    )  # fmt: skip
    first, second = spec.tuning.candidates
    assert (first.change, first.median) == ("", 1.0) and second.change
    assert [c.blocking for c in spec.tuning.candidates if c.chosen] == [spec.variants[0].blocking]
    assert run_command_line(["inspect", str(tmp_path / "plan"), "--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "tuned scalar: " in shown and second.change in shown and "chosen" in shown
    assert run_command_line(["inspect", str(tmp_path / "plan")]) == 0
    assert "tuned       scalar: " in capsys.readouterr().out
    assert "measured here" in (tmp_path / "plan" / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(hw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> list[float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "repeat", interrupted)
    assert compile_tuned(hw, tmp_path / "plan", "--isa", "scalar") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["hw.json"]


def test_another_machine_is_refused(
    hw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "this_machine", lambda kind: dataclasses.replace(this_machine(kind), cpu="Another CPU"))
    assert compile_tuned(hw, tmp_path / "plan") == 1
    told = capsys.readouterr().err
    assert "this is another: found Another CPU, expected " in told and "hint: leave out --tune" in told
    assert not (tmp_path / "plan").exists()


def test_without_a_compiler_nothing_is_begun(
    hw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compile_tuned(hw, tmp_path / "plan") == 1
    assert "there is no C++ compiler" in capsys.readouterr().err


def test_an_instruction_set_that_does_not_run_here(
    hw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = dataclasses.replace(this_machine("none"), isa=("scalar",))
    monkeypatch.setattr(pipeline, "this_machine", lambda kind: old)
    assert compile_tuned(hw, tmp_path / "plan", "--isa", "avx2") == 1
    assert "--tune measures kernels that run here: found --isa avx2, expected one of scalar" in capsys.readouterr().err


def test_tiles_are_told_why_they_are_not_measured(hw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (why := refused("amx_bf16")):
        pytest.skip("this machine has AMX")
    assert compile_tuned(hw, tmp_path / "plan", "--isa", "amx_bf16") == 1
    assert f"found --isa amx_bf16 ({why}), expected one of " in capsys.readouterr().err


def judged(times: list[list[float]]) -> Tuning:
    """The choice for [rounds][builds] times of one token count."""
    builds = [("" if not row else f"k_block {row}", Blocking(1, 1, (), row + 1, 1, 1)) for row in range(len(times[0]))]
    return tuning.judge(builds, np.array(times)[:, :, None], Tuning("scalar", 1, (1,), len(times), ()))


def test_another_candidate_has_to_be_faster_in_most_rounds() -> None:
    assert [c.chosen for c in judged([[10, 9, 8], [10, 9, 12], [10, 9, 12], [10, 9, 8]]).candidates] == [0, 1, 0]
    assert [c.chosen for c in judged([[10, 9], [10, 11], [10, 9], [10, 11]]).candidates] == [1, 0]
    assert [c.median for c in judged([[10, 8], [20, 16], [10, 8]]).candidates] == [1.0, 1.25]
