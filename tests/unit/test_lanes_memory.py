"""An accelerator's memory, and the host's for its copies: what happens where there is too little of either."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_samples
import torch
from fake_driver import FakeDriver

from fiddler_runtime import Engine, ExpertWeights, FiddlerError, FiddlerWarning, residents
from fiddler_runtime import engine as engine_module
from fiddler_runtime.lanes import accelerator, pinning
from fiddler_runtime.lanes.device import SimulatedDevice, UnpackedExpert
from fiddler_runtime.lanes.generated_kernels import GeneratedKernels
from fiddler_runtime.lanes.resident_kernels import Held
from fiddler_runtime.lanes.transfers import HostBuffers
from fiddler_runtime.plan import MemoryItem, Plan
from fiddler_runtime.preflight import Need, Preflight
from fiddlerc import ir, placement

SPEC = runtime_samples.small_spec()
LAYER = SPEC.moe_layers[0]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "plan", SPEC)


@pytest.fixture
def fake(tmp_path: Path):
    opened = FakeDriver(tmp_path)
    yield opened
    assert opened.native.fake_registered() == 0, "memory was left registered"
    opened.close()


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, SPEC.num_experts, generator=generator).softmax(-1).topk(SPEC.top_k)
    return torch.randn(tokens, SPEC.hidden_size, generator=generator).bfloat16(), ids, weights


def outputs(engine: Engine) -> list[torch.Tensor]:
    return [engine.moe(layer, *routing(40)) for layer in SPEC.moe_layers]


def close_enough(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Other lanes round elsewhere: the bound of tests/unit/test_engine_moe.py, loosely."""
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=2.0**-5, atol=2.0**-5) for a, b in pairs)


class Small(SimulatedDevice):
    """A simulated accelerator with room for so many experts."""

    rooms = 2
    free: int | None = None

    def room(self, form: Any) -> UnpackedExpert:
        if self.rooms == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")
        self.rooms -= 1
        return super().room(form)

    def free_bytes(self) -> int | None:
        # Every resident that is given up frees one expert's worth.
        if self.free is not None:
            self.free += SPEC.expert_bytes
        return self.free


