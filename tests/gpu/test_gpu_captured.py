"""Captured steps on a GPU: both ways into the CPU lane, the watchdog, the demo model's tokens."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
from runtime_samples import TINY_MIXTRAL, small_spec, write_sample_plan

from fiddler_runtime import Engine, ExpertWeights, FiddlerError, FiddlerWarning, hf
from fiddler_runtime.captured import cuda
from fiddler_runtime.captured.entry import Entry, StreamFlags
from fiddler_runtime.captured.layers import CapturedLayers
from fiddler_runtime.dispatch import Dispatcher
from fiddler_runtime.lanes.driver import Driver
from fiddlerc import frontend

SPEC = small_spec()
WAYS = ("stream memory operations", "host functions")


def open_entry(way: str, where: torch.device) -> Entry:
    """That way, or a skip that says why this machine has it not."""
    if way == "host functions":

        class Without(Driver):
            def has_memory_operations(self, device: int) -> bool:
                return False

        patch = pytest.MonkeyPatch()
        patch.setattr(cuda, "Driver", Without)
        try:
            with pytest.warns(FiddlerWarning, match="host functions, which take longer"):
                return cuda.open_entry(where)
        finally:
            patch.undo()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        entry = cuda.open_entry(where)
    if entry.name != way:
        pytest.skip(str(told[-1].message))
    return entry


@pytest.fixture
def engine(tmp_path: Path):
    plan = write_sample_plan(tmp_path / "plan", SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        opened = Engine(plan, ExpertWeights.random(), device="cuda", strategies=("resident", "cpu"))
    yield opened
    opened.close()


def enter(engine: Engine, entry: Entry, stall_ms: int = 10_000) -> None:
    decided = Dispatcher(engine._library, engine._tables, SPEC.num_experts, allow=("resident", "cpu"))
    engine._captured = CapturedLayers(
        SPEC.hidden_size,
        SPEC.top_k,
        engine._device,
        engine._store,
        engine._kernels,
        decided,
        engine._lanes,
        entry=entry,
        stall_ms=stall_ms,
    )


class Step:
    """Two MoE layers with something in between, on tensors that stay where they are."""

    def __init__(self, engine: Engine, tokens: int, where: torch.device) -> None:
        self.engine = engine
        self.hidden = torch.zeros(tokens, SPEC.hidden_size, dtype=torch.bfloat16, device=where)
        self.logits = [torch.zeros(tokens, SPEC.num_experts, device=where) for _ in SPEC.moe_layers]

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in (self.hidden, *self.logits):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def __call__(self) -> torch.Tensor:
        hidden = self.hidden
        for layer, logits in zip(SPEC.moe_layers, self.logits, strict=True):
            weights, ids = logits.softmax(-1).topk(SPEC.top_k)
            hidden = hidden + self.engine.moe(layer, torch.tanh(hidden), ids, weights)
        return hidden


def test_which_way_this_machine_has(where: torch.device) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        print(f"captured steps enter the CPU lane through {cuda.open_entry(where).name}", *(w.message for w in told))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_replayed_steps_compute_what_the_plain_path_computes(
    engine: Engine, way: str, tokens: int, where: torch.device
) -> None:
    enter(engine, open_entry(way, where))
    step = Step(engine, tokens, where)
    step.fill(0)
    step()  # libraries are loaded outside the capture
    with engine.captured() as layers:
        captured = layers.capture(tokens, step)
    found, expected = [captured.graph.result.clone()], [step()]
    for seed in range(1, 100):
        step.fill(seed)
        with engine.captured() as layers:
            found.append(layers.replay(captured).clone())
        expected.append(step())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("way", WAYS)
def test_replays_take(engine: Engine, way: str, where: torch.device) -> None:
    """Printed, not judged: microseconds per layer of a captured step, and of the plain path."""
    enter(engine, open_entry(way, where))
    step = Step(engine, 1, where)
    step.fill(0)
    step()
    with engine.captured() as layers:
        captured = layers.capture(1, step)
        started = time.perf_counter()
        for _ in range(200):
            layers.replay(captured)
        taken = (time.perf_counter() - started) / 200 / len(SPEC.moe_layers)
    started = time.perf_counter()
    for _ in range(200):
        step()
    torch.cuda.synchronize()
    plain = (time.perf_counter() - started) / 200 / len(SPEC.moe_layers)
    print(f"{way}: {taken * 1e6:.1f} us a layer, plain path {plain * 1e6:.1f} us")


def test_a_stream_that_nobody_answers_is_let_go(engine: Engine, where: torch.device) -> None:
    """Without the polling thread the GPU would wait for ever: the watchdog opens the flag, and the GPU goes on."""
    entry = open_entry("stream memory operations", where)
    assert isinstance(entry, StreamFlags)
    entry.polled = False
    enter(engine, entry, stall_ms=500)
    step = Step(engine, 1, where)
    step.fill(0)
    expected = step()
    with pytest.raises(FiddlerError, match="made no progress and was given up"):  # noqa: SIM117
        with engine.captured() as layers:
            layers.capture(1, step)
    torch.testing.assert_close(step(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("beams", [1, 4, 16])
def test_the_demo_models_tokens_are_the_plain_paths(tmp_path: Path, beams: int) -> None:
    from transformers import AutoTokenizer

    plan = write_sample_plan(tmp_path / "plan", frontend.load_model(str(TINY_MIXTRAL)))
    prompt = AutoTokenizer.from_pretrained(TINY_MIXTRAL)("The module is", return_tensors="pt")["input_ids"]
    texts = []
    for capture in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FiddlerWarning)
            model = hf.load(TINY_MIXTRAL, plan, device="cuda", strategies=("resident", "cpu"), capture=capture)
        with torch.no_grad():
            given = prompt.to(model.device)
            options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
            cache = {"cache_implementation": "static", "disable_compile": True}
            texts.append(model.generate(given, num_beams=beams, **cache, **options).tolist())
        if capture:
            assert model.captured.steps == {"captured": 1, "replayed": 21, "plain": 1}, model.captured.reasons
        model.fiddler.close()
    assert texts[0] == texts[1]
