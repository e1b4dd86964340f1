"""Workloads, predictions and what they rest on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_samples import (
    EXPERTS,
    FILES,
    LAYERS,
    sample_header,
    sample_machine,
    sample_model,
    sample_tables,
    write_sample,
)
from simulate_samples import random_steps

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import Accelerator
from fiddler_runtime.plan import Feature, HardwareSummary, write_plan
from fiddlerc import pipeline
from fiddlerc.cli import parse_sweep, run_command_line
from fiddlerc.ir import Scenario, Steps, Tables
from fiddlerc.simulate import Workload, default_workload, parse_workload, predict
from fiddlerc.simulate.workload import BEAM_OUTPUT, beam_steps, decode_steps, heldout, prompt_steps

WORKLOAD = Workload(8, 16, 40, 3)


def sampled() -> dict[Scenario, Steps]:
    rng = np.random.default_rng(5)
    prompts = [random_steps(rng, 3, LAYERS, EXPERTS, size) for size in (8, 32)]
    prefill = replace(
        prompts[0],
        scenario="prefill",
        **{
            name: np.concatenate([getattr(part, name) for part in prompts])
            for name in ("counts", "tokens", "kv", "heldout")
        },
    )
    return {
        "decode": random_steps(rng, 50, LAYERS, EXPERTS, 1),
        "prefill": prefill,
        "beam": random_steps(rng, 20, LAYERS, EXPERTS, 4),
    }


def on(kind: Any, **changes: Any) -> Any:
    machine = sample_machine(accelerator=Accelerator(kind, kind, 0 if kind == "none" else 1 << 24, ""))
    return sample_header(hardware=HardwareSummary("made-up", "measured", "tests", machine), **changes)


@pytest.mark.parametrize(("length", "chunk"), [(1, 0), (31, 0), (40, 0), (100, 32), (200, 512), (97, 32)])
def test_a_prompt_has_its_tokens_in_parts(length: int, chunk: int) -> None:
    steps = prompt_steps(sampled(), length, chunk)
    assert steps.tokens.sum() == length
    assert (steps.counts.sum(axis=2) == 2 * steps.tokens[:, None]).all()
    assert steps.tokens.max() <= (chunk or length)
    assert steps.kv.tolist() == [0, *np.cumsum(steps.tokens)[:-1].tolist()]


def test_decode_goes_around_the_sampled_tokens_with_a_growing_cache() -> None:
    tokens = sampled()["decode"]
    steps = decode_steps(tokens, 8, 60)
    assert (steps.counts[50:] == tokens.counts[:10]).all()
    assert steps.kv.tolist() == list(range(8, 68)) and (steps.tokens == 1).all()


def test_beams_one_by_one_are_the_same_tokens() -> None:
    tokens = sampled()["decode"]
    together, apart = beam_steps(tokens, 4, True), beam_steps(tokens, 4, False)
    assert (apart.counts.reshape(BEAM_OUTPUT, 4, LAYERS, EXPERTS).sum(axis=1) == together.counts).all()
    assert apart.kv.sum() == together.kv.sum()
    assert (together.counts.sum(axis=2) == 8).all()


def test_more_beams_than_tokens_go_around() -> None:
    few = replace(sampled()["decode"], counts=sampled()["decode"].counts[:3], tokens=np.ones(3, np.int32))
    assert (beam_steps(few, 5, True).counts.sum(axis=2) == 10).all()


def test_only_steps_that_placement_has_not_seen_are_judged() -> None:
    tokens = sampled()["decode"]
    marked = replace(tokens, heldout=np.arange(50) >= 45)
    assert (heldout(marked).counts == tokens.counts[45:]).all()
    assert len(heldout(tokens).tokens) == 50


def test_workloads_are_parsed() -> None:
    spec = sample_model(max_context=4096)
    assert parse_workload(["all"], spec) == default_workload(spec) == Workload()
    asked = parse_workload(["beam:8", "decode:64/256"], spec)
    assert (asked.input_tokens, asked.output_tokens, asked.beam_width) == (64, 256, 8)
    assert asked.scenarios == ("decode", "beam")
    assert default_workload(sample_model(max_context=64)) == Workload(32, 32, 64, 4)


@pytest.mark.parametrize("text", ["decode", "decode:1", "decode:0/4", "prefill:", "beam:0", "beam:-1", "chat:3", ""])
def test_other_words_are_no_workload(text: str) -> None:
    with pytest.raises(FiddlerError, match="no such workload"):
        parse_workload([text], sample_model())


def test_a_workload_ends_with_the_context() -> None:
    with pytest.raises(FiddlerError, match="256 tokens, sample's context"):
        parse_workload(["prefill:257"], sample_model())


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("beam:99999999", "beam:3495"),
        ("decode:1/9999999", "decode:1/223696"),
        ("decode:99999999999/1", "decode:32/128"),
        ("prefill:99999999999", "prefill:1000000"),
    ],
)
def test_a_workload_that_cannot_be_replayed_says_what_can(text: str, hint: str) -> None:
    spec = sample_model(max_context=10_000_001 if text == "decode:1/9999999" else 1_000_000, num_experts=150)
    with pytest.raises(FiddlerError, match="too long") as caught:
        parse_workload([text], spec)
    assert caught.value.hint == f"--workload {hint}"
    assert parse_workload([hint], spec)


def test_every_strategy_is_predicted() -> None:
    prediction = predict(on("cuda"), sample_tables(), sampled(), WORKLOAD)
    assert len(prediction.results) == 10 and prediction.results[0].policy == "ours"
    for result in prediction.results:
        assert result.decode_tokens_per_s > 0 and result.ttft_s > 0 and result.beam_tokens_per_s > 0
        assert (result.prefill_tokens, result.beam_width) == (40, 3)
        assert 0 <= result.hit_rate <= 1
    assert prediction.regimes is None
    assert {r.policy: r.kernels for r in prediction.results}["fiddler-code"] == "torch eager"


def test_strategies_without_an_accelerator_are_those_that_need_none() -> None:
    nothing, never = np.zeros((LAYERS, EXPERTS), np.uint8), np.array([1, 2, 1e12], np.float32)
    tables = sample_tables(resident=nothing, scalars_us=never)
    results = predict(on("none"), tables, sampled(), WORKLOAD).results
    assert [result.policy for result in results] == ["ours", "llama.cpp", "ktransformers"]
    # All three compute everything on the CPU, one expert after the other.
    assert len({result.decode_tokens_per_s for result in results}) == 1


def test_both_regimes_are_predicted() -> None:
    one = sample_tables().cpu_us[0]
    tables = sample_tables(cpu_us=np.stack([one, 2 * one]), regime_shares=np.array([0.4, 0.6], np.float32))
    prediction = predict(on("cuda"), tables, sampled(), WORKLOAD)
    assert prediction.regimes is not None
    slow, fast = prediction.regimes
    assert slow == prediction.results[0].decode_tokens_per_s < fast


def test_the_interval_moves_every_measured_curve() -> None:
    curve = on("cuda").latency[0]
    quantities = ("cpu_expert", "gpu_expert", "host_to_device", "rest_of_step")
    curves = tuple(replace(curve, quantity=q, interval_low=0.8, interval_high=1.5) for q in quantities)
    tables = sample_tables(scalars_us=np.array([0, 0, 25], np.float32))  # entries are not among the curves
    assert predict(on("cuda", latency=curves), tables, sampled(), WORKLOAD).interval == (0.8, 1.5)
    only_cpu = (curves[0], *(replace(curve, interval_low=1.0, interval_high=1.0) for curve in curves[1:]))
    interval = predict(on("cuda", latency=only_cpu), tables, sampled(), WORKLOAD).interval
    assert interval is not None and 0.8 < interval[0] < 1 < interval[1] < 1.5


@pytest.mark.parametrize("quantity", ["cpu_expert", "gpu_expert", "host_to_device", "rest_of_step"])
@pytest.mark.parametrize("changes", [{"samples": 0}, {"interpolated": False}], ids=["limits", "other-shapes"])
def test_no_interval_where_something_was_not_measured(quantity: str, changes: dict[str, Any]) -> None:
    curve = on("cuda").latency[0]
    curves = tuple(
        replace(curve, quantity=q, **(changes if q == quantity else {}))
        for q in ("cpu_expert", "gpu_expert", "host_to_device", "rest_of_step")
    )
    prediction = predict(on("cuda", latency=curves), sample_tables(), sampled(), WORKLOAD)
    assert (prediction.interval, prediction.unmeasured) == (None, (quantity,))


def test_features_that_are_on_are_simulated() -> None:
    tables = sample_tables(cpu_us=sample_tables().cpu_us * 2.5)
    off, split = (
        predict(on("cuda", model=sample_model(intermediate_size=1024), features=(f,)), tables, sampled(), WORKLOAD)
        for f in (Feature("split", False, 0, 0, 0), Feature("split", True, 0, 0, 0))
    )
    assert split.results[0].ttft_s < off.results[0].ttft_s
    assert split.results[1] == off.results[1]  # nobody else's


def test_sweeps_are_parsed() -> None:
    gib = 1 << 30
    assert parse_sweep("gpu-memory=8GiB..80GiB") == tuple(8 * gib * step for step in range(1, 11))
    assert parse_sweep("gpu-memory=8..80GiB") == parse_sweep("gpu-memory=8GiB..80")
    for text in ("gpu-memory=8GiB", "gpu-memory=80GiB..8GiB", "memory=1GiB..2GiB"):
        assert run_command_line(["predict", "x", "--sweep", text]) == 2


def test_a_plan_needs_no_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_sample(tmp_path / "plan").path
    assert run_command_line(["predict", str(plan), "--workload", "decode:8/16", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["results"][0]["policy"] == "ours" and value["workload"]["output_tokens"] == 16
    assert any("drawn from the popularity" in line for line in value["assumptions"])
    assert run_command_line(["predict", str(plan)]) == 0
    printed = capsys.readouterr().out
    assert "made-up (measured)" in printed and "TTFT s at 256" in printed and "deepspeed-mii" in printed


def test_what_cannot_be_predicted_is_said(tmp_path: Path) -> None:
    plan = str(write_sample(tmp_path / "plan").path)
    cases = {
        "a plan has its machine and its memory": pipeline.PredictRequest(plan, hardware="a100"),
        "predicting for a model needs a machine": pipeline.PredictRequest("mixtral"),
    }
    for what, request in cases.items():
        with pytest.raises(FiddlerError, match=what) as caught:
            pipeline.predict(request)
        assert caught.value.hint and caught.value.hint.startswith("fiddlerc predict")


def test_a_sweep_places_anew_for_each_amount(tmp_path: Path) -> None:
    plan = write_sample(tmp_path / "plan").path
    # The sample's fixed part: weights, 64 KiB of cache, 128 KiB of activations, staging.
    amounts = (1 << 16, 700_000, 800_000, 1 << 24)
    request = pipeline.PredictRequest(str(plan), workloads=("decode:8/16",), sweep_bytes=amounts)
    points = pipeline.predict(request).sweep
    assert [point.gpu_memory_bytes for point in points] == list(amounts)
    assert points[0].result is None
    residents = [point.resident_experts for point in points]
    assert residents == sorted(residents) and residents[-1] == LAYERS * EXPERTS
    last = points[-1].result
    assert last is not None and last.hit_rate == 1.0


def test_a_machine_without_an_accelerator_has_no_sweep(tmp_path: Path) -> None:
    placed = replace(sample_header().placement, resident_experts=0, hit_rate=0.0, random_hit_rate=0.0)
    tables = sample_tables(resident=np.zeros((LAYERS, EXPERTS), np.uint8))
    plan = write_plan(tmp_path / "plan", on("none", placement=placed), tables, FILES).path
    with pytest.raises(FiddlerError, match="needs a GPU"):
        pipeline.predict(pipeline.PredictRequest(str(plan), sweep_bytes=(1 << 20, 1 << 21)))


def test_tables_are_left_as_they_are() -> None:
    tables, steps = sample_tables(), sampled()
    before = {name: getattr(tables, name).copy() for name in Tables.__dataclass_fields__}
    predict(on("cuda"), tables, steps, WORKLOAD)
    assert all((getattr(tables, name) == value).all() for name, value in before.items())
