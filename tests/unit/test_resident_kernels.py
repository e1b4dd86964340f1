"""Experts on the accelerator: every kernel against float64, every layout through the lanes, and who chooses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_samples import CPU, FORMS, check_kernel, experts_of, in_float64
from runtime_samples import small_spec, write_sample_plan
from test_lanes_device import pack_by_definition

from fiddler_runtime import engine as engine_module
from fiddler_runtime.engine import Engine
from fiddler_runtime.errors import FiddlerWarning
from fiddler_runtime.lanes import kernel_choice, resident_kernels
from fiddler_runtime.lanes.expert import PackedExpert, expert_result, pack_expert_into, unpack_expert
from fiddler_runtime.lanes.kernel_choice import DEFAULT, TOKENS, Record, choose, decide, measure
from fiddler_runtime.lanes.resident_kernels import KERNELS, Choice, ExpertKernels
from fiddler_runtime.lanes.routing import Share
from fiddler_runtime.plan import ExpertForm, Feature
from fiddler_runtime.weights import ExpertWeights

# numpy's, of Triton's interpreter; on a GPU numbers overflow to infinity without a word, as is meant.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT_TRITON = "needs Triton (pip install '.[triton]', 0.7 GB) and its interpreter (tests/conftest.py)"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.activation}{'-bias' * form.bias}")
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_equals_float64(name: str, form: ExpertForm):
    kernel = KERNELS[name]
    if name.startswith("triton") and not TRITON:
        pytest.skip(WITHOUT_TRITON)
    assert kernel.missing(form, CPU) is None
    check_kernel(kernel, form, [1, 0, 33, 2] if "triton" not in name or form.activation == "silu" else [0, 18])


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if "triton" not in name])
def test_kernels_without_work_add_nothing(name: str):
    form = FORMS[0]
    check_kernel(KERNELS[name], form, [0, 0])
    kernels = ExpertKernels(form, CPU, Choice(KERNELS[name].layout, ((0, name),), "a test"))
    out = torch.ones(1, form.hidden_size)
    empty = torch.zeros(0, dtype=torch.int64)
    kernels.run(torch.ones(1, 104).bfloat16(), empty, torch.zeros(0), kernels.hold({}), [], out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    "form", [*FORMS, ExpertForm(7, 5), ExpertForm(65, 33, "gptoss", bias=True)], ids=lambda f: f"{f.hidden_size}"
)
def test_packing_on_the_device_is_the_packed_layout(form: ExpertForm):
    (expert,) = experts_of(form, 1).values()
    packed = torch.full((form.packed_bytes // 2,), float("nan"), dtype=torch.bfloat16)
    pack_expert_into(expert, packed)
    matrices = pack_by_definition(*expert.matrices)
    assert torch.equal(packed[: len(matrices)].view(torch.int16), matrices.view(torch.int16))
    back = unpack_expert(packed, form)
    for ours, theirs in zip((*back.matrices, *back.biases), (*expert.matrices, *expert.biases), strict=True):
        assert torch.equal(ours, theirs)


def test_residents_are_never_held_twice():
    form = FORMS[1]
    experts = experts_of(form, 2)
    ExpertKernels(form, CPU, Choice("packed", ((0, "unpacked"),), "a test")).hold(experts)
    assert all(isinstance(expert, PackedExpert) for expert in experts.values())
    experts = experts_of(form, 2)
    held = ExpertKernels(form, CPU, Choice("matrix", ((0, "linear"), (9, "grouped_mm")), "a test")).hold(experts)
    assert held.stacked is not None
    storage = held.stacked.gate_up.untyped_storage().data_ptr()
    assert {expert.gate_up.untyped_storage().data_ptr() for expert in experts.values()} == {storage}


def test_where_there_is_no_room_for_a_stack_the_matrices_stay(monkeypatch: pytest.MonkeyPatch):
    form = FORMS[1]
    experts = experts_of(form, 2)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(resident_kernels, "_stack_of", full)
    kernels = ExpertKernels(form, CPU, Choice("matrix", ((0, "grouped_mm"),), "a test"))
    held = kernels.hold(dict(experts))
    hidden, out, rows = torch.randn(2, form.hidden_size).bfloat16(), torch.zeros(2, form.hidden_size), torch.arange(2)
    kernels.run(hidden, rows, torch.ones(2), held, [Share(4, 0, 2)], out)
    assert held.stacked is None
    assert torch.equal(out, expert_result(hidden, experts[4]).float())


@pytest.mark.parametrize("name", ["grouped_mm", "unpacked"])
def test_memory_of_an_expert_that_is_given_up_comes_back(name: str):
    form = FORMS[1]
    kernels = ExpertKernels(form, CPU, Choice(KERNELS[name].layout, ((0, name),), "a test"))
    experts = experts_of(form, 3)
    left = experts[5]
    held = kernels.hold(experts)
    del experts[4]
    kernels.give_back(held)
    assert held.stacked is None and sorted(held.experts) == [3, 5]
    matrices = experts[5].to(CPU)
    assert torch.equal(matrices.down, left.down) and torch.equal(matrices.gate_up, left.gate_up)
    assert matrices.down.untyped_storage().nbytes() == matrices.down.nbytes, "memory of its own"
    hidden, out, rows = torch.randn(2, form.hidden_size).bfloat16(), torch.zeros(2, form.hidden_size), torch.arange(2)
    kernels.run(hidden, rows, torch.ones(2), held, [Share(5, 0, 2)], out)
    assert torch.equal(out, expert_result(hidden, left).float())
    kernels.give_back(held)


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("triton-some", "triton-many")])
def test_without_the_routing_on_the_host_the_result_is_the_same(name: str):
    if name.startswith("triton") and not TRITON:
        pytest.skip(WITHOUT_TRITON)
    form = FORMS[1]
    kernels = ExpertKernels(form, CPU, Choice(KERNELS[name].layout, ((0, name),), "a test"))
    experts = experts_of(form, 3)
    held = kernels.hold(dict(experts))
    generator = torch.Generator().manual_seed(2)
    for tokens in (1, 5, 5):
        hidden = torch.randn(tokens, form.hidden_size, generator=generator).bfloat16()
        if tokens > 1:
            hidden[-1] = 3e38  # a token whose results may not reach the others
        # Experts 4 and 5, and others that are elsewhere; 3 nobody chose.
        ids = torch.tensor([[4, 9], [5, 4], [0, 5], [8, 9], [1, 7]])[:tokens]
        weights = torch.rand(tokens, 2, generator=generator)
        out = torch.ones(tokens, form.hidden_size)
        kernels.run_masked(hidden, ids, weights, held, out)
        for token in range(tokens - (tokens > 1)):
            expected, bound = torch.ones(form.hidden_size, dtype=torch.float64), 1e-3
            for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                if expert in experts:
                    result, moved = in_float64(experts[expert], hidden[token : token + 1])
                    expected, bound = expected + weight.double() * result[0], bound + weight.double() * moved[0]
            assert ((out[token].double() - expected).abs() <= 2.0**-8 * bound).all()


CHOICES = [
    Choice("matrix", ((0, "linear"), (3, "grouped_mm")), "a test"),
    Choice("packed", ((0, "unpacked"),), "a test"),
    pytest.param(
        Choice("packed", ((0, "triton-few"), (8, "triton-some"), (40, "unpacked")), "a test"),
        marks=pytest.mark.skipif(not TRITON, reason=WITHOUT_TRITON),
    ),
]


@pytest.mark.parametrize("choice", CHOICES, ids=["matrix", "packed", "triton"])
def test_every_lane_computes_the_same_with_every_choice(
    choice: Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = small_spec(hidden_size=64, intermediate_size=200)
    on = (Feature("split", True, 0.1, 0.1, 0.1),)
    plan = write_sample_plan(tmp_path / "plan", spec, features=on)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for tokens in (1, 25, 90, 160):
        scores = torch.rand(tokens, spec.num_experts, generator=generator) + torch.linspace(0, 1.2, spec.num_experts)
        weights, ids = scores.topk(spec.top_k)
        steps.append((torch.randn(tokens, spec.hidden_size, generator=generator).bfloat16(), ids, weights))
    found, ran = [], []
    for wanted in (None, choice):  # None: the generated kernels, a simulated accelerator's own
        if wanted is not None:
            monkeypatch.setattr(
                engine_module,
                "kernels_on",
                lambda _, library, isa, wanted=wanted: ExpertKernels(library.spec.expert, CPU, wanted),
            )
        for strategies in (None, ("resident",), ("streamed",)):
            with Engine(plan, ExpertWeights.random(), strategies=strategies, device="simulated") as engine:
                results = [engine.moe(layer, *step) for step in steps for layer in spec.moe_layers]
                found.append(torch.cat(results).float())
                ran.append(engine.counters()["expert_calls"])
                kernels = engine.describe()["accelerator_kernels"]
                assert kernels == str(wanted) if wanted else kernels.startswith("generated, ")
                assert engine.describe()["resident_experts"] == {None: 4, ("resident",): 12}.get(strategies, 0)
    assert ran[:3] == ran[3:]
    assert ran[0]["resident"] and ran[0]["streamed"] and ran[0]["split"], "all lanes had work"
    for ours, theirs in zip(found[3:], found[:3], strict=True):
        # Both within some roundings of bf16 of the truth; measured at most 0.6 of this.
        assert float((ours - theirs).norm() / theirs.norm()) < 2.0**-7


# Who chooses


def times(**by_name: float) -> dict[str, tuple[float, ...]]:
    return {name.replace("_few", "-few").replace("_many", "-many"): (us,) * len(TOKENS) for name, us in by_name.items()}


def test_the_fastest_layout_on_average_is_chosen_with_its_best_kernels():
    measured = times(linear=2.0, unpacked=3.0, triton_few=3.0)
    measured["grouped_mm"] = (1.0,) * 4 + (5.0,) * (len(TOKENS) - 4)
    found = decide(measured, "a test")
    assert found.layout == "matrix"
    assert found.kernels == ((0, "grouped_mm"), (16, "linear"))
    assert [found.at(n).name for n in (0.5, 8, 15.9, 16, 5000)] == ["grouped_mm"] * 3 + ["linear"] * 2
    assert decide(times(linear=2.0, triton_few=1.0, unpacked=3.0), "a test").kernels == ((0, "triton-few"),)
    assert decide(times(linear=2.0), "a test").kernels == ((0, "linear"),)


def test_packed_wins_where_it_is_as_fast_since_copies_need_no_unpacking():
    assert decide(times(linear=1.0, triton_many=1.01), "a test").layout == "packed"
    assert decide(times(linear=1.0, triton_many=1.03), "a test").layout == "matrix"


def empty_record(form: ExpertForm) -> Record:
    return Record(kernel_choice.FORMAT, "a GPU, 9.0", torch.__version__, "none", form, (), {}, {})


def test_every_kernel_that_computes_the_right_thing_is_measured(monkeypatch: pytest.MonkeyPatch):
    form = ExpertForm(64, 32, "gptoss", bias=True)

    def wrong(hidden, rows, weights, held, shares, out) -> None:
        out += 1

    def fails(*arguments: object) -> None:
        raise RuntimeError("out of registers\nand more")

    kernels = {name: kernel for name, kernel in KERNELS.items() if not name.startswith("triton")}
    kernels["wrong"] = replace(KERNELS["linear"], name="wrong", run=wrong)
    kernels["fails"] = replace(KERNELS["unpacked"], name="fails", run=fails)
    kernels["absent"] = replace(KERNELS["unpacked"], name="absent", missing=lambda form, device: "not installed")
    for module in (kernel_choice, resident_kernels):
        monkeypatch.setattr(module, "KERNELS", kernels)
    monkeypatch.setattr(kernel_choice, "_CACHES", 0)
    calls = []
    record = measure(form, CPU, lambda call: float(calls.append(call) or len(calls)), empty_record(form))
    assert set(record.times_us) == {"linear", "grouped_mm", "unpacked"}
    assert all(len(found) == len(record.tokens) for found in record.times_us.values())
    assert record.left_out["absent"] == "not installed"
    assert record.left_out["fails"] == "RuntimeError: out of registers"
    assert "from those of torch's linears" in record.left_out["wrong"]


def test_a_gpu_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    form, gpu = ExpertForm(64, 32), torch.device("cuda")
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "_empty", lambda form, device: empty_record(form))
    monkeypatch.setattr(kernel_choice, "_on_gpu", lambda device: None)
    measured = []

    def fake(form: ExpertForm, device: torch.device, timed: object, empty: Record) -> Record:
        measured.append(form)
        return replace(empty, tokens=TOKENS, times_us=times(linear=2.0, unpacked=1.0))

    monkeypatch.setattr(kernel_choice, "measure", fake)
    assert choose(form, CPU) is DEFAULT and not measured
    first = choose(form, gpu)
    assert first.layout == "packed" and "a GPU" in str(first) and "unpacked (packed layout" in str(first)
    assert choose(form, gpu) == first and len(measured) == 1
    assert choose(replace(form, activation="gelu"), gpu) == first and len(measured) == 2, "each form by itself"
    (path, _) = sorted((tmp_path / "accelerator").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for damaged in (b"{", b'{"format": 1}', path.read_bytes().replace(b'"linear"', b'"nothing"')):
        path.write_bytes(damaged)
        assert choose(form, gpu) == first, "measured again"
    assert len(measured) == 5


def test_where_measuring_fails_torchs_linears_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "_empty", lambda form, device: empty_record(form))
    monkeypatch.setattr(kernel_choice, "_on_gpu", lambda device: None)

    def fake(*arguments: object) -> Record:
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(kernel_choice, "measure", fake)
    with pytest.warns(FiddlerWarning, match="could not be measured"):
        assert choose(FORMS[0], torch.device("cuda")).kernels == DEFAULT.kernels
    assert list(tmp_path.rglob("*.json")) == []


AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fiddler_runtime.lanes import triton_experts as kernels

pointers = {"hidden": "*i32", "table": "*i64", "rows": "*i64", "scale": "*fp32", "out": "*fp32"}
for capability in (80, 90):
    for name, tiles in kernels.TILES.items():
        shape = {"TOKENS": tiles.tokens, "OUTPUTS": tiles.outputs, "PAIRS": tiles.pairs}
        for kernel, more, inner in (
            (kernels.gate_up_kernel, {"ACTIVATION": 2, "LIMIT": 7.0}, "*bf16"),
            (kernels.down_kernel, {"PARTS": tiles.parts}, "*i32"),
        ):
            fixed = {"BIAS": True, "WIDE": False, **shape, **more}
            types = {**pointers, "inner": inner}
            signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
            target = GPUTarget("cuda", capability, 32)
            built = triton.compile(source, target=target, options={"num_warps": tiles.warps})
            print(capability, name, "mma" in built.asm["ptx"], len(built.asm["cubin"]) > 0, built.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=WITHOUT_TRITON)
def test_triton_compiles_the_kernels_for_gpus_that_are_not_here():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 3 * 2
    for capability, tiles, on_tensor_cores, built, shared in lines:
        assert on_tensor_cores == built == "True", (capability, tiles)
        assert int(shared) <= 99 << 10, "what a block may have on the smallest GPU of these generations"
