"""What a plan can switch on in the engine: split experts and prefetch. And drift from what the plan says."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_samples import ISAS, activated, open_isa, random_expert
from plan_samples import sample_header, sample_tables
from runtime_samples import every_third, small_spec, write_sample_plan

from fiddler_runtime.ahead import Ahead
from fiddler_runtime.drift import LEAST_LAYERS, WARM_UP, WINDOW_S, Drift, Lane, Setup
from fiddler_runtime.engine import Engine
from fiddler_runtime.errors import FiddlerWarning
from fiddler_runtime.kernels import empty_packed
from fiddler_runtime.lanes.accelerator import AcceleratorLanes
from fiddler_runtime.lanes.expert import unpack_expert
from fiddler_runtime.lanes.streamed import copy_first_rows
from fiddler_runtime.plan import ExpertForm, Feature, ModelSpec, Plan
from fiddler_runtime.weights import ExpertWeights

# Tails everywhere: an odd hidden size, 3 blocks of 64 rows and 8 more.
SPEC = small_spec(hidden_size=71, intermediate_size=200, num_layers=4, moe_layers=(0, 1, 3))
SPLIT, PREFETCH = Feature("split", True, 0.1, 0.1, 0.1), Feature("prefetch", True, 0.1, 0.1, 0.1)


@pytest.fixture(scope="module")
def experts() -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (SPEC.hidden_size, SPEC.intermediate_size)
    made = {(layer, e): random_expert(shape, generator) for layer in SPEC.moe_layers for e in range(SPEC.num_experts)}
    return {key: (expert.gate, expert.up, expert.down) for key, expert in made.items()}


def run(plan: Plan, experts, steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):  # type: ignore[no-untyped-def]
    """(outputs of every layer of every step, counters)."""
    with Engine(plan, ExpertWeights.from_tensors(experts)) as engine:
        outputs = [engine.moe(layer, *step) for step in steps for layer in SPEC.moe_layers]
        return outputs, engine.counters()


def steps(
    tokens: tuple[int, ...], seed: int = 0, spec: ModelSpec = SPEC
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in tokens:
        scores = torch.rand(count, spec.num_experts, generator=generator) + torch.linspace(0, 1, spec.num_experts)
        weights, ids = scores.topk(spec.top_k)
        made.append((torch.randn(count, spec.hidden_size, generator=generator).bfloat16(), ids, weights))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize(
    ("shape", "bias"), [((71, 200), False), ((64, 256), False), ((130, 300), False), ((129, 200), True)]
)
def test_the_first_rows_of_a_packed_expert_are_a_packed_expert(shape: tuple[int, int], bias: bool, rows: int) -> None:
    expert = random_expert(shape, torch.Generator().manual_seed(2), bias)
    with open_isa(shape, ISAS[-1], bias=bias) as kernels:
        packed = expert.packed(kernels)
    landing = empty_packed(packed.nbytes)
    landing.fill_(float("nan"))
    part = copy_first_rows(packed, landing, ExpertForm(*shape, bias=bias), rows)
    found = unpack_expert(part, ExpertForm(shape[0], rows, bias=bias))
    assert torch.equal(found.gate_up, torch.cat([expert.gate[:rows], expert.up[:rows]]))
    assert torch.equal(found.down, expert.down[:, :rows])
    if bias:
        gate, up, down = found.biases
        assert torch.equal(gate, expert.biases[0][:rows])
        assert torch.equal(up, expert.biases[1][:rows])
        assert not down.any(), "who computes the other rows adds them"


def test_a_split_expert_gives_what_a_whole_one_gives(tmp_path: Path, experts) -> None:  # type: ignore[no-untyped-def]
    mixed = steps((1, 30, 60, 90, 200))
    whole, plain = run(write_sample_plan(tmp_path / "whole", SPEC), experts, mixed)
    split, counted = run(write_sample_plan(tmp_path / "split", SPEC, features=(SPLIT,)), experts, mixed)
    assert plain["expert_calls"]["split"] == 0 < counted["expert_calls"]["split"]
    assert counted["expert_tokens"]["split"] > 0
    for a, b in zip(whole, split, strict=True):
        # Sums over intermediate rows are parted, each part is rounded to bf16 on the accelerator.
        assert torch.allclose(a.float(), b.float(), rtol=2.0**-5, atol=2.0**-5)


@pytest.mark.slow
def test_a_split_expert_with_biases_adds_each_once(tmp_path: Path) -> None:
    """gpt-oss's form of experts on every lane and in two halves, against float64."""
    names = replace(SPEC.expert_tensors, gate_bias="{layer}.g", up_bias="{layer}.u", down_bias="{layer}.d")
    spec = replace(SPEC, hidden_size=129, activation="gptoss", expert_bias=True, expert_tensors=names)
    generator = torch.Generator().manual_seed(1)
    keys = [(layer, e) for layer in spec.moe_layers for e in range(spec.num_experts)]
    made = {key: random_expert((129, 200), generator, bias=True) for key in keys}
    experts = {key: (e.gate, e.up, e.down, *e.biases) for key, e in made.items()}
    plan = write_sample_plan(tmp_path / "plan", spec, features=(SPLIT,))
    for strategies in (None, ("cpu",), ("resident",), ("streamed",)):
        with Engine(plan, ExpertWeights.from_tensors(experts), strategies=strategies) as engine:
            for hidden, ids, weights in steps((1, 30, 60, 90, 200), spec=spec):
                out = engine.moe(0, hidden, ids, weights).double()
                expected, size = torch.zeros_like(out), torch.zeros_like(out)
                for e in range(spec.num_experts):
                    share = (weights * (ids == e)).sum(1, keepdim=True).double()
                    gate, up, down, gate_bias, up_bias, down_bias = (part.double() for part in experts[0, e])
                    g, u = hidden.double() @ gate.T + gate_bias, hidden.double() @ up.T + up_bias
                    expected += share * (activated("gptoss", g, u) @ down.T + down_bias)
                    size += share * (activated("gptoss", g, u.abs()).abs() @ down.abs().T + down_bias.abs())
                # Roundings to bf16, 2^-9 each: gate, up, 1.702 gate, sigmoid, up + 1, two products, an expert's result
                # and the sum's. At most 0.12 of that was seen.
                assert ((out - expected).abs() <= 9 * 2.0**-9 * size).all()
            calls = engine.counters()["expert_calls"]
            ran = {name for name, count in calls.items() if count}
            assert ran == {*engine.strategies, *(("split",) if strategies is None else ())}


