"""The lanes on a GPU, against the CPU lane and against a float64 reference of the packed layout."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from runtime_samples import TINY_MIXTRAL, small_spec, write_sample_plan

from fiddler_runtime import Engine, ExpertWeights, FiddlerWarning
from fiddler_runtime.lanes.device import open_device, unpack_expert
from fiddler_runtime.plan import ExpertForm
from fiddlerc.cli import run_command_line

SPEC = small_spec()


def open_engine(plan, device: str = "cuda", **options) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        return Engine(plan, ExpertWeights.random(seed=1), device=device, **options)


def routing(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, SPEC.hidden_size, generator=generator).bfloat16()
    weights, ids = torch.rand(tokens, SPEC.num_experts, generator=generator).softmax(-1).topk(SPEC.top_k)
    return hidden, ids, weights


@pytest.mark.parametrize("strategies", [("resident",), ("streamed",), ("resident", "streamed"), None])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_the_gpu_computes_what_the_cpu_computes(strategies, tokens: int, tmp_path: Path, where: torch.device) -> None:
    plan = write_sample_plan(tmp_path / "plan", SPEC)
    layer = SPEC.moe_layers[0]
    cases = [routing(tokens, seed) for seed in range(5)]
    with open_engine(plan, "none") as engine:
        expected = [engine.moe(layer, *case) for case in cases]
    with open_engine(plan, strategies=strategies) as engine:
        # One after the other without waiting for results: buffers and slots are used again meanwhile.
        found = [engine.moe(layer, *(part.to(where) for part in case)) for case in cases]
        calls = engine.counters()["expert_calls"]
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == where.type
        # Two bf16 roundings of the intermediate and the result apart.
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=2**-6, atol=2**-6)
    assert all(calls[strategy] > 0 for strategy in strategies or ())


def test_tensors_of_the_host_go_there_and_come_back(tmp_path: Path, where: torch.device) -> None:
    plan = write_sample_plan(tmp_path / "plan", SPEC)
    layer, case = SPEC.moe_layers[0], routing(9)
    with open_engine(plan) as engine:
        expected = engine.moe(layer, *(part.to(where) for part in case)).cpu()
        mixed = (case[0].to(where), case[1], case[2])
        for given in (mixed, case):  # not bit for bit: Triton's kernels add experts up in no certain order
            torch.testing.assert_close(engine.moe(layer, *given).cpu(), expected, rtol=2**-7, atol=2**-7)
        single = engine.moe(layer, case[0].float(), case[1], case[2])
        kept = single.clone()
        engine.moe(layer, -case[0].float(), case[1], case[2])
        assert torch.equal(single, kept), "a result is the caller's"


@pytest.mark.parametrize("shape", [(64, 96), (40, 24), (7, 5)])
def test_unpacking_there_is_unpacking_here(shape: tuple[int, int], where: torch.device) -> None:
    form = ExpertForm(*shape)
    packed = torch.randn(form.packed_bytes // 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    here, there = unpack_expert(packed, form), unpack_expert(packed.to(where), form)
    for a, b in zip(here.matrices, there.matrices, strict=True):
        assert torch.equal(a, b.cpu())


def test_copies_overlap_computing(where: torch.device) -> None:
    """Printed, not judged: a copy and a product of matrices, apart and together (pytest -rA shows it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        device = open_device("cuda")
    with device:
        source, target = (
            torch.ones(1 << 26, dtype=torch.bfloat16),
            torch.empty(1 << 26, dtype=torch.bfloat16, device=where),
        )
        pin = device.pin(source)
        a = torch.randn(4096, 4096, device=where).bfloat16()

        def compute() -> None:
            for _ in range(20):
                torch.matmul(a, a)

        def timed(*what: str) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            device.synchronize()
            start.record()
            ticket = device.copy(target, source) if "copy" in what else None
            if "compute" in what:
                compute()
            if ticket is not None:
                torch.cuda.current_stream().wait_event(ticket)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        for what in (("copy",), ("compute",), ("copy", "compute")):
            timed(*what)
            print(" and ".join(what), f"{timed(*what):.2f} ms")
        pin.undo()
    assert float(target.float().mean()) == 1.0


def test_calibrate_compile_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hw, plan = str(tmp_path / "hw.json"), str(tmp_path / "plan")
    demo = str(TINY_MIXTRAL)
    assert run_command_line(["calibrate", "--quick", "--model", demo, "--accelerator", "cuda", "-o", hw]) == 0
    written = Path(hw).read_text()
    for quantity in ("gpu_expert", "host_to_device_pageable", "cpu_expert_while_copying", "launch"):
        assert f'"{quantity}"' in written
    print(written)  # the log of `make test-gpu` keeps it
    assert run_command_line(["compile", demo, "--hw", hw, "--gpu-memory", "1GiB", "-o", plan]) == 0
    run = ["run", plan, "--model", demo, "--prompt", "The module", "--device", "cuda"]
    assert run_command_line(run) == 0
    assert run_command_line([*run, "--capture"]) == 0
    assert run_command_line(["bench", plan, "--model", demo, "--device", "cuda", "--rounds", "1", "--capture"]) == 0
    assert capsys.readouterr().out
