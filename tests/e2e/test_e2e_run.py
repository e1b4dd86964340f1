"""The demo model, compiled and run through the command line: every scenario, every strategy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fiddlerc.cli import run_command_line
from fiddlerc.hardware import calibrate

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "tiny-mixtral"
PROMPT = (ROOT / "examples" / "prompt.txt").read_text()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Traced, calibrated for this machine, and compiled: what `make demo` does, quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "QUICK", dataclasses.replace(calibrate.QUICK, seconds=0.3))
        yield make_plan(tmp_path_factory.mktemp("demo"))


def make_plan(folder: Path) -> Path:
    trace = ["trace", str(DEMO), "--text", str(DEMO / "heldout-chat.txt"), "--max-tokens", "1024"]
    assert run_command_line([*trace, "-o", str(folder / "trace.safetensors")]) == 0
    measure = ["calibrate", "--quick", "--model", str(DEMO), "--accelerator", "simulated"]
    assert run_command_line([*measure, "-o", str(folder / "hw.json")]) == 0
    compile_ = ["compile", str(DEMO), "--hw", str(folder / "hw.json"), "--trace", str(folder / "trace.safetensors")]
    assert run_command_line([*compile_, "--gpu-memory", "44MiB", "-o", str(folder / "plan")]) == 0
    return folder / "plan"


def generate(plan: Path, capsys: pytest.CaptureFixture[str], *extra: str, prompt: str = PROMPT) -> dict[str, object]:
    capsys.readouterr()
    arguments = ["run", str(plan), "--model", str(DEMO), "--prompt", prompt, "--max-new-tokens", "8", "--json"]
    assert run_command_line([*arguments, *extra]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_the_kernel_variant_that_ran_is_the_best_one(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fiddler_runtime.machine import cpu_isas

    result = generate(plan, capsys)
    assert result["engine"]["isa"] == cpu_isas()[0]  # type: ignore[index]
    assert result["timing"]["new_tokens"] == 8  # type: ignore[index]


def test_captured_steps(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captured = generate(plan, capsys, "--strategies", "resident,cpu", "--device", "simulated", "--capture")
    assert captured["text"]
    assert captured["captured"] == {"captured": 1, "replayed": 5, "plain": 1}


def test_without_an_accelerator_steps_are_not_captured_and_it_is_said(plan: Path, capsys) -> None:
    arguments = ["run", str(plan), "--model", str(DEMO), "--prompt", "The", "--max-new-tokens", "4", "--device", "none"]
    assert run_command_line([*arguments, "--capture"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: decode steps are not captured: nothing to capture steps on: found device none" in told


@pytest.mark.parametrize("strategy", ["resident", "streamed", "cpu"])
def test_one_strategy_alone(strategy: str, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = generate(plan, capsys, "--strategies", strategy, "--device", "simulated")["counters"]["expert_calls"]  # type: ignore[index]
    assert {name for name, count in calls.items() if count} == {strategy}


@pytest.mark.parametrize("options", [("--beams", "4"), ("--temperature", "0.8"), ("--device", "none")])
def test_scenarios(options: tuple[str, ...], plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(plan, capsys, *options)["text"]


def test_streaming_prints_the_same_text(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = generate(plan, capsys)["text"]
    arguments = ["run", str(plan), "--model", str(DEMO), "--prompt", PROMPT, "--max-new-tokens", "8", "--stream"]
    assert run_command_line(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == str(whole).rstrip("\n")
    assert "tokens/s" in captured.err
    assert "expert calls" in captured.err


def test_explaining_tells_what_was_predicted_and_measured(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    arguments = ["run", str(plan), "--model", str(DEMO), "--prompt", PROMPT, "--max-new-tokens", "8", "--explain"]
    assert run_command_line(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith(("prefill:", "decode:"))] == ["prefill", "decode"]
    whole = [line.split() for line in lines if line.startswith("    all        slower lane")]
    assert len(whole) == 2 and all(float(number) > 0 for line in whole for number in line[-3:])


def test_packing_ahead_and_running_from_the_cache(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = ["pack", str(plan), "--model", str(DEMO), "--packed-cache", str(tmp_path), "--json"]
    assert run_command_line([*pack, "--verify"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["written_bytes"] == first["total_bytes"] > 0
    assert first["verify_s"] > 0
    assert Path(first["path"]).parent == tmp_path
    text = generate(plan, capsys)["text"]
    assert generate(plan, capsys, "--packed-cache", str(tmp_path))["text"] == text
    assert run_command_line(pack) == 0
    assert json.loads(capsys.readouterr().out)["written_bytes"] == 0


def test_a_packed_cache_beside_the_model(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    arguments = ["--model", str(model), "--prompt", PROMPT, "--max-new-tokens", "4", "--json", "--packed-cache"]
    assert run_command_line(["run", str(plan), *arguments]) == 0
    assert len(list((model / "fiddler-packed").rglob("layer-*.safetensors"))) == 6
    assert run_command_line(["verify", str(plan), "--model", str(model)]) == 0
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(5_000_000)
    capsys.readouterr()
    assert run_command_line(["verify", str(plan), "--model", str(model)]) == 1
    assert "is truncated" in capsys.readouterr().err


def test_a_trace_through_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["trace", str(DEMO), "--text", str(DEMO / "heldout-chat.txt"), "--max-tokens", "512"]
    arguments += ["-o", str(tmp_path / "t.safetensors"), "--packed-cache", str(tmp_path), "--json"]
    assert run_command_line(arguments) == 0
    assert json.loads(capsys.readouterr().out)["decode_choices"] == 384 * 6 * 2


def test_bench_compares_all_scenarios(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(plan), "--model", str(DEMO), "--rounds", "1", "--new-tokens", "4", "--json"]
    assert run_command_line([*arguments, "--prefill-tokens", "64"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in result["scenarios"]] == ["decode", "prefill", "beam"]
    assert all(s["ours_tokens_per_s"] > 0 and s["transformers_tokens_per_s"] > 0 for s in result["scenarios"])


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "5000"], "do not fit"),
        (["--prompt", "a", "--beams", "2", "--stream"], "cannot be streamed"),
        (["--prompt", "a", "--isa", "sse9"], "sse9"),
        (["--prompt", "a", "--strategies", "magic"], "magic"),
        (["--prompt", "a", "--temperature", "inf"], "wrong value for --temperature: found inf"),
    ],
)
def test_mistakes(arguments: list[str], found: str, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command_line(["run", str(plan), "--model", str(DEMO), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert found in captured.err
    assert "Traceback" not in captured.err
