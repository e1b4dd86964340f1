"""load_plan: what it warns about, and which library it lets an engine load."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import runtime_samples
import torch

from fiddler_runtime import Engine, ExpertWeights, FiddlerError, FiddlerWarning, build, load_plan
from fiddler_runtime.plan import Plan, read_plan, write_plan

SPEC = runtime_samples.small_spec()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return runtime_samples.write_sample_plan(tmp_path / "plan", SPEC)


def test_a_plan_for_this_machine_is_loaded_without_a_word(plan: Plan):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_plan(plan.path)
    assert loaded.header == read_plan(plan.path).header
    assert loaded.binary is None


def test_a_gpu_plan_without_a_gpu_warns_that_it_runs_without(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA GPU")
    plan = runtime_samples.write_sample_plan(tmp_path / "plan", SPEC, accelerator="cuda")
    with pytest.warns(FiddlerWarning, match="compiled for .*made up.*, here is"):
        load_plan(str(plan.path))


def test_a_path_will_do_for_the_engine(plan: Plan):
    with Engine(str(plan.path), ExpertWeights.random(), strategies=("cpu",)) as engine:
        assert engine.describe()["plan"] == "plan"
        cache = build.cache_dir().resolve()
        assert Path(engine.describe()["library"]).resolve().is_relative_to(cache), "built from the plan's sources"


def test_no_such_plan_is_told(tmp_path: Path):
    with pytest.raises(FiddlerError, match="no such plan"):
        load_plan(tmp_path / "nowhere")


def test_trusting_binaries_that_are_not_there_is_told(plan: Plan):
    with pytest.raises(FiddlerError, match="has no binaries to trust"):
        load_plan(plan.path, trust_binaries=True)


def test_a_plans_binary_is_loaded_only_when_trusted(plan: Plan, tmp_path: Path):
    library = build.build_kernels(plan.path / "kernels")
    files = {
        f"kernels/{path.relative_to(plan.path / 'kernels').as_posix()}": path.read_bytes()
        for path in sorted((plan.path / "kernels").rglob("*"))
        if path.is_file()
    }
    files[f"kernels/{library.name}"] = library.read_bytes()
    shipped = write_plan(tmp_path / "shipped", plan.header, plan.tables, files)
    with Engine(load_plan(shipped.path), ExpertWeights.random(), strategies=("cpu",)) as engine:
        assert not Path(engine.describe()["library"]).is_relative_to(shipped.path)
    with Engine(load_plan(shipped.path, trust_binaries=True), ExpertWeights.random(), strategies=("cpu",)) as engine:
        assert Path(engine.describe()["library"]).is_relative_to(shipped.path)
        engine.moe(1, torch.zeros(2, 64), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
