"""The lanes on a real GPU. Skipped without one; nothing here has been run by this project so far."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from runtime_samples import TINY_MIXTRAL, small_spec, write_sample_plan

import fiddler_runtime
from fiddler_runtime import FiddlerWarning
from fiddlerc.cli import run_command_line

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]


@pytest.mark.parametrize("strategies", [("resident",), ("streamed",), ("resident", "streamed"), None])
def test_the_gpu_computes_what_the_cpu_computes(strategies: tuple[str, ...] | None, tmp_path: Path) -> None:
    spec = small_spec()
    plan = write_sample_plan(tmp_path / "plan", spec)
    weights = fiddler_runtime.ExpertWeights.random(seed=1)
    torch.manual_seed(0)
    hidden = torch.randn(200, spec.hidden_size, dtype=torch.bfloat16)
    topk_weights, topk_ids = torch.rand(200, spec.num_experts).softmax(-1).topk(spec.top_k)
    layer = spec.moe_layers[0]
    with fiddler_runtime.Engine(plan, weights, device="none") as engine:
        expected = engine.moe(layer, hidden, topk_ids, topk_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        engine = fiddler_runtime.Engine(plan, weights, device="cuda", strategies=strategies)
    with engine:
        found = engine.moe(layer, hidden.cuda(), topk_ids.cuda(), topk_weights.cuda())
        calls = engine.counters()["expert_calls"]
    assert found.is_cuda
    # Two bf16 roundings of the intermediate and the result apart.
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=2**-6, atol=2**-6)
    for strategy in strategies or ():
        assert calls[strategy] > 0


def test_calibrate_compile_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hw, plan = str(tmp_path / "hw.json"), str(tmp_path / "plan")
    demo = str(TINY_MIXTRAL)
    assert run_command_line(["calibrate", "--quick", "--model", demo, "--accelerator", "cuda", "-o", hw]) == 0
    assert run_command_line(["compile", demo, "--hw", hw, "--gpu-memory", "1GiB", "-o", plan]) == 0
    assert run_command_line(["run", plan, "--model", demo, "--prompt", "The module", "--device", "cuda"]) == 0
    assert capsys.readouterr().out