def test_a_plan_without_the_cpu_lane_splits_nothing(tmp_path: Path, experts) -> None:  # type: ignore[no-untyped-def]
    plan = write_sample_plan(tmp_path / "split", SPEC, features=(SPLIT,))
    with Engine(plan, ExpertWeights.from_tensors(experts), strategies=("resident", "streamed")) as engine:
        for step in steps((30, 200)):
            engine.moe(0, *step)
        assert engine.counters()["expert_calls"]["split"] == 0


@pytest.mark.parametrize("lost", [False, True])
def test_prefetched_experts_change_nothing_but_the_lane(  # type: ignore[no-untyped-def]
    tmp_path: Path, experts, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lost: fetching fails, which nobody waits for, and the expert is copied when it is wanted."""
    if lost:
        monkeypatch.setattr(AcceleratorLanes, "_fetch", lambda *_: None)
    shape = (len(SPEC.moe_layers), SPEC.num_experts)
    table = np.full((*shape, 2), -1, np.int16)
    resident = every_third(SPEC)
    # Of the next layer's experts off the accelerator, the one with the highest index: those are chosen most here.
    for row in range(shape[0] - 1):
        table[row, :, 0] = max(np.flatnonzero(~resident[row + 1]))
    mixed = steps((1, 1, 2, 30, 90))
    plain_plan = write_sample_plan(tmp_path / "plain", SPEC)
    fetching = write_sample_plan(tmp_path / "fetching", SPEC, features=(PREFETCH,), prefetch=table)
    plain, before = run(plain_plan, experts, mixed)
    fetched, counters = run(fetching, experts, mixed)
    assert before["prefetched"] == before["prefetch_used"] == 0
    assert counters["prefetched"] == len(mixed) * (shape[0] - 1)
    assert 0 < counters["prefetch_used"] <= counters["prefetched"]
    used = counters["expert_calls"]["resident"] - before["expert_calls"]["resident"]
    assert used == counters["prefetch_used"]
    for a, b in zip(plain, fetched, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2.0**-5, atol=2.0**-5)


def test_guesses_are_votes() -> None:
    class Store:
        packed = ({}, {0: 1, 1: 1, 3: 1}, {2: 1})

    table = np.array(
        [[[0, 1], [1, -1], [2, -1], [-1, -1]], [[2, -1], [-1, -1], [-1, -1], [-1, -1]], [[0, 1]] * 4], np.int16
    )
    ahead = Ahead(table, Store())  # type: ignore[arg-type]
    assert ahead.guess(0, np.array([1, 0, 0, 0], np.int32)) == (1, 0)
    assert ahead.fetched_for(1) == 0 and ahead.fetched_for(0) is None
    assert ahead.guess(0, np.array([1, 3, 0, 0], np.int32)) == (1, 1)
    assert ahead.guess(0, np.array([0, 0, 5, 0], np.int32)) is None, "not off the accelerator here"
    assert ahead.guess(0, np.array([0, 0, 0, 5], np.int32)) is None, "says nothing"
    assert ahead.fetched_for(1) is None
    assert ahead.guess(1, np.array([1, 0, 0, 0], np.int32)) == (2, 2)
    assert ahead.guess(2, np.array([1, 1, 1, 1], np.int32)) is None, "the last layer"


AS_PLANNED = Setup("simulated", 7, "avx512_bf16")  # the sample's machine has 8 cores


def drift_of(here: Setup = AS_PLANNED, *, provenance: str = "measured", slow: float | None = None) -> Drift:
    """slow: the slow regime's factor."""
    header = sample_header()
    hardware = replace(header.hardware, provenance=provenance)  # type: ignore[arg-type]
    tables = sample_tables()
    if slow is not None:
        both = np.concatenate([tables.cpu_us, np.float32(slow) * tables.cpu_us])
        tables = sample_tables(cpu_us=both, regime_shares=np.array([0.5, 0.5], np.float32))
    return Drift(Plan(Path("plan"), replace(header, hardware=hardware), tables), here)


def work(drift: Drift, begin_s: float, seconds: float, ratio: float, layer_s: float = 0.01) -> str | None:
    """What is said when the CPU lane takes `ratio` times its prediction, layer after layer, for so long."""
    said = None
    for layer in range(round(seconds / layer_s)):
        drift.note("cpu", begin_s + layer * layer_s, 1000.0, 1000.0 * ratio)
        said = said or drift.message()
    return said


def drifting(ratio: float, here: Setup = AS_PLANNED, **options: Any) -> str | None:
    """What a lane is said to do that takes `ratio` times its prediction from the start."""
    drift = drift_of(here, **options)
    for layer in range(WARM_UP + LEAST_LAYERS):
        drift.note("cpu", layer / 50, 1000.0, 1000.0 * (50.0 if layer < WARM_UP else ratio))
        if layer < WARM_UP + LEAST_LAYERS - 1:
            assert drift.message() is None, "too early to tell"
    said = drift.message()
    assert drift.message() is None, "once"
    return said


@pytest.mark.parametrize("ratio", [0.85, 1.0, 1.2])
def test_what_is_as_planned_is_not_worth_a_word(ratio: float) -> None:
    assert drifting(ratio) is None


def test_drift_is_told_with_what_to_do() -> None:
    for ratio in (0.5, 1.4):
        said = drifting(ratio)
        assert said is not None and f"{ratio:.2f} x" in said and "fiddlerc calibrate" in said and "CPU lane" in said
    sheet = drifting(1.4, provenance="data sheet")
    assert sheet is not None and "data sheet" in sheet


def test_a_slow_regime_is_as_planned() -> None:
    assert drifting(1.6) is not None
    assert drifting(1.6, slow=1.5) is None
    assert drifting(2.0, slow=1.5) is not None


@pytest.mark.parametrize(("lane", "threads"), [("cpu", 1), ("accelerator", 2)])
def test_what_waking_threads_costs_is_no_drift(lane: Lane, threads: int) -> None:
    drift, said = drift_of(), []
    for us in (60.0 * threads, 140.0 * threads):  # 1.6 and 2.4 times the prediction, and more
        for layer in range(WARM_UP + 20 * LEAST_LAYERS):
            drift.note(lane, us + layer / 1000, 100.0, 100.0 + us)
            said.append(drift.message())
    assert not any(said[: len(said) // 2]) and any(said)


def test_the_last_seconds_count_and_not_the_past() -> None:
    """An hour as planned does not hide a drift, and what is over is not held against the plan."""
    drift = drift_of()
    assert work(drift, 0, 60, 1.0) is None
    assert work(drift, 60, WINDOW_S, 1.4) is not None, "within the window"
    drift = drift_of()
    assert work(drift, 0, 60, 1.2) is None
    assert work(drift, 60, WINDOW_S / 10, 1.6) is None, "too short to tell"
    assert work(drift, 60 + WINDOW_S / 10, 60, 1.2) is None


def test_a_moment_in_which_others_had_the_cpu_is_no_drift() -> None:
    drift = drift_of()
    assert work(drift, 0, 1, 1.0) is None
    assert work(drift, 1, 0.5, 100.0) is None
    assert work(drift, 1.5, 10, 1.0) is None


def test_long_layers_are_judged_by_their_number() -> None:
    """A layer a second: the window alone would never see enough of them."""
    assert work(drift_of(), 0, WARM_UP + LEAST_LAYERS - 1, 1.5, layer_s=1.0) is None
    drift = drift_of()
    assert work(drift, 0, WARM_UP + LEAST_LAYERS, 1.0, layer_s=1.0) is None
    assert work(drift, 1000, LEAST_LAYERS, 1.5, layer_s=1.0) is not None


@pytest.mark.parametrize(
    ("here", "why", "mend"),
    [
        (Setup("none", 8, "avx2"), "no accelerator and 8 CPU threads with avx2", "calibrate --accelerator none"),
        (Setup("simulated", 1, "avx2"), "a simulated accelerator and 1 CPU thread with avx2", "leave out --threads"),
        (Setup("simulated", 7, "scalar"), "7 CPU threads with scalar kernels", "--isa"),
    ],
)
def test_a_plan_for_something_else_is_no_drift_of_the_machine(here: Setup, why: str, mend: str) -> None:
    said = drifting(0.26, here)
    assert said is not None
    assert f"the plan is for {AS_PLANNED}, and this runs on " in said and why in said and mend in said
    assert "other programs" not in said


def test_an_engine_warns_once_of_a_plan_that_is_wrong(  # type: ignore[no-untyped-def]
    tmp_path: Path, experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiddler_runtime.drift.WINDOW_S", 0.1)
    plan = write_sample_plan(tmp_path / "plan", SPEC, us=1e5)  # every token ten times a second
    with Engine(plan, ExpertWeights.from_tensors(experts), strategies=("cpu",)) as engine, warnings.catch_warnings():
        warnings.simplefilter("error", FiddlerWarning)
        step = steps((100,))[0]
        with pytest.raises(FiddlerWarning, match="CPU lane takes 0"):
            for _ in range(2000):
                engine.moe(0, *step)
        engine.moe(0, *step)
