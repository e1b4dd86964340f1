"""The CUDA lanes on a torch.cuda of the tests' own (tests/fake_cuda.py): calls and their order, not a GPU."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import fake_cuda
import pytest
import runtime_samples
import torch
from fake_cuda import FakeCuda
from fake_driver import CALLS, WAITS, WRITES, FakeDriver

from fiddler_runtime import Engine, ExpertWeights, FiddlerWarning
from fiddler_runtime import engine as engine_module
from fiddler_runtime.captured.entry import StreamFlags
from fiddler_runtime.lanes.device import CannotCapture, Device, open_device
from fiddler_runtime.lanes.driver import Driver
from fiddler_runtime.lanes.kernel_choice import DEFAULT
from fiddler_runtime.lanes.resident_kernels import ExpertKernels
from fiddler_runtime.plan import MemoryItem

SPEC = runtime_samples.small_spec()
LAYER = SPEC.moe_layers[0]


@pytest.fixture
def fake(tmp_path: Path):
    opened = FakeDriver(tmp_path)
    yield opened
    assert opened.native.fake_registered() == 0, "memory was left registered"
    opened.close()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, fake: FakeDriver) -> FakeCuda:
    return fake_cuda.install(monkeypatch, fake)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory):
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "plan", SPEC)


def open_engine(plan, **options) -> Engine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never been run on a GPU", FiddlerWarning)
        return Engine(plan, ExpertWeights.random(), device="cuda", **options)


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, SPEC.num_experts, generator=generator).softmax(-1).topk(SPEC.top_k)
    return torch.randn(tokens, SPEC.hidden_size, generator=generator).bfloat16(), ids, weights


def test_opening_it_warns_that_no_gpu_has_run_it(cuda: FakeCuda):
    with pytest.warns(FiddlerWarning, match="never been run on a GPU by this project"):
        open_device("cuda").close()


@pytest.mark.parametrize("strategies", [None, ("resident",), ("streamed",), ("cpu", "streamed")])
@pytest.mark.parametrize("tokens", [1, 130])
def test_the_layers_are_what_the_simulated_device_computes(
    plan, cuda: FakeCuda, strategies, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as with_linears:
        with_linears.setattr(
            engine_module,
            "kernels_on",
            lambda device, library, isa: ExpertKernels(library.spec.expert, device.torch_device, DEFAULT),
        )
        with Engine(plan, ExpertWeights.random(), device="simulated", strategies=strategies) as engine:
            expected = [engine.moe(layer, *routing(tokens)) for layer in SPEC.moe_layers]
    with open_engine(plan, strategies=strategies) as engine:
        assert engine.describe()["device"] == "cuda"
        for _ in range(2):  # buffers are used again
            assert all(
                torch.equal(engine.moe(layer, *routing(tokens)), out)
                for layer, out in zip(SPEC.moe_layers, expected, strict=True)
            )
        if strategies != ("resident",):
            assert cuda.fake.native.fake_registered() > 0, "packed experts are locked"


def test_a_result_is_not_overwritten_by_the_next_layer(plan, cuda: FakeCuda):
    with open_engine(plan, strategies=("resident", "cpu")) as engine:
        hidden, ids, weights = routing(3)
        out = engine.moe(LAYER, hidden.float(), ids, weights)
        before = out.clone()
        engine.moe(LAYER, -hidden.float(), ids, weights)
        assert torch.equal(out, before)


def test_the_queue_waits_for_the_caller_and_the_caller_for_the_queue(plan, cuda: FakeCuda):
    with open_engine(plan, strategies=("resident", "streamed")) as engine:
        compute, copies = cuda.streams[0].number, cuda.streams[1].number
        at = len(cuda.log)
        engine.moe(LAYER, *routing(130))
        log = cuda.log[at:]
        recorded = {entry[1]: entry[2] for entry in cuda.log if entry[0] == "record"}
    caller = next(entry[1] for entry in log if entry[0] == "follow")
    before = next(i for i, entry in enumerate(log) if entry[0] == "wait" and entry[1] == compute)
    assert recorded[log[before][2]] == caller, "the compute stream starts after what the caller's stream was given"
    assert log[-1][:1] == ("follow",) and log[-1] == ("follow", caller, compute), "and the caller's goes on after it"
    arrivals = [entry for entry in log if entry[0] == "wait" and entry[1] == compute and recorded[entry[2]] == copies]
    reuses = [entry for entry in log if entry[0] == "wait" and entry[1] == copies]
    assert len(arrivals) >= 3, "each streamed expert is waited for"
    assert len(reuses) == len(arrivals), "a slot is written only after what used its memory, and after each computation"
    assert all(recorded[entry[2]] == compute for entry in reuses)
    assert not [entry for entry in log if entry[0] == "synchronize"], "nothing waits for a whole stream"


def test_routing_comes_first_and_few_tokens_with_it(plan, cuda: FakeCuda):
    """Ids, weights and rows travel in one go; of many tokens the rows only after the accelerator has its work."""
    with open_engine(plan, strategies=("resident", "cpu")) as engine:
        for tokens, early in ((1, True), (130, False)):
            cuda.log.clear()
            engine.moe(LAYER, *routing(tokens))
            kinds = [entry[0] for entry in cuda.log]
            assert kinds.index("arrived") == (3 if early else 2), "copies are recorded before the first is waited for"


def open_cuda() -> Device:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        return open_device("cuda")


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ValueError("wrong"), ValueError),
        # cuBLAS's memory is not torch's, and what it lacks comes as another error.
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
    ],
)
def test_the_caller_waits_for_the_queue_after_an_error_too(cuda: FakeCuda, raised: Exception, seen: type[Exception]):
    """What was launched before it still reads the caller's tensors."""

    def work() -> None:
        raise raised

    with open_cuda() as device:
        compute = cuda.streams[0].number
        future = device.submit(work)
        with pytest.raises(seen) as caught:
            device.join(future)
        assert caught.type is seen
        assert cuda.log[-1] == ("follow", torch.cuda.current_stream().number, compute)


