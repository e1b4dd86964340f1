"""Models of every family with random weights: compiled to a plan, loaded without their experts, run on every lane.

Held against transformers' eager run in fp32. tests/unit/test_models_document.py writes down which families pass.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runtime_samples
import torch
from golden_type import Golden
from tiny_families import DISCOVERED, FAMILIES, edit_config, save_family

from fiddler_runtime import Engine, ExpertWeights, hf, load_plan
from fiddler_runtime.errors import FiddlerError, FiddlerWarning, install
from fiddler_runtime.plan import Feature
from fiddlerc import frontend, pipeline

pytestmark = pytest.mark.slow

LANES = {
    "mixed": None,
    "cpu": ("cpu",),
    "resident": ("resident",),
    "streamed": ("streamed",),
    "split": ("streamed", "cpu"),  # where both are permitted, the plans below part experts between them
}
SPLIT = Feature("split", True, 0.1, 0.1, 0.1)
# A family's own router, its own cache: one row of three is padded on the left.
IDS = torch.arange(3, 93).view(2, 45)
PROMPT = torch.arange(3, 63)[None] * 17


@dataclass(frozen=True)
class Family:
    """A saved model, transformers' own fp32 and bf16 logits for IDS, and what its experts were given and returned.

    passed  test -> lanes, for docs/models.md
    """

    name: str
    folder: Path
    reference: Any
    logits: torch.Tensor
    rounded: torch.Tensor
    without: torch.Tensor
    beams: torch.Tensor
    calls: list[tuple[torch.Tensor, ...]]
    passed: dict[str, list[str]] = field(default_factory=dict)


def is_experts(module: Any) -> bool:
    return hasattr(module, "is_concatenated")


@contextmanager
def watching(model: Any, which: Callable[[Any], bool], note: Callable[..., Any]) -> Iterator[None]:
    """note(hidden, ids, weights, output) after each call of such a module; what it returns takes the output's place."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        return note(*args, *kwargs.values(), output)

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in model.modules() if which(m)]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def stored(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def prepare(name: str, folder: Path) -> Family:
    save_family(name, folder)
    reference, calls = stored(folder), []
    with watching(reference, is_experts, lambda *call: calls.append(call)):
        logits = reference(IDS).logits
    with watching(reference, is_experts, lambda *call: torch.zeros_like(call[-1])):
        without = reference(IDS).logits
    with torch.no_grad():
        rounded = stored(folder).bfloat16()(IDS).logits.float()
        beams = reference.generate(PROMPT, max_new_tokens=5, do_sample=False, num_beams=3, pad_token_id=0)
    return Family(name, folder, reference, logits, rounded, without, beams, calls)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=(*FAMILIES, *DISCOVERED))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return prepare(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Without its experts; `on` gives it an engine."""
    plan = runtime_samples.write_sample_plan(
        tmp_path_factory.mktemp("plans") / "plan",
        frontend.load_model(str(family.folder)),
        features=(SPLIT,),
        speed_up=100,
        copy=32,
    )
    loaded = hf.load(family.folder, plan, dtype=torch.float32, strategies=("cpu",))
    loaded.fiddler.close()
    yield loaded


@contextmanager
def on(model: Any, family: Family, lane: str) -> Iterator[Any]:
    with Engine(model.fiddler.plan, ExpertWeights.load(family.folder), strategies=LANES[lane], threads=1) as engine:
        for module in model.modules():
            if isinstance(module, hf.PlannedExperts):
                module.engine = engine
        before, model.fiddler = model.fiddler, engine
        yield engine
        model.fiddler = before


def typical(difference: torch.Tensor) -> float:
    """The median over tokens of the rms over the vocabulary.

    Not the mean: a token for which rounding tips a router's choice is off by more than all others together, in
    transformers' own bf16 run as in ours.
    """
    return float(difference.square().mean(-1).sqrt().median())


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize("lane", LANES)
def test_every_layer_chooses_and_computes_as_transformers_does(model: Any, family: Family, lane: str):
    """Each layer of ours is given what transformers' was: the choices are the same bits, the results within bf16."""
    expected = iter(family.calls)

    def note(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        theirs = next(expected)
        assert torch.equal(ids, theirs[1])
        assert torch.equal(hidden, theirs[0])
        assert torch.equal(weights, theirs[2])
        # Inputs, two products, the activation's parts and the result are rounded to bf16: 2^-8 of each at most, and the
        # errors are independent. At most 2^-7.6 of the whole was seen.
        assert rms(output - theirs[3]) <= 2.0**-7 * rms(theirs[3])
        return theirs[3]  # so that the next layer starts from the same bits

    with on(model, family, lane) as engine:
        with watching(model, lambda m: isinstance(m, hf.PlannedExperts), note):
            assert torch.equal(model(IDS).logits, family.logits)
        calls = engine.counters()["expert_calls"]
    assert next(expected, None) is None
    ran = {name for name, count in calls.items() if count}
    assert ran - {"split"} == set(engine.strategies), "these lanes ran, and no other"
    assert lane != "split" or "split" in ran
    family.passed.setdefault("layers", []).append(lane)


@pytest.mark.parametrize("lane", LANES)
def test_logits_and_text_are_transformers_own(model: Any, family: Family, lane: str):
    with on(model, family, lane) as engine, torch.no_grad():
        found = model(IDS).logits
        engine.reset_counters()
        greedy = model.generate(PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0)
        beams = model.generate(PROMPT, max_new_tokens=5, do_sample=False, num_beams=3, pad_token_id=0)
        assert lane != "split" or engine.counters()["expert_calls"]["split"] > 0
        same = model(greedy[:, :-1]).logits
        expected = family.reference(greedy[:, :-1]).logits
    # Only the experts compute in bf16, so the error is less than where everything does, and far below what they add.
    error = typical(found - family.logits)
    assert error <= typical(family.rounded - family.logits)
    assert error <= 0.1 * typical(family.without - family.logits)
    # A greedy token may be another one only where theirs was better by less than twice the error of a logit.
    chosen = greedy[0, PROMPT.shape[1] :]
    scores = expected[0, PROMPT.shape[1] - 1 :]
    behind = scores.max(-1).values - scores.gather(1, chosen[:, None])[:, 0]
    off = (same - expected)[0, PROMPT.shape[1] - 1 :].abs().amax(-1)
    assert (behind <= 2 * off + 1e-6).all()
    # Likewise a beam's score, in which each token counts with its own error (and the softmax's, as much again).
    ours, best = (score(family.reference, text) for text in (beams, family.beams))
    assert ours >= best - 4 * beams.shape[1] * float(off.max())
    family.passed.setdefault("text", []).append(lane)


def score(reference: Any, text: torch.Tensor) -> float:
    """The log-probability of what follows PROMPT, by transformers in fp32, over its length as beam search counts it."""
    with torch.no_grad():
        steps = reference(text[:, :-1]).logits.log_softmax(-1).gather(2, text[:, 1:, None])[0, PROMPT.shape[1] - 1 :, 0]
    return float(steps.sum()) / (text.shape[1] - PROMPT.shape[1])


def test_cache_sizes_are_those_of_transformers_own_cache(family: Family):
    """In bytes of bf16, short of and beyond the window; fixed states are kept in fp32 by this fp32 model."""
    spec = frontend.load_model(str(family.folder))
    for tokens in (5, 45):
        with torch.no_grad():
            cache = family.reference(IDS[:1, :tokens], use_cache=True).past_key_values
        held = sum(t.nbytes for layer in cache.layers for t in tensors_of(vars(layer))) // 2
        kept = min(tokens, spec.window)
        # transformers keeps window - 1 tokens between two steps, and the window in them.
        least = spec.cache_bytes(tokens) - spec.state_bytes - (kept == spec.window) * spec.window_kv_bytes_per_token
        assert least <= held <= spec.cache_bytes(tokens)
    family.passed["cache"] = []


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def test_a_compiled_plan_runs(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """compile, plan, generate: as on the command line, on a measured machine."""
    request = pipeline.CompileRequest(
        str(family.folder),
        "epyc-zen5-2c",
        tmp_path / "plan",
        gpu_memory_bytes=8 << 20,
        context=64,
        isas=runtime_samples.ISAS,
    )
    monkeypatch.setattr(pipeline.report, "render", lambda inputs: b"")  # most of the time; it has tests of its own
    compiled = pipeline.compile_plan(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)  # another machine's latencies
        plan = load_plan(compiled.plan.path)
    assert plan.header.placement.resident_experts > 0
    assert plan.header.kernels.expert == plan.header.model.expert
    model = hf.load(family.folder, plan, dtype=torch.float32, threads=1)
    with torch.no_grad():
        assert typical(model(IDS).logits - family.logits) <= typical(family.rounded - family.logits)
    assert model.generate(PROMPT, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= PROMPT.shape[1] + 3
    model.fiddler.close()
    family.passed["compiled"] = []


def test_what_passed_is_what_the_document_says(family: Family, golden: Golden, request: pytest.FixtureRequest):
    """docs/models.md is made from these files (tests/models_document.py). `make models` writes both."""
    if request.config.option.keyword and len(family.passed) < 4:
        pytest.skip("other tests of this family were not run")
    golden(f"families/{family.name}.json", json.dumps(family.passed) + "\n")


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path):
    folder = save_family("deepseek_v3", tmp_path / "model")
    edit_config(folder, model_type="kimi_k2")
    spec = frontend.load_model(str(folder))
    assert (spec.architecture, spec.identity["model_type"]) == ("DeepseekV3ForCausalLM", "kimi_k2")
    model = hf.load(folder, runtime_samples.write_sample_plan(tmp_path / "plan", spec), threads=1)
    assert model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] == PROMPT.shape[1] + 2
    model.fiddler.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


@pytest.fixture(scope="module")
def plan(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    spec = frontend.load_model(str(checkpoint))
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "plan", spec)


def test_transformers_global_state_is_left_alone(checkpoint: Path, plan):
    from transformers.utils import logging as theirs

    before = (
        theirs.get_verbosity(),
        theirs.is_progress_bar_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    with_handlers = list(logging.getLogger("transformers").handlers)
    hf.load(checkpoint, plan).fiddler.close()
    after = theirs.get_verbosity(), theirs.is_progress_bar_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    assert before == after
    assert with_handlers == logging.getLogger("transformers").handlers
    # The class itself is untouched: a model loaded without us has its experts.
    assert any(".experts." in name for name, _ in stored(checkpoint).named_parameters())


@pytest.fixture
def rewritten(checkpoint: Path, tmp_path: Path):
    """A copy of the checkpoint with some tensors left out or replaced."""
    from safetensors.torch import load_file, save_file

    def rewrite(change: Any) -> Path:
        tensors = load_file(checkpoint / "model.safetensors")
        change(tensors)
        folder = tmp_path / "changed"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "generation_config.json"):
            if (checkpoint / name).exists():
                (folder / name).write_bytes((checkpoint / name).read_bytes())
        return folder

    return rewrite


def test_a_missing_tensor_outside_the_experts_is_an_error(rewritten, plan):
    folder = rewritten(lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(FiddlerError, match=r"lacks tensors.*model\.layers\.1\.self_attn\.q_proj\.weight"):
        hf.load(folder, plan)


def test_a_tensor_of_another_shape_is_an_error(rewritten, plan):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    with pytest.raises(FiddlerError, match=r"another shape.*model\.norm\.weight"):
        hf.load(rewritten(shorten), plan)


def test_another_model_is_refused(rewritten, plan):
    folder = rewritten(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(FiddlerError, match="is not the plan's model"):
        hf.load(folder, plan)


def test_saving_is_refused(checkpoint: Path, plan, tmp_path: Path):
    model = hf.load(checkpoint, plan, strategies=("cpu",))
    with pytest.raises(FiddlerError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "copy")
    model.fiddler.close()


def test_without_transformers_the_error_says_what_to_install(checkpoint: Path, plan, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FiddlerError, match=re.escape(install("hf"))):
        hf.load(checkpoint, plan)
