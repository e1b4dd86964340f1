"""The demo model's decode steps captured, on the simulated device, against its plain path: the same tokens."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import runtime_samples
import torch
from fake_driver import FakeDriver

from fiddler_runtime import Engine, FiddlerError, FiddlerWarning, hf
from fiddler_runtime.captured.layers import CapturedLayers
from fiddler_runtime.dispatch import Dispatcher
from fiddlerc import frontend

pytestmark = pytest.mark.slow

MODEL = runtime_samples.TINY_MIXTRAL
NEW = 12
# Attention over a static cache adds in another order than over a growing one: near ties must not decide.
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The simulated accelerator has one: with another number, torch may add in another order in the plain path."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory):
    spec = frontend.load_model(str(MODEL))
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "tiny-mixtral", spec)


@pytest.fixture(scope="module")
def models(plan):
    """The same model twice, plain and captured, restricted to the strategies that captured steps know."""
    loaded = [hf.load(MODEL, plan, strategies=("resident", "cpu"), capture=capture) for capture in (False, True)]
    yield loaded
    for model in loaded:
        model.fiddler.close()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)("The module is", return_tensors="pt")["input_ids"]


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        ).tolist()


@pytest.mark.parametrize("beams", [1, 4, 16])
def test_captured_steps_give_the_plain_paths_tokens(models, prompt: torch.Tensor, beams: int):
    plain, captured = models
    expected = generate(plain, prompt, num_beams=beams, **STATIC)
    before = copy.copy(captured.captured.steps)
    for _ in range(2):  # a second text has a cache of its own, and the first one's captured step
        assert generate(captured, prompt, num_beams=beams) == expected
    steps = captured.captured.steps - before
    assert steps["captured"] == 1
    assert steps["plain"] == 1, "the first step of its shape"
    assert steps["replayed"] == 2 * (NEW - 1) - 2
    assert not captured.captured.reasons
    counters = captured.fiddler.counters()["phases"]["decode"]
    assert counters["layers"] > 0


@pytest.mark.parametrize("way", ["flags", "functions"])
def test_through_a_driver_the_tokens_are_the_same(plan, models, prompt: torch.Tensor, tmp_path: Path, way: str):
    fake = FakeDriver(tmp_path)
    model = hf.load(MODEL, plan, strategies=("resident", "cpu"), capture=True)
    enter_through(model.fiddler, fake, way)
    assert generate(model, prompt, num_beams=4) == generate(models[0], prompt, num_beams=4, **STATIC)
    assert model.captured.steps["replayed"] == NEW - 3
    model.fiddler.close()
    assert fake.native.fake_registered() == 0
    fake.close()


def enter_through(engine: Engine, fake: FakeDriver, way: str, stall_ms: int = 30_000) -> None:
    decided = Dispatcher(engine._library, engine._tables, engine.spec.num_experts, allow=("resident", "cpu"))
    engine._captured = CapturedLayers(
        engine.spec.hidden_size,
        engine.spec.top_k,
        engine._device,
        engine._store,
        engine._kernels,
        decided,
        engine._lanes,
        entry=getattr(fake, way)(),
        stall_ms=stall_ms,
    )


def test_inference_mode_and_sampling(models, prompt: torch.Tensor):
    plain, captured = models
    texts = []
    for model in models:
        torch.manual_seed(5)
        with torch.inference_mode():
            out = model.generate(
                prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, pad_token_id=0, **STATIC
            )
        texts.append(out.tolist())
    assert texts[0] == texts[1]
    assert generate(captured, prompt) == generate(plain, prompt, **STATIC), "and then without inference mode again"


def test_a_result_that_is_kept_stays_what_it_was(models, prompt: torch.Tensor):
    captured = models[1]
    with torch.no_grad():
        out = captured.generate(
            prompt, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )
    kept = [logits.clone() for logits in out.logits]
    generate(captured, prompt)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, kept, strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": None}, "the cache is a DynamicCache, and not a static one"),
        ({"num_beams": 17}, "17 tokens a step, of at most 16"),
    ],
)
def test_what_is_not_captured_runs_and_says_why(models, prompt: torch.Tensor, options: dict, reason: str):
    plain, captured = models
    before = captured.captured.steps["plain"]
    with pytest.warns(FiddlerWarning, match=f"decode steps are not captured: {reason}"):
        found = generate(captured, prompt, **options)
    assert found == generate(plain, prompt, **{**STATIC, **options})
    assert captured.captured.steps["plain"] == before + NEW - 1
    with warnings.catch_warnings():
        # Not of drift, which a busy machine may show: the sample plan's latencies are made up.
        warnings.filterwarnings("error", "decode steps are not captured")
        generate(captured, prompt, **options)  # once is enough


def test_after_a_step_that_was_given_up_texts_take_the_plain_path(plan, models, prompt: torch.Tensor, tmp_path: Path):
    fake = FakeDriver(tmp_path)
    model = hf.load(MODEL, plan, strategies=("resident", "cpu"), capture=True)
    enter_through(model.fiddler, fake, "flags", stall_ms=1500)
    fake.native.fake_deaf(1)
    with pytest.raises(FiddlerError, match="made no progress and was given up"):
        generate(model, prompt)
    with pytest.warns(FiddlerWarning, match="decode steps are not captured: cannot run a captured step"):
        assert generate(model, prompt) == generate(models[0], prompt, **STATIC)
    model.fiddler.close()
    fake.close()


def test_a_forward_that_looks_at_values_runs_plain(plan, models, prompt: torch.Tensor):
    """Attention that reads a position on the host in each step, as some models' does."""
    model = hf.load(MODEL, plan, strategies=("resident", "cpu"), capture=True)
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(int(kwargs["position_ids"][0, 0]))

    model.model.layers[2].register_forward_pre_hook(look, with_kwargs=True)
    with pytest.warns(
        FiddlerWarning, match="decode steps are not captured: this cannot be captured: it looks at a value"
    ):
        found = generate(model, prompt, num_beams=2)
    assert found == generate(models[0], prompt, num_beams=2, **STATIC), "the step that failed left nothing in the cache"
    assert model.captured.steps["captured"] == 0
    assert seen[-1] == prompt.shape[1] + NEW - 2
    model.fiddler.close()


def test_a_cache_that_counts_in_python_runs_plain(plan, models, prompt: torch.Tensor):
    """Static sliding-window caches keep their length in Python: a replay would not count on."""
    model = hf.load(MODEL, plan, strategies=("resident", "cpu"), capture=True)
    plain = models[0]
    for each in (model, plain):
        each.config.sliding_window = 8
    try:
        with pytest.warns(FiddlerWarning, match="decode steps are not captured: the cache counts in Python"):
            found = generate(model, prompt)
        assert found == generate(plain, prompt, **STATIC)
        assert model.captured.steps["replayed"] == 0
    finally:
        plain.config.sliding_window = None
        model.fiddler.close()