def small(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    kind = type("Small", (Small,), changes)
    monkeypatch.setattr("fiddler_runtime.engine.open_device", lambda _: kind())


def test_residents_that_find_no_room_run_elsewhere_and_it_is_said(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    with Engine(plan, ExpertWeights.random()) as engine:
        expected, planned = outputs(engine), engine.describe()["resident_experts"]
    small(monkeypatch)
    with pytest.warns(FiddlerWarning, match=f"{planned - 2} of {planned} resident experts of small were given up"):
        engine = Engine(plan, ExpertWeights.random())
    with engine:
        assert engine.describe()["resident_experts"] == 2
        assert close_enough(outputs(engine), expected)
        assert engine.counters()["expert_calls"]["resident"] > 0


def test_the_least_popular_are_given_up(plan: Plan):
    resident = np.ones((2, 3), np.bool_)
    resident[0, 1] = False
    popularity = np.array([[0.3, 0.9, 0.1], [0.5, 0.2, 0.3]], np.float32)
    assert residents.by_popularity(resident, popularity) == [(1, 0), (0, 0), (1, 2), (1, 1), (0, 2)]
    with Small() as device, pytest.warns(FiddlerWarning, match="3 of 5 resident experts"):
        assert list(residents.reserve(SPEC, resident, popularity, device)) == [(1, 0), (0, 0)]


def test_memory_that_the_model_needs_later_stays_free(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch, rooms=99, free=0)
    items = (MemoryItem("non-expert weights", 1 << 40), MemoryItem("KV cache (1 x 128 tokens)", 2 * SPEC.expert_bytes))
    object.__setattr__(plan.header, "memory", items)
    try:
        with pytest.warns(FiddlerWarning, match="1 of 4 resident experts"):
            Engine(plan, ExpertWeights.random(), whole_model=True).close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Engine(plan, ExpertWeights.random()).close()  # a program that uses the engine knows what else it needs
    finally:
        object.__setattr__(plan.header, "memory", ())


def test_what_is_needed_later_is_named_as_the_compiler_names_it():
    options = ir.Options("balanced", 128, 1, 1 << 30)
    spec = runtime_samples.small_spec(expanded_bytes_per_token=8)
    items = placement.count_memory(spec, options, prefetching=True).items
    later = [item.item for item in items if item.item.startswith(residents._LATER)]
    assert [name.split(" (")[0] for name in later] == ["KV cache", "activations", "keys and values of a layer"]


def test_without_another_lane_too_little_memory_is_an_error(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch)
    with pytest.raises(FiddlerError, match="not enough accelerator memory for small: found room for 2 of 12 experts"):
        Engine(plan, ExpertWeights.random(), strategies=("resident",))


def test_staging_that_finds_no_room_is_an_error(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> Held:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(GeneratedKernels, "slot", refuse)
    with pytest.raises(FiddlerError, match="not enough accelerator memory to stream experts of small"):
        Engine(plan, ExpertWeights.random())


def refusals(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The accelerator's next `count` layers find no memory for their work."""
    left = [count]
    run = accelerator.AcceleratorLanes._run_resident

    def refuse(*args: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        run(*args)

    monkeypatch.setattr(accelerator.AcceleratorLanes, "_run_resident", refuse)


def test_a_layer_without_memory_takes_that_of_residents(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    with Engine(plan, ExpertWeights.random()) as engine:
        expected, before = outputs(engine), engine.describe()
        engine.reset_counters()
        refusals(monkeypatch, 2)
        with pytest.warns(
            FiddlerWarning, match="2 of 4 resident experts of small were given up, the least popular first"
        ):
            found = outputs(engine)
        assert close_enough(found, expected)
        after = engine.describe()
        assert after["resident_experts"] == before["resident_experts"] - 2
        assert after["resident_bytes"] + 2 * SPEC.expert_bytes == before["resident_bytes"]
        assert engine.counters()["layers"] == len(SPEC.moe_layers), "a layer that was tried again is one layer"
        assert close_enough(outputs(engine), expected)


def test_captured_steps_are_captured_again_without_the_resident(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    with Engine(plan, ExpertWeights.random(), strategies=("resident", "cpu")) as engine:
        hidden, ids, weights = routing(1)
        with engine.captured() as first:
            captured = first.capture(1, lambda: engine.moe(LAYER, hidden, ids, weights))
        expected = captured.graph.result.clone()
        refusals(monkeypatch, 1)
        with pytest.warns(FiddlerWarning, match="1 of 4 resident experts"):
            engine.moe(LAYER, *routing(40))
        with engine.captured() as second:
            assert second is not first
            found = second.capture(1, lambda: engine.moe(LAYER, hidden, ids, weights)).graph.result
        assert torch.allclose(found.float(), expected.float(), rtol=2.0**-6, atol=2.0**-6)


def test_a_layer_that_nothing_helps_is_an_error(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    with Engine(plan, ExpertWeights.random(), strategies=("resident",)) as engine:
        refusals(monkeypatch, 1)
        with pytest.raises(
            FiddlerError, match="memory does not suffice for a layer: found 40 tokens, 12 resident experts"
        ):
            engine.moe(LAYER, *routing(40))
        engine.moe(LAYER, *routing(40))


@pytest.mark.parametrize("unit", [64, 4096, 6144, 100_000 * 64])
def test_pieces_part_neither_units_nor_pages(unit: int):
    memory = torch.empty(24_576_000, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 4096 :]
    pieces: list[tuple[int, int]] = []
    pin = pinning.lock(memory, unit, lambda *piece: pieces.append(piece), lambda _: None, piece_bytes=1 << 20)
    assert pin.bytes == memory.nbytes == sum(nbytes for _, nbytes in pieces)
    start = memory.data_ptr()
    for address, _ in pieces:
        assert address == start + sum(nbytes for at, nbytes in pieces if at < address)
        assert (address - start) % unit == 0
        assert address % 4096 == 0
    assert len(pieces) > 1 or unit > 1 << 20


def pin_by(fake: FakeDriver, interrupted: int | None = None) -> Any:
    """SimulatedDevice.pin through the driver's functions; the call of that number is interrupted."""
    calls = iter(range(1000))

    def pin(self: SimulatedDevice, tensor: torch.Tensor, *, unit_bytes: int | None = None, mapped: bool = False) -> Any:
        if next(calls) == interrupted:
            raise KeyboardInterrupt
        unit = unit_bytes or tensor.nbytes
        return pinning.lock(tensor, unit, fake.driver.register, fake.driver.unregister, piece_bytes=unit)

    return pin


@pytest.mark.parametrize("when", ["pinning", "laying out", "nobody closes it"])
def test_locked_memory_is_given_back(plan: Plan, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, when: str):
    monkeypatch.setattr(SimulatedDevice, "pin", pin_by(fake, 1 if when == "pinning" else None))
    if when == "laying out":
        monkeypatch.setattr(engine_module, "AcceleratorLanes", lambda *_: fail())
    if when == "nobody closes it":
        engine = Engine(plan, ExpertWeights.random())
        assert fake.native.fake_registered() > 0
        del engine
        gc.collect()
    else:
        with pytest.raises((KeyboardInterrupt, FiddlerError)) as raised:
            Engine(plan, ExpertWeights.random())
        assert raised.tb is not None  # whose frames hold the memory
    assert fake.native.fake_registered() == 0


def fail() -> None:
    raise torch.OutOfMemoryError("full\nmore")


def test_memory_that_may_not_be_locked_is_copied_all_the_same(plan: Plan, fake: FakeDriver, monkeypatch):
    """Through the driver's functions: the first layer's experts are locked, the second's are not."""
    with Engine(plan, ExpertWeights.random()) as engine:
        expected = outputs(engine)
    monkeypatch.setattr(SimulatedDevice, "pin", pin_by(fake))
    fake.native.fake_lock_limit(5 * SPEC.expert.packed_bytes)
    with pytest.warns(FiddlerWarning, match=r"only .* KiB of .* KiB of packed experts of small could be locked"):
        engine = Engine(plan, ExpertWeights.random())
    with engine:
        assert fake.native.fake_registered() > 0
        assert close_enough(outputs(engine), expected)


def test_host_buffers_are_kept_and_grow():
    made: list[int] = []

    def make(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    buffers = HostBuffers(make)
    a = buffers.take("ids", (4, 2), torch.int64)
    assert (a.shape, a.dtype) == (torch.Size([4, 2]), torch.int64)
    assert buffers.take("ids", (2, 2), torch.float32).data_ptr() == a.data_ptr()
    assert buffers.take("other", (4, 2), torch.int64).data_ptr() != a.data_ptr()
    grown = buffers.take("ids", (40, 2), torch.int64)
    assert buffers.take("ids", (48, 2), torch.int64).data_ptr() == grown.data_ptr() != a.data_ptr()
    assert len(made) == 3


def test_residents_are_no_reason_not_to_begin():
    """They can be given up; what else the accelerator has to hold cannot."""
    needs = (Need("accelerator memory", "4 resident experts", 400), Need("accelerator memory", "staging", 100))
    for free, optional, refused in ((100, 400, False), (99, 400, True), (100, 0, True)):
        survey = Preflight("small", needs, {"accelerator memory": free}, 0, 0, optional)
        if refused:
            with pytest.raises(FiddlerError, match="not enough accelerator memory for small"):
                survey.check()
        else:
            survey.check()
