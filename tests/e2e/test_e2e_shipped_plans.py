"""The plans in plans/ are what `make plans` writes, byte for byte: goldens of plan.json, tables, sources and report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fiddler_runtime.plan import read_plan
from fiddlerc import pipeline
from fiddlerc.cli import run_command_line

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "tiny-mixtral"
REQUESTS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b-a100": {"model": "mixtral", "hardware": "a100"},
    "tiny-mixtral-epyc-zen5-2c": {
        "model": str(DEMO),
        "hardware": "epyc-zen5-2c",
        "trace": ROOT / "examples" / "tiny-mixtral-trace.safetensors",
        "gpu_memory_bytes": 43 << 20,
        "context": 1024,
    },
}


def test_every_shipped_plan_is_covered() -> None:
    assert sorted(p.name for p in (ROOT / "plans").iterdir() if p.is_dir()) == sorted(REQUESTS)


@pytest.mark.parametrize("name", REQUESTS)
def test_it_is_what_the_compiler_writes(name: str, tmp_path: Path) -> None:
    request = pipeline.CompileRequest(**REQUESTS[name], output=tmp_path / name, build=False)
    pipeline.compile_plan(request)
    for entry in ("plan.json", *(e.path for e in read_plan(ROOT / "plans" / name).header.files)):
        shipped, now = ROOT / "plans" / name / entry, tmp_path / name / entry
        assert shipped.read_bytes() == now.read_bytes(), f"{name}/{entry} differs: `make plans` writes it again"


@pytest.mark.slow
def test_the_demo_plan_runs_from_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(ROOT / "plans" / "tiny-mixtral-epyc-zen5-2c", moved)
    prompt = (ROOT / "examples" / "prompt.txt").read_text()
    arguments = ["run", str(moved), "--model", str(DEMO), "--prompt", prompt, "--max-new-tokens", "16"]
    assert run_command_line(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    for strategy in ("resident", "streamed", "cpu"):
        assert strategy in captured.err, "the shipped tables use all three strategies on this prompt"