def test_closing_waits_for_copies_before_their_memory_is_given_back(plan, cuda: FakeCuda, monkeypatch):
    undo = Driver.unregister
    monkeypatch.setattr(Driver, "unregister", lambda self, at: (cuda.log.append(("unregister",)), undo(self, at)))
    with open_engine(plan, strategies=("streamed",)) as engine:
        engine.moe(LAYER, *routing(3))
        assert ("unregister",) not in cuda.log
    assert cuda.log.index(("synchronize", cuda.streams[1].number)) < cuda.log.index(("unregister",))


@pytest.mark.parametrize("way", ["flags", "functions"])
def test_captured_steps_on_cuda(plan, cuda: FakeCuda, way: str):
    if way == "functions":
        cuda.fake.native.fake_memory_operations(0)
    hidden, ids, weights = routing(2)

    def step() -> torch.Tensor:
        out = hidden
        for layer in SPEC.moe_layers:
            out = out + engine.moe(layer, torch.tanh(out), ids, weights)
        return out

    with open_engine(plan, strategies=("resident", "cpu")) as engine:
        expected = step()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with engine.captured() as layers:
                captured = layers.capture(2, step)
        assert [str(w.message).partition(",")[0] for w in told] == (
            [] if way == "flags" else ["captured steps enter the CPU lane through host functions"]
        )
        found = [captured.graph.result.clone()]
        with engine.captured() as layers:
            found.append(layers.replay(captured).clone())
        counted = [cuda.fake.native.fake_calls(kind) for kind in (WRITES, WAITS, CALLS)]
        # Two runs of two layers; before them the probe's one layer.
        assert counted == ([2 * 3 + 1, 2 * 2 + 1, 0] if way == "flags" else [0, 0, 4])
    for out in found:
        assert torch.allclose(out.float(), expected.float(), rtol=2.0**-6, atol=2.0**-6)
    gc.collect()


@pytest.mark.slow
def test_a_gpu_that_does_not_see_flags_gets_host_functions(plan, cuda: FakeCuda):
    from fiddler_runtime.captured import cuda as module

    cuda.fake.native.fake_deaf(1)
    entry = StreamFlags(module.Driver(), lambda: cuda.fake.stream)
    assert module.probe(entry, fake_cuda.CPU) == "a captured write did not reach the host"
    cuda.fake.native.fake_deaf(0)
    cuda.refuse_capture = "operation not permitted when stream is capturing\nmore"
    assert module.probe(entry, fake_cuda.CPU) == "operation not permitted when stream is capturing"


def test_what_torch_refuses_to_capture_is_told(cuda: FakeCuda):
    device, before = open_cuda(), torch.cuda.current_stream()
    cuda.refuse_capture = "CUDA error: operation would make the legacy stream depend on a capturing stream\nmore"
    with (
        device,
        pytest.raises(CannotCapture, match="cannot be captured: found CUDA error: operation would make the legacy"),
    ):
        device.capture(lambda: 1)
    assert torch.cuda.current_stream() is before, "what follows goes where it went before"


def test_residents_are_given_up_for_what_the_model_needs(plan, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fiddler_runtime.engine.later", lambda _: [MemoryItem("KV cache", 2 << 40)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine = Engine(plan, ExpertWeights.random(), device="cuda", whole_model=True)
    assert any("4 of 4 resident experts of small were given up" in str(w.message) for w in told)
    with engine:
        assert ("empty_cache",) in cuda.log
        engine.moe(LAYER, *routing(3))
