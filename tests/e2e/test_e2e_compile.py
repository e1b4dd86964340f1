"""`fiddlerc compile` as its users meet it, on the demo model and on built-in names."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from pathlib import Path

import pytest

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import read_plan
from fiddlerc import hardware, pipeline
from fiddlerc.cli import run_command_line

CATALOG = Path(__file__).parents[2] / "fiddlerc" / "hardware" / "catalog"
DEMO = Path(__file__).parents[2] / "examples" / "tiny-mixtral"


def compile_demo(output: Path, **changes: object) -> pipeline.Compiled:
    request = pipeline.CompileRequest(
        **{"model": str(DEMO), "hardware": "a100.json", "output": output, "build": False, **changes}  # type: ignore[arg-type]
    )
    return pipeline.compile_plan(request)


def same_tree(a: Path, b: Path) -> bool:
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    if names != sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()):
        return False
    match, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return sorted(match) == names


def test_two_compiles_are_byte_identical_and_a_moved_plan_is_the_same_plan(tmp_path: Path) -> None:
    first = compile_demo(tmp_path / "a").plan
    compile_demo(tmp_path / "b")
    assert same_tree(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "elsewhere" / "c"
    shutil.copytree(tmp_path / "a", moved)
    assert read_plan(moved).header == first.header
    assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in moved.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["mixtral", "mixtral-8x22b", "phi-3.5-moe", "olmoe", "qwen3-30b-a3b"])
def test_built_in_names_compile_without_weights(name: str, tmp_path: Path) -> None:
    plan = compile_demo(tmp_path / "plan", model=name).plan
    assert plan.header.placement.total_experts == plan.header.model.num_experts * len(plan.header.model.moe_layers)
    assert any("uniform assumption" in line for line in plan.header.assumptions)
    assert any("data sheet" in line for line in plan.header.assumptions)


def test_the_first_pages_line_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command_line(["compile", "mixtral", "--hw", "a100.json", "--no-build"]) == 0
    captured = capsys.readouterr()
    assert "mixtral-8x7b-a100" in captured.out
    assert "data sheet" in captured.out + captured.err
    assert read_plan(tmp_path / "mixtral-8x7b-a100").header.hardware.provenance == "data sheet"


def test_kernels_are_cut_for_the_caches_in_the_hardware_file(tmp_path: Path) -> None:
    """Whatever machine compiles."""
    hardware = json.loads((CATALOG / "a100.json").read_text())
    found = {}
    for l2_bytes in (256 << 10, 512 << 10, 2 << 20):
        hardware["machine"]["l2_bytes"] = l2_bytes
        (tmp_path / "hw.json").write_text(json.dumps(hardware))
        plan = compile_demo(tmp_path / f"{l2_bytes}", model="mixtral", hardware=str(tmp_path / "hw.json")).plan
        found[l2_bytes] = {v.isa: v.blocking.k_block for v in plan.header.kernels.variants if v.isa != "amx_bf16"}
        (source,) = (tmp_path / f"{l2_bytes}" / "kernels").glob("*avx512bf16.cpp")
        assert f"kDepthPairs = {found[l2_bytes]['avx512_bf16'] // 2};" in source.read_text()
    small, middle, large = found.values()
    bounded = large.pop("avx2")  # by the first-level cache
    assert small["avx2"] < middle["avx2"] <= bounded, found
    assert all(small[isa] < middle[isa] < large[isa] for isa in large), found


def test_dump_dir_holds_every_stage_in_order(tmp_path: Path) -> None:
    compile_demo(tmp_path / "plan", dump_dir=tmp_path / "dump")
    stages = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert stages == [
        "01-model.json",
        "02-hardware.json",
        "03-popularity.json",
        "04-latency.json",
        "05-steps.json",
        "06-memory.json",
        "07-placement.json",
        "08-tables.json",
        "09-features.json",
        "10-kernels",
        "11-prediction.json",
    ]
    assert json.loads((tmp_path / "dump" / "01-model.json").read_text())["num_experts"] == 8


def test_budget_below_the_non_expert_part(tmp_path: Path) -> None:
    with pytest.raises(FiddlerError, match="GPU") as raised:
        compile_demo(tmp_path / "plan", model="mixtral", gpu_memory_bytes=1 << 30)
    assert raised.value.hint is not None
    assert "--gpu-memory" in raised.value.hint
    assert not (tmp_path / "plan").exists()


def test_more_memory_than_the_card_has_is_told(tmp_path: Path) -> None:
    told = compile_demo(tmp_path / "plan", hardware="rtx4090", gpu_memory_bytes=80 << 30).plan.header.assumptions
    assert any(line.startswith("--gpu-memory is 80.0 GiB, more than the 24.0 GiB of") for line in told), told


def test_json_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(DEMO), "--hw", "a100", "--no-build", "-o", str(tmp_path / "plan"), "--json"]
    assert run_command_line(arguments) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == str(tmp_path / "plan")


@pytest.mark.parametrize("tool", ["inspect", "verify"])
def test_tools_on_a_plan(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_demo(tmp_path / "plan")
    assert run_command_line([tool, str(tmp_path / "plan"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"]
    assert run_command_line([tool, str(tmp_path / "plan")]) == 0


def test_the_root_is_no_place_for_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["compile", str(DEMO), "--hw", "a100", "--no-build", "-o", "/"]) == 1
    assert "cannot write the plan to /" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "trace"])
def test_a_pipe_is_no_place_for_a_file(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    arguments = [command, *(["--quick"] if command == "calibrate" else [str(DEMO), "--text", str(DEMO / "absent.txt")])]
    assert run_command_line([*arguments, "-o", str(tmp_path / "pipe")]) == 1
    assert "found a device or pipe" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../elsewhere"], "wrong value for --name: found '../elsewhere', expected a name, without /"),
        (["--accelerator", "cuda"], "CUDA"),
    ],
)
def test_calibrate_refuses_before_it_builds(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(pipeline, "_build", None)
    assert run_command_line(["calibrate", "--quick", *arguments, "-o", str(tmp_path / "hw.json")]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_has_no_steps(tmp_path: Path) -> None:
    shutil.copy(DEMO / "config.json", tmp_path)
    assert pipeline._measure_rest(str(tmp_path), hardware.load_hardware("epyc-zen5-2c"), None) == ()
