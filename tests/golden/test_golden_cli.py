"""What the command line says: help, and one line and a hint for every mistake."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fiddler_runtime import strict
from fiddlerc import __main__ as fiddlerc_main
from fiddlerc import pipeline
from fiddlerc.cli import run_command_line

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "tiny-mixtral"
DEMO_TRACE = ROOT / "examples" / "tiny-mixtral-trace.safetensors"
CATALOG = ROOT / "fiddlerc" / "hardware" / "catalog"
COMMANDS = (
    *("compile", "export-onnx", "predict", "calibrate", "trace", "inspect", "verify", "run", "bench", "pack", "doctor"),
)
Golden = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line([*command.split(), "--help"]) == 0
    text = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    golden(f"help/{command or 'fiddlerc'}.txt", text)


def half_a_checkpoint(folder: Path) -> Path:
    """An index that names two shards, one of which was never downloaded."""
    model = folder / "half"
    shutil.copytree(DEMO, model)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def truncated(folder: Path) -> Path:
    model = folder / "truncated"
    shutil.copytree(DEMO, model)
    os.truncate(model / "model.safetensors", 1_000_000)
    return model


def with_config(folder: Path, name: str, **changes: object) -> Path:
    """The demo model's directory without weights, with another config.json."""
    model = folder / name
    model.mkdir()
    config = {**json.loads((DEMO / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps(config))
    return model


def whole_with_config(folder: Path, **changes: object) -> Path:
    """The demo model with another config.json."""
    model = with_config(folder, "changed", **changes)
    return Path(shutil.copytree(DEMO, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json")))


def compiled(folder: Path, model: Path = DEMO, **options: Any) -> Path:
    """A plan without its report, whose figures take most of the time."""
    request = pipeline.CompileRequest(str(model), "a100", output=folder / "plan", build=False, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.report, "render", lambda told: b"<!doctype html>")
        return pipeline.compile_plan(request).plan.path


@cache
def demo_plan() -> Path:
    """Compiled once."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return compiled(Path(folder.name))


def plan(folder: Path) -> Path:
    return Path(shutil.copytree(demo_plan(), folder / "plan"))


def newer_plan(folder: Path) -> Path:
    path = plan(folder)
    header = json.loads((path / "plan.json").read_text())
    header["format_major"] = 9
    (path / "plan.json").write_bytes(strict.dump(header))
    return path


def half_a_plan(folder: Path) -> Path:
    path = plan(folder)
    os.truncate(path / "plan.json", 20)
    return path


def hardware_with_unknown_key(folder: Path) -> Path:
    value = json.loads((CATALOG / "a100.json").read_text())
    value["limits"]["cpu_speed"] = 1
    path = folder / "hw.json"
    path.write_text(json.dumps(value))
    return path


def trace_of_another_model(folder: Path) -> Path:
    path = folder / "trace.safetensors"
    counts = {"model": "x", "text": "y", "tokens": 8, "counts": [[2] * 8] * 32}
    (folder / "counts.json").write_text(json.dumps(counts))
    pipeline.import_counts("mixtral", folder / "counts.json", path)
    return path


def onnx_file(folder: Path, moe: bool = True, data: bool = True) -> Path:
    """Two MoE nodes without a KV cache, or no MoE node at all; or without its external data."""
    import onnx_samples
    from onnx import helper

    model = onnx_samples.two_moe_layers()[0] if moe else None
    model = model or onnx_samples.moe_model([helper.make_node("Relu", ["x"], ["y"])], {})
    outside = {"save_as_external_data": True, "location": "weights.bin"}
    path = onnx_samples.save(model, folder / "model.onnx", **({} if data else outside))
    (folder / "weights.bin").unlink(missing_ok=True)
    return path


def onnx_plan(folder: Path) -> Path:
    return compiled(folder, onnx_file(folder), kv_bytes_per_token=0)


def cut_short(folder: Path, path: Path, size: int) -> Path:
    """The first bytes of a file."""
    copy = folder / path.name
    copy.write_bytes(path.read_bytes()[:size])
    return copy


def counts_of_text(folder: Path) -> Path:
    path = folder / "counts.json"
    path.write_text('{"model": "x", "text": "y", "tokens": -3, "counts": []}')
    return path


def compile_demo(*extra: object) -> list[object]:
    return ["compile", DEMO, "--hw", "a100", "--no-build", "-o", "out", *extra]


MISTAKES: dict[str, Callable[[Path], list[object]]] = {
    "no-such-model": lambda f: ["compile", "nonsense", "--hw", "a100"],
    "half-a-checkpoint": lambda f: ["compile", half_a_checkpoint(f), "--hw", "a100"],
    "truncated-shard": lambda f: ["compile", truncated(f), "--hw", "a100"],
    "unknown-architecture": lambda f: [
        "compile", with_config(f, "odd", architectures=["OddForCausalLM"], model_type="odd"), "--hw", "a100",
    ],
    "no-such-hardware": lambda f: ["compile", DEMO, "--hw", "z9000"],
    "hardware-unknown-key": lambda f: ["compile", DEMO, "--hw", hardware_with_unknown_key(f)],
    "trace-of-another-model": lambda f: compile_demo("--trace", trace_of_another_model(f)),
    "no-such-trace": lambda f: compile_demo("--trace", f / "none.safetensors"),
    "gpu-budget": lambda f: ["compile", "mixtral", "--hw", "a100", "--gpu-memory", "1GiB"],
    "gpu-memory-unit": lambda f: compile_demo("--gpu-memory", "24 gallons"),
    "context": lambda f: compile_demo("--context", "4096"),
    "unknown-isa": lambda f: compile_demo("--isa", "sse9"),
    "tune-without-building": lambda f: compile_demo("--tune"),
    "output-is-a-file": lambda f: ["compile", DEMO, "--hw", "a100", "--no-build", "-o", DEMO / "config.json"],
    "newer-plan": lambda f: ["verify", newer_plan(f)],
    "not-a-plan": lambda f: ["inspect", DEMO],
    "no-such-plan": lambda f: ["verify", f / "nowhere"],
    "another-model": lambda f: ["verify", plan(f), "--model", with_config(f, "wide", hidden_size=256)],
    "trace-without-text": lambda f: ["trace", DEMO, "-o", f / "t"],
    "trace-of-a-name": lambda f: ["trace", "mixtral", "--text", DEMO / "config.json", "-o", f / "t"],
    "text-that-is-missing": lambda f: ["trace", DEMO, "--text", f / "none.txt", "-o", f / "t"],
    "no-model-directory": lambda f: ["run", plan(f), "--model", f / "none", "--prompt", "a"],
    "no-such-model-directory-to-verify": lambda f: ["verify", plan(f), "--model", f / "none"],
    "no-such-counts": lambda f: ["trace", "mixtral", "--from-counts", f / "none.json", "-o", f / "t"],
    "dump-dir-is-a-file": lambda f: compile_demo("--dump-dir", DEMO / "config.json"),
    "dump-dir-in-the-plan": lambda f: compile_demo("--dump-dir", "out/stages"),
    "dump-dir-in-the-plan-unnamed": lambda f: [
        "compile", DEMO, "--hw", "a100", "--no-build", "--dump-dir", "tiny-mixtral-a100",
    ],
    "plots-in-the-plan": lambda f: compile_demo("--plots", "out"),
    "plots-below-a-file": lambda f: compile_demo("--plots", DEMO / "config.json" / "plots"),
    "config-that-transformers-refuses": lambda f: [
        "run", plan(f), "--model", whole_with_config(f, dtype="float99"), "--prompt", "a",
    ],
    "too-many-beams": lambda f: ["run", plan(f), "--model", DEMO, "--prompt", "a", "--beams", "100000"],
    "generating-beyond-the-context": lambda f: [
        "trace", DEMO, "--text", DEMO / "heldout-docs.txt", "--generate-tokens", "9999999", "-o", f / "t",
    ],
    "prompt-that-is-not-utf-8": lambda f: ["run", plan(f), "--model", DEMO, "--prompt", "a\udcff"],
    "seed-out-of-range": lambda f: ["run", plan(f), "--model", DEMO, "--prompt", "a", "--seed", "-1"],
    "onnx-without-moe": lambda f: ["compile", onnx_file(f, moe=False), "--hw", "a100"],
    "onnx-without-data": lambda f: ["compile", onnx_file(f, data=False), "--hw", "a100"],
    "onnx-without-cache": lambda f: ["compile", onnx_file(f), "--hw", "a100"],
    "onnx-plan-without-experts": lambda f: [
        "run", onnx_plan(f), "--model", DEMO, "--prompt", "a",
    ],
    "no-such-onnx": lambda f: ["compile", f / "none.onnx", "--hw", "a100"],
    "kv-bytes-of-a-directory": lambda f: compile_demo("--kv-bytes", "1KiB"),
    "export-of-a-name": lambda f: ["export-onnx", "mixtral", "-o", f / "m.onnx"],
    "export-to-another-suffix": lambda f: ["export-onnx", DEMO, "-o", f / "m.bin"],
    "unknown-scenario": lambda f: ["bench", plan(f), "--model", DEMO, "--scenarios", "coffee"],
    "hardware-cut-short": lambda f: ["compile", DEMO, "--hw", cut_short(f, CATALOG / "a100.json", 20)],
    "trace-cut-short": lambda f: compile_demo("--trace", cut_short(f, DEMO_TRACE, 100)),
    "plan-cut-short": lambda f: ["inspect", half_a_plan(f)],
    "counts-without-layers": lambda f: ["trace", "mixtral", "--from-counts", counts_of_text(f), "-o", f / "t"],
    "text-in-another-encoding": lambda f: ["trace", DEMO, "--text", DEMO_TRACE, "-o", f / "t"],
    "gpu-memory-negative": lambda f: compile_demo("--gpu-memory", "-1GiB"),
    "gpu-memory-absurd": lambda f: compile_demo("--gpu-memory", "99999999999TiB"),
    "calibration-to-a-folder": lambda f: ["calibrate", "-o", f],
    "trace-below-a-file": lambda f: ["trace", DEMO, "--text", DEMO / "config.json", "-o", DEMO / "config.json" / "t"],
    "predict-without-hardware": lambda f: ["predict", "mixtral"],
    "predict-plan-with-hardware": lambda f: ["predict", plan(f), "--hw", "a100"],
    "predict-too-many-beams": lambda f: ["predict", plan(f), "--workload", "beam:99999999"],
    "predict-two-of-a-kind": lambda f: ["predict", plan(f), "--workload", "beam:2", "--workload", "beam:4"],
    "predict-beyond-the-context": lambda f: ["predict", plan(f), "--workload", "decode:1000/1000"],
    "predict-no-tokens": lambda f: ["predict", plan(f), "--workload", "prefill:-1"],
    "predict-no-workload": lambda f: ["predict", plan(f), "--workload", "chat:8"],
    "sweep-of-nothing-known": lambda f: ["predict", plan(f), "--sweep", "cores=1..64"],
    "sweep-below-nothing": lambda f: ["predict", plan(f), "--sweep", "gpu-memory=-8GiB..80GiB"],
    "sweep-backwards": lambda f: ["predict", plan(f), "--sweep", "gpu-memory=80GiB..8GiB"],
    "sweep-without-end": lambda f: ["predict", plan(f), "--sweep", f"gpu-memory=8GiB..{'9' * 400}GiB"],
    "unknown-command": lambda f: ["compil"],
    "missing-option": lambda f: ["compile", "mixtral"],
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    mistake: str, tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)
    arguments = [str(part) for part in MISTAKES[mistake](tmp_path)]
    capsys.readouterr()
    status = run_command_line(arguments)
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for kind in ("error:", "hint:"):
        assert len([line for line in captured.err.splitlines() if line.startswith(kind)]) == 1
    assert list(work.iterdir()) == [], "something half-written stayed behind"
    # Warnings compare a plan with the machine that the test runs on.
    text = "".join(f"{line}\n" for line in captured.err.splitlines() if not line.startswith("warning:"))
    text = text.replace(str(tmp_path), "TMP").replace(str(ROOT), "ROOT")
    golden(f"errors/{mistake}.txt", re.sub(r"[0-9a-f]{16,}", "HASH", text))


def test_a_plan_for_an_instruction_set_that_this_cpu_lacks(
    tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fiddler_runtime.machine import Accelerator, Machine

    old = Machine("Old CPU", 4, ("avx2", "scalar"), 1, 1, 1, 1, 1 << 34, Accelerator("none", "none", 0, ""))
    monkeypatch.setattr(pipeline, "this_machine", lambda *_: old)
    path = compiled(tmp_path, isas=("avx512_bf16",))
    assert run_command_line(["verify", str(path)]) == 1
    golden("errors/isa-this-cpu-lacks.txt", capsys.readouterr().err.replace(str(tmp_path), "TMP"))


@pytest.mark.parametrize("option", [[], ["--packed-cache", "cache"]], ids=["memory", "memory-with-packed-cache"])
def test_a_model_that_does_not_fit(
    option: list[str],
    tmp_path: Path,
    golden: Golden,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fiddler_runtime import preflight

    monkeypatch.setattr(preflight, "available_bytes", lambda: 5 << 20 if option else 10 << 20)
    monkeypatch.setattr(preflight.PackedCache, "free_bytes", lambda self: 1 << 30)
    monkeypatch.chdir(tmp_path)
    path = plan(tmp_path)
    capsys.readouterr()
    assert run_command_line(["run", str(path), "--model", str(DEMO), "--prompt", "a", "--device", "none", *option]) == 1
    text = "".join(f"{line}\n" for line in capsys.readouterr().err.splitlines() if not line.startswith("warning"))
    golden(f"errors/{'memory-with-packed-cache' if option else 'memory'}.txt", text)
    assert not (tmp_path / "cache").exists()


def test_a_gpu_that_is_not_there(
    tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = str(plan(tmp_path))
    capsys.readouterr()
    assert run_command_line(["run", path, "--model", str(DEMO), "--prompt", "a", "--device", "cuda"]) == 1
    err = capsys.readouterr().err
    golden("errors/no-gpu.txt", "".join(f"{line}\n" for line in err.splitlines() if not line.startswith("warning")))


def test_a_closed_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    path = str(plan(tmp_path))
    assert run_command_line(["run", path, "--model", str(DEMO), "--prompt", "-", "--device", "none"]) == 1
    assert "closed standard input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "said"), [(KeyboardInterrupt, 130, "interrupted"), (MemoryError, 1, "memory")]
)
def test_what_happens_while_packages_are_imported(
    raised: type[BaseException],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "fiddlerc.cli":
                raise raised

    monkeypatch.delitem(sys.modules, "fiddlerc.cli")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as stopped:
        fiddlerc_main.main()
    assert stopped.value.code == status and said in capsys.readouterr().err


def test_a_full_standard_output(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fiddlerc", "inspect", str(plan(tmp_path)), "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left on device: standard output" in done.stderr and "Traceback" not in done.stderr


def test_names_that_the_locale_cannot_write(tmp_path: Path) -> None:
    path = shutil.copytree(demo_plan(), tmp_path / "pl\xe4n")
    command = [sys.executable, "-m", "fiddlerc", "inspect", str(path)]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "tiny-mixtral" in done.stdout


def test_no_compiler(
    tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path / "cache"))
    assert run_command_line(["compile", str(DEMO), "--hw", "a100", "-o", str(tmp_path / "plan")]) == 1
    golden("errors/no-compiler.txt", capsys.readouterr().err)
    assert not (tmp_path / "plan").exists()


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.codegen, "generate", interrupted)
    assert run_command_line(["compile", str(DEMO), "--hw", "a100", "-o", str(tmp_path / "plan")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_request_to_stop_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM, while a trace has files in a temporary folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "fiddlerc", "trace", str(DEMO), "--text", str(DEMO / "heldout-docs.txt")]
    running = subprocess.Popen(
        [*command, "-o", str(tmp_path / "trace.safetensors")], env={**os.environ, "TMPDIR": str(scratch)}
    )
    until = time.monotonic() + 60
    while not list(scratch.glob("fiddlerc-*")):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    running.terminate()
    assert running.wait(60) == 143
    assert not list(scratch.glob("fiddlerc-*")) and list(tmp_path.iterdir()) == [scratch]
