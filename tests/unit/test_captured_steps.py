"""Captured steps on the simulated device, against the plain path: the CPU lane is entered by the runtime's own flags,
and by flags and host functions of a driver library (tests/fake_driver)."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
import runtime_samples
import torch
from fake_driver import CALLS, WAITS, WRITES, FakeDriver

from fiddler_runtime import Engine, ExpertWeights, FiddlerError
from fiddler_runtime.captured.entry import Entry, ThreadFlags
from fiddler_runtime.captured.layers import CapturedLayers
from fiddler_runtime.dispatch import Dispatcher
from fiddler_runtime.lanes.device import CannotCapture, _InQueue
from fiddler_runtime.lanes.recording import Recording

SPEC = runtime_samples.small_spec()
ENTRIES = ("flags", "driver flags", "driver functions")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory):
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "plan", SPEC)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    fake = FakeDriver(tmp_path_factory.mktemp("driver"))
    yield fake
    fake.close()


@pytest.fixture
def fake(built: FakeDriver):
    built.native.fake_reset()
    yield built
    assert built.native.fake_registered() == 0, "the mailbox was left registered"


@pytest.fixture
def engine(plan):
    with Engine(plan, ExpertWeights.random(), strategies=("resident", "cpu")) as opened:
        yield opened


def enter(engine: Engine, entry: Entry, stall_ms: int = 30_000) -> None:
    """Captured steps of this engine enter the CPU lane that way."""
    decided = Dispatcher(engine._library, engine._tables, SPEC.num_experts, allow=("resident", "cpu"))
    engine._captured = CapturedLayers(
        SPEC.hidden_size,
        SPEC.top_k,
        engine._device,
        engine._store,
        engine._kernels,
        decided,
        engine._lanes,
        done=engine._count_captured,
        entry=entry,
        stall_ms=stall_ms,
    )


def entry_named(name: str, fake: FakeDriver) -> Entry:
    return {"flags": ThreadFlags, "driver flags": fake.flags, "driver functions": fake.functions}[name]()


class Step:
    """A little model: two MoE layers with something in between, on tensors that stay where they are."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.engine = engine
        self.hidden = torch.zeros(tokens, SPEC.hidden_size, dtype=torch.bfloat16)
        self.logits = [torch.zeros(tokens, SPEC.num_experts) for _ in SPEC.moe_layers]

    def fill(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.hidden.normal_()
        for logits in self.logits:
            logits.normal_()

    def __call__(self) -> torch.Tensor:
        hidden = self.hidden
        for layer, logits in zip(SPEC.moe_layers, self.logits, strict=True):
            weights, ids = logits.softmax(-1).topk(SPEC.top_k)
            hidden = hidden + self.engine.moe(layer, torch.tanh(hidden), ids, weights)
        return hidden


def test_a_closed_engine_holds_no_weights(plan) -> None:  # type: ignore[no-untyped-def]
    with Engine(plan, ExpertWeights.random(), strategies=("resident", "cpu")) as opened:
        with opened.captured():
            weights = weakref.ref(opened._store)
        assert weights() is not None
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_a_replayed_step_computes_what_the_plain_path_computes(
    engine: Engine, fake: FakeDriver, name: str, tokens: int
) -> None:
    enter(engine, entry_named(name, fake))
    step = Step(engine, tokens)
    step.fill(0)
    plain = [step()]
    with engine.captured() as layers:
        captured = layers.capture(tokens, step)
        found = [captured.graph.result.clone()]
    engine.reset_counters()
    for seed in range(1, 6):
        step.fill(seed)
        with engine.captured() as layers:
            found.append(layers.replay(captured).clone())
    counted = engine.counters()
    engine.reset_counters()
    for seed in range(1, 6):
        step.fill(seed)
        plain.append(step())
    for a, b in zip(found, plain, strict=True):
        if tokens == 1:
            assert torch.equal(a, b), "the same operations in the same order"
        # Matrix products of more rows may add in another order, and bf16 rounds the residual stream twice.
        assert torch.allclose(a.float(), b.float(), rtol=2.0**-6, atol=2.0**-6)
    for what in ("expert_calls", "expert_tokens", "layers"):
        assert counted[what] == engine.counters()[what], (
            "steps are counted as if their layers had been called one by one"
        )
    assert counted["expert_calls"]["resident"] and counted["expert_calls"]["cpu"]
    if name != "flags":
        rows, steps = len(SPEC.moe_layers), 6
        expected = [steps * (1 + rows), steps * rows, 0] if name == "driver flags" else [0, 0, steps * rows]
        assert [fake.native.fake_calls(kind) for kind in (WRITES, WAITS, CALLS)] == expected
    engine.close()


@pytest.mark.parametrize("name", ["driver flags", "driver functions"])
def test_a_step_that_is_stuck_is_given_up_and_the_plain_path_goes_on(engine: Engine, fake: FakeDriver, name: str):
    # A machine with other work may let a step that is not stuck wait for some tenths of a second.
    enter(engine, entry_named(name, fake), stall_ms=1500)
    step = Step(engine, 1)
    step.fill(0)
    expected = step()
    with engine.captured() as layers:
        captured = layers.capture(1, step)
    fake.native.fake_deaf(1)
    with pytest.raises(FiddlerError, match=r"run a captured step .*made no progress and was given up"):  # noqa: SIM117
        with engine.captured() as layers:
            layers.replay(captured)
    fake.native.fake_deaf(0)
    with pytest.raises(FiddlerError, match=r"begin a captured step .*made no progress"):  # noqa: SIM117
        with engine.captured() as layers:
            layers.replay(captured)
    assert torch.equal(step(), expected)
    engine.close()


def test_what_captured_steps_do_is_described(plan) -> None:  # type: ignore[no-untyped-def]
    """They stream nothing, whatever the engine may."""
    for device, strategies, captured in (
        ("simulated", None, ["resident", "cpu"]),
        ("simulated", ("resident",), ["resident"]),
        ("simulated", ("streamed",), []),
        ("none", None, []),
    ):
        with Engine(plan, ExpertWeights.random(), device=device, strategies=strategies) as engine:
            assert engine.describe()["captured_strategies"] == captured
            assert engine.describe()["captured_entry"] is None
            if captured:
                with engine.captured():
                    assert engine.describe()["captured_entry"] == "flags of a simulated stream"
            else:
                with pytest.raises(FiddlerError), engine.captured():
                    pass


def test_an_error_of_the_cpu_lane_reaches_the_caller(engine: Engine):
    enter(engine, ThreadFlags())
    step = Step(engine, 1)
    step.fill(0)
    with engine.captured() as layers:
        captured = layers.capture(1, step)
    for row in engine._store.pointers:
        for expert in range(SPEC.num_experts):
            row[expert] = None
    with pytest.raises(FiddlerError, match=r"run a captured step .*a pointer is null"):  # noqa: SIM117
        with engine.captured() as layers:
            layers.replay(captured)


def test_a_thread_between_captured_steps_is_told_that_it_would_wait_for_itself(engine: Engine):
    step = Step(engine, 1)
    step.fill(0)
    expected = step()
    with engine.captured():
        for call in (step, engine.close, engine.captured().__enter__):
            with pytest.raises(FiddlerError, match="was called between captured steps"):
                call()
    assert torch.equal(step(), expected)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_an_interrupted_step_runs_to_its_end(
    engine: Engine, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, name: str, again: bool
) -> None:
    """Its stream would wait for a CPU lane that nobody serves, and closing for the stream."""
    enter(engine, entry_named(name, fake))
    step = Step(engine, 1)
    step.fill(0)
    with engine.captured() as layers:
        captured = layers.capture(1, step)
        expected = layers.replay(captured).clone()
    stream = threading.Event()
    engine._device.submit(stream.wait)
    plain, interrupts = _InQueue.wait, iter(range(1 + again))

    def wait(launched: _InQueue, seconds: float) -> bool:
        for _ in interrupts:
            raise KeyboardInterrupt
        stream.set()
        return plain(launched, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(_InQueue, "wait", wait)
        with pytest.raises(KeyboardInterrupt), engine.captured() as layers:
            layers.replay(captured)
    stream.set()
    with engine.captured() as layers:
        assert torch.equal(layers.replay(captured), expected)
    engine.close()


def test_an_error_while_capturing_leaves_nothing_behind(engine: Engine):
    step = Step(engine, 2)
    step.fill(0)
    expected = step()

    def looks() -> torch.Tensor:
        return step() * float(step.hidden.sum())

    def twice() -> torch.Tensor:
        return step() + step()

    with pytest.raises(CannotCapture, match="looks at a value that is still to be computed: found aten::item"):  # noqa: SIM117
        with engine.captured() as layers:
            layers.capture(2, looks)
    with pytest.raises(CannotCapture, match="more MoE layers in a step than the model has"):  # noqa: SIM117
        with engine.captured() as layers:
            layers.capture(2, twice)
    assert torch.equal(step(), expected), "the plain path goes on"
    with engine.captured() as layers:
        assert torch.allclose(layers.capture(2, step).graph.result, expected, atol=2.0**-6)


def test_other_threads_take_turns_with_captured_steps(engine: Engine):
    step = Step(engine, 1)
    step.fill(0)
    expected = step()
    with engine.captured() as layers:
        captured = layers.capture(1, step)
    wrong: list[int] = []

    def plain() -> None:
        for at in range(20):
            if not torch.equal(step(), expected):
                wrong.append(at)

    other = threading.Thread(target=plain)
    other.start()
    for _ in range(20):
        with engine.captured() as layers:
            assert torch.equal(layers.replay(captured), expected)
    other.join()
    assert not wrong


def test_threads_end_with_the_engine(plan):
    before = set(Path("/proc/self/task").iterdir())
    with Engine(plan, ExpertWeights.random(), strategies=("resident", "cpu")) as engine:
        step = Step(engine, 1)
        with engine.captured() as layers:
            layers.capture(1, step)
        assert len(set(Path("/proc/self/task").iterdir()) - before) >= 4, "two queues, the poller, the watchdog"
    for _ in range(1000):  # a thread that was joined is listed for a moment longer
        if set(Path("/proc/self/task").iterdir()) <= before:
            break
        time.sleep(1e-3)
    assert set(Path("/proc/self/task").iterdir()) <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "none"}, "nothing to capture steps on: found device none"),
        ({"strategies": ("resident", "streamed")}, "stream none: found strategies resident,streamed, expected cpu"),
    ],
)
def test_where_there_are_no_captured_steps_it_is_said(plan, options: dict, message: str):
    with Engine(plan, ExpertWeights.random(), **options) as engine:
        with pytest.raises(FiddlerError, match=message):  # noqa: SIM117
            with engine.captured():
                pass
        hidden = torch.zeros(1, SPEC.hidden_size)
        engine.moe(1, hidden, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    with pytest.raises(FiddlerError, match="the engine is closed"):  # noqa: SIM117
        with engine.captured():
            pass


def test_all_resident_needs_no_cpu_lane(plan):
    with Engine(plan, ExpertWeights.random(), strategies=("resident",)) as engine:
        step = Step(engine, 1)
        step.fill(3)
        expected = step()
        with engine.captured() as layers:
            assert torch.equal(layers.capture(1, step).graph.result, expected)


def test_a_recording_repeats_views_in_place_operations_and_results():
    a = torch.arange(6.0)
    kept = torch.zeros(3, 2)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        turned = a.view(2, 3).T  # a view
        flat = turned.reshape(-1)  # a copy, though it could be a view
        kept.add_(turned)  # in place
        top = flat.topk(2)  # two results
        room = torch.empty(2).copy_(top.values)
        return room * 2, top.indices

    with torch.inference_mode():
        recording = Recording(work)
    doubled, indices = recording.result
    assert doubled.tolist() == [10.0, 8.0]
    a.copy_(torch.tensor([9.0, 0, 0, 0, 0, 7]))
    recording.replay()
    assert doubled.tolist() == [18.0, 14.0]
    assert indices.tolist() == [0, 5]
    assert kept.tolist() == [[9, 3], [1, 4], [2, 12]]
