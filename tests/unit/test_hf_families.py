"""Models of every supported family with random weights: loaded without their experts, run through a plan."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import runtime_samples
import torch

from fiddler_runtime import hf
from fiddler_runtime.errors import FiddlerError
from fiddlerc import frontend

pytestmark = pytest.mark.slow

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16},
    "Phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{request.param}Config")(**{**COMMON, **FAMILIES[request.param]})
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # As initialised, experts are too small for their share to be seen in the logits.
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    spec = frontend.load_model(str(checkpoint))
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "plan", spec)


def stored(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def typical(difference: torch.Tensor) -> float:
    """The median over tokens of the rms over the vocabulary.

    Not the mean: routers with random weights choose nearly at random, and a token for which rounding tips the choice is
    off by more than all others together, in transformers' own bf16 run as in ours.
    """
    return float(difference.square().mean(-1).sqrt().median())


def test_logits_and_text_are_transformers_own(checkpoint: Path, plan, capfd: pytest.CaptureFixture[str]):
    reference = stored(checkpoint)
    capfd.readouterr()
    model = hf.load(checkpoint, plan, dtype=torch.float32)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""
    ids = torch.arange(3, 93).view(2, 45)
    with torch.no_grad():
        expected, found = reference(ids).logits, model(ids).logits
        rounded = reference.bfloat16()(ids).logits
        for module in reference.modules():
            if hasattr(module, "is_concatenated"):
                module.down_proj.zero_()
        without = reference.float()(ids).logits
    # Only the experts compute in bf16, so the error is less than where everything does. What the experts contribute at
    # all is far more than either: a swapped matrix, expert or layer would show.
    error, contribution = typical(found - expected), typical(without - expected)
    assert error <= typical(rounded.float() - expected)
    assert error <= 0.1 * contribution
    calls = model.fiddler.counters()["expert_calls"]
    assert all(calls[name] for name in ("resident", "streamed", "cpu")), "all three strategies ran"
    text = model.generate(ids[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=4, num_beams=2, do_sample=False)
    assert text.shape[1] <= 9
    model.fiddler.close()


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
    with pytest.raises(FiddlerError, match=r"pip install 'fiddlerc\[hf\]'"):
        hf.load(checkpoint, plan)
