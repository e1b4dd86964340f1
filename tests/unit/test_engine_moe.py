"""Engine.moe on every strategy against float64 torch, with random weights and a real kernel library."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import runtime_samples
import torch

from fiddler_runtime.engine import Engine
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import usable_cores
from fiddler_runtime.plan import Plan
from fiddler_runtime.weights import ExpertWeights

SPEC = runtime_samples.small_spec()
EVERY_WAY = {
    "cpu": ("cpu",),
    "resident": ("resident",),
    "streamed": ("streamed",),
    "resident+streamed": ("resident", "streamed"),
    "resident+cpu": ("resident", "cpu"),
    "mixed": None,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "small", SPEC)


@pytest.fixture(scope="module")
def experts() -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    hidden, intermediate = SPEC.hidden_size, SPEC.intermediate_size
    return {
        (layer, expert): (matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate))
        for layer in SPEC.moe_layers
        for expert in range(SPEC.num_experts)
    }


@pytest.fixture(scope="module", params=EVERY_WAY)
def engine(request: pytest.FixtureRequest, plan: Plan, experts):
    with Engine(plan, ExpertWeights.from_tensors(experts), strategies=EVERY_WAY[request.param]) as opened:
        yield opened


def routing(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, SPEC.hidden_size, generator=generator).bfloat16()
    # Uneven popularity, so that some experts get many tokens and some few.
    scores = torch.rand(tokens, SPEC.num_experts, generator=generator) + torch.linspace(0, 1.2, SPEC.num_experts)
    weights, ids = scores.topk(SPEC.top_k)
    return hidden, ids, weights / weights.sum(-1, keepdim=True)


def reference(experts, layer: int, hidden, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64, and the sum of absolute terms, which bounds the rounding."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    size = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for slot in range(ids.shape[1]):
            matrices = experts.get((layer, int(ids[token, slot])))
            if matrices is None:
                continue
            gate, up, down = (m.double() for m in matrices)
            x = hidden[token].double()
            inner = torch.nn.functional.silu(gate @ x) * (up @ x)
            out[token] += weights[token, slot].double() * (down @ inner)
            size[token] += weights[token, slot].double() * (down.abs() @ inner.abs())
    return out, size


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 17, 130])
def test_equals_float64_on_every_strategy(engine: Engine, experts, tokens: int):
    for layer in SPEC.moe_layers:
        hidden, ids, weights = routing(tokens, 10 * tokens + layer)
        out = engine.moe(layer, hidden, ids, weights)
        assert out.shape == hidden.shape
        assert out.dtype == torch.bfloat16
        expected, size = reference(experts, layer, hidden, ids, weights)
        # Roundings to bf16 (2^-9 relative each): gate, up, silu, product, an expert's result, the sum's result.
        assert ((out.double() - expected).abs() <= 6 * 2.0**-9 * size + 1e-6).all()


def test_the_strategies_that_were_permitted_are_those_that_ran(engine: Engine):
    engine.reset_counters()
    hidden, ids, weights = routing(130, 3)
    for layer in SPEC.moe_layers:
        engine.moe(layer, hidden, ids, weights)
    counters = engine.counters()
    ran = {name for name, count in counters["expert_calls"].items() if count}
    assert ran == set(engine.strategies), "all that are permitted occur with these tables, and no other"
    assert sum(counters["expert_tokens"].values()) == 130 * SPEC.top_k * len(SPEC.moe_layers)
    assert counters["layers"] == len(SPEC.moe_layers)
    assert counters["layer_us"] > 0


def test_residents_are_where_the_strategies_say(engine: Engine):
    total = SPEC.total_experts
    planned = int(runtime_samples.every_third(SPEC).sum())
    described = engine.describe()
    expected = total if engine.strategies == ("resident",) else planned * ("resident" in engine.strategies)
    assert described["resident_experts"] == expected
    assert described["resident_bytes"] == expected * SPEC.expert_bytes
    packed = engine.plan.header.kernels.packed_bytes
    assert described["arena_bytes"] == (total - expected) * packed
    assert described["kernel"] in {v.symbol for v in engine.plan.header.kernels.variants}


def test_rows_are_independent_of_the_batch_they_come_in(engine: Engine):
    hidden, ids, weights = routing(40, 8)
    whole = engine.moe(1, hidden, ids, weights)
    # Not bit for bit: another number of tokens may take another tile, whose sums run in another order.
    parts = torch.cat(
        [engine.moe(1, hidden[a : a + 10], ids[a : a + 10], weights[a : a + 10]) for a in (0, 10, 20, 30)]
    )
    assert torch.allclose(whole.float(), parts.float(), rtol=2.0**-6, atol=2.0**-6)


def test_every_kind_of_input_tensor(engine: Engine):
    hidden, ids, weights = routing(9, 4)
    expected = engine.moe(2, hidden, ids, weights)
    strided = torch.stack([hidden, torch.full_like(hidden, torch.nan)], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(engine.moe(2, strided, ids, weights), expected)
    assert torch.equal(engine.moe(2, hidden, ids.int(), weights), expected)
    assert torch.equal(engine.moe(2, hidden, ids.T.contiguous().T, weights.T.contiguous().T), expected)
    single = engine.moe(2, hidden.float(), ids, weights)
    assert single.dtype == torch.float32
    assert torch.equal(single.bfloat16(), expected)
    learning = hidden.float().requires_grad_()
    assert not engine.moe(2, learning, ids, weights).requires_grad


def test_foreign_ids_are_skipped(engine: Engine, experts):
    hidden, ids, weights = routing(6, 6)
    ids[0, 0], ids[3, 1], ids[5] = -1, SPEC.num_experts, 2**40
    expected, size = reference(experts, 1, hidden, ids, weights)
    out = engine.moe(1, hidden, ids, weights)
    assert ((out.double() - expected).abs() <= 6 * 2.0**-9 * size).all()
    assert (out[5] == 0).all()


def test_an_expert_chosen_twice_counts_twice(engine: Engine, experts):
    hidden, ids, weights = routing(40, 12)
    ids[::3] = ids[::3, :1]
    out = engine.moe(1, hidden, ids, weights)
    expected, size = reference(experts, 1, hidden, ids, weights)
    assert ((out.double() - expected).abs() <= 6 * 2.0**-9 * size + 1e-6).all()


def test_within_inference_mode(engine: Engine):
    hidden, ids, weights = routing(40, 13)
    expected = engine.moe(1, hidden, ids, weights)
    with torch.inference_mode():
        assert torch.equal(engine.moe(1, hidden, ids, weights), expected)


def test_the_inputs_are_not_touched(engine: Engine):
    hidden, ids, weights = routing(20, 2)
    copies = hidden.clone(), ids.clone(), weights.clone()
    engine.moe(1, hidden, ids, weights)
    assert all(torch.equal(a, b) for a, b in zip((hidden, ids, weights), copies, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, r"no such MoE layer: found 0, expected one of \[1, 2\]"),
        ({"hidden": torch.zeros(4, 65)}, r"wrong shape of hidden: found \[4, 65\], expected \[tokens, 64\]"),
        ({"hidden": torch.zeros(1, 4, 64)}, "wrong shape of hidden"),
        ({"topk_ids": torch.zeros(5, 2, dtype=torch.int64)}, r"wrong shape of topk_ids: found \[5, 2\]"),
        ({"topk_weights": torch.zeros(4, 3)}, r"wrong shape of topk_weights: found \[4, 3\], expected \[4, 2\]"),
        ({"topk_ids": torch.zeros(4, 2)}, "wrong dtypes"),
        ({"hidden": torch.zeros(4, 64, dtype=torch.int64)}, "wrong dtypes"),
    ],
)
def test_mistakes_are_told(plan: Plan, change: dict, message: str):
    call = {
        "layer": 1,
        "hidden": torch.zeros(4, 64),
        "topk_ids": torch.zeros(4, 2, dtype=torch.int64),
        "topk_weights": torch.zeros(4, 2),
        **change,
    }
    with (
        Engine(plan, ExpertWeights.random(), strategies=("cpu",)) as engine,
        pytest.raises(FiddlerError, match=message),
    ):
        engine.moe(**call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ("gpu",)}, "unknown strategies: found gpu, expected one or more of resident, streamed, cpu"),
        ({"strategies": ()}, "no strategy is permitted"),
        ({"strategies": ("streamed",), "device": "none"}, "need an accelerator"),
        ({"threads": 0}, "wrong number of threads"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_options_are_told(plan: Plan, options: dict, message: str):
    with pytest.raises(FiddlerError, match=message):
        Engine(plan, ExpertWeights.random(), **options)


def test_without_an_accelerator_all_cores_compute_everything(plan: Plan):
    before = threading.active_count()
    with Engine(plan, ExpertWeights.random(), device="none") as engine:
        assert threading.active_count() == before, "no thread for an accelerator"
        assert engine.strategies == ("cpu",)
        assert engine.describe()["threads"] == usable_cores()
        engine.moe(1, *routing(3, 1))
        assert engine.counters()["expert_calls"]["resident"] == 0


def test_a_simulated_accelerator_takes_one_core_from_the_cpu_lane(plan: Plan):
    with Engine(plan, ExpertWeights.random(), device="simulated") as engine:
        assert engine.describe()["threads"] == max(1, usable_cores() - 1)


def test_a_gpu_plan_without_a_gpu_runs_on_the_cpu(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA GPU")
    plan = runtime_samples.write_sample_plan(tmp_path / "gpu", SPEC, accelerator="cuda")
    with Engine(plan, ExpertWeights.random()) as engine:
        assert engine.describe()["device"] == "none"


def test_phases_are_counted_apart(plan: Plan):
    with Engine(plan, ExpertWeights.random(), strategies=("cpu",)) as engine:
        engine.set_phase("prefill")
        engine.moe(1, *routing(5, 1))
        engine.set_phase("decode")
        engine.moe(1, *routing(1, 2))
        phases = engine.counters()["phases"]
        assert phases["prefill"]["expert_tokens"]["cpu"] == 5 * SPEC.top_k
        assert phases["decode"]["expert_calls"]["cpu"] == SPEC.top_k
        engine.reset_counters()
        assert engine.counters()["layers"] == 0
        with pytest.raises(FiddlerError, match="unknown phase"):
            engine.set_phase("training")  # type: ignore[arg-type]


def test_close_ends_the_threads_and_may_be_repeated(plan: Plan):
    before = {t.ident for t in threading.enumerate()}
    engine = Engine(plan, ExpertWeights.random())
    engine.moe(1, *routing(30, 1))
    engine.close()
    engine.close()
    assert {t.ident for t in threading.enumerate()} <= before
    assert engine.describe()["model"] == "small"
    with pytest.raises(FiddlerError, match="closed"):
        engine.moe(1, *routing(3, 1))


def test_threads_take_turns(plan: Plan):
    with Engine(plan, ExpertWeights.random()) as engine:
        call = routing(30, 1)
        expected = engine.moe(1, *call)
        results: list[torch.Tensor] = []
        workers = [
            threading.Thread(target=lambda: results.extend(engine.moe(1, *call) for _ in range(10))) for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 30
        assert all(torch.equal(result, expected) for result in results)


def test_an_engine_refuses_to_run_in_a_forked_child(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    with Engine(plan, ExpertWeights.random(), strategies=("cpu",)) as engine:
        call, here = routing(3, 1), os.getpid()
        expected = engine.moe(1, *call)
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: here + 1)
            with pytest.raises(FiddlerError, match="does not survive fork"):
                engine.moe(1, *call)
            with engine._lock:  # as another thread of the parent's may have held it
                engine.close()
        assert torch.equal(engine.moe(1, *call), expected), "closing it in the child closed nothing"


def test_an_error_in_the_accelerators_thread_reaches_the_caller_and_the_engine_goes_on(plan: Plan, monkeypatch):
    with Engine(plan, ExpertWeights.random(), strategies=("resident",)) as engine:
        call = routing(4, 1)
        expected = engine.moe(1, *call)
        saved = dict(engine._store.resident[0])
        engine._store.resident[0].clear()
        with pytest.raises(KeyError):
            engine.moe(1, *call)
        engine._store.resident[0].update(saved)
        assert torch.equal(engine.moe(1, *call), expected)


def test_streaming_is_double_buffered(plan: Plan):
    """The first copies start before anything is computed, and at most two experts are ahead of the computation."""
    with Engine(plan, ExpertWeights.random(), strategies=("streamed",)) as engine:
        events: list[tuple[str, int]] = []
        device = engine._device
        fetch, wait = device.on_copy_engine, device.wait
        device.on_copy_engine = lambda fn, slot, *rest, after=None: (  # type: ignore[method-assign]
            events.append(("copy", slot)),
            fetch(fn, slot, *rest, after=after),
        )[1]
        device.wait = lambda ticket: (events.append(("compute", -1)), wait(ticket))[1]  # type: ignore[method-assign]
        hidden, ids, weights = routing(130, 1)
        engine.moe(1, hidden, ids, weights)
        active = ids.unique().numel()
        assert active >= 4
        steps = ["copy", "copy", *["compute", "copy"] * (active - 2), "compute", "compute"]
        assert [kind for kind, _ in events] == steps
        assert [slot for kind, slot in events if kind == "copy"] == [index % 2 for index in range(active)]


def test_streamed_experts_come_by_falling_token_count():
    from fiddler_runtime.lanes.routing import route

    ids = torch.tensor([[0, 2], [2, 1], [3, 2], [3, 0], [3, 9]])
    counts = np.array([2, 1, 3, 3], np.int32)
    strategy = np.array([2, 3, 2, 1], np.uint8)
    found = route(ids, torch.arange(10.0).view(5, 2), counts, strategy, lambda _, tensor: tensor)
    assert [share.expert for share in found.streamed] == [2, 0]
    assert [share.expert for share in found.resident] == [3]
    for share, rows, weights in [
        (found.streamed[0], [0, 1, 2], [1.0, 2.0, 5.0]),
        (found.streamed[1], [0, 3], [0.0, 7.0]),
        (found.resident[0], [2, 3, 4], [4.0, 6.0, 8.0]),
    ]:
        assert found.rows[share.start : share.stop].tolist() == rows
        assert found.weights[share.start : share.stop].tolist() == weights
