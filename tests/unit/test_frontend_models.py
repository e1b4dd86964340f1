"""Model directories and built-in names to specs, held against transformers' own models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_families import FAMILIES, TINY_MIXTRAL, edit_config, save_family

from fiddler_runtime.checkpoint import Checkpoint, check_identity, read_config
from fiddler_runtime.errors import FiddlerError
from fiddlerc.frontend import load_model, zoo, zoo_names
from fiddlerc.frontend.huggingface import describe


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model per family."""
    return {family: save_family(family, tmp_path_factory.mktemp("models") / family) for family in FAMILIES}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo model that a test may spoil."""
    return Path(shutil.copytree(TINY_MIXTRAL, tmp_path / "demo"))


def error_of(source: Path | str) -> FiddlerError:
    with pytest.raises(FiddlerError) as caught:
        load_model(str(source))
    return caught.value


def test_demo_model() -> None:
    spec = load_model(str(TINY_MIXTRAL))
    assert (spec.name, spec.architecture) == ("tiny-mixtral", "MixtralForCausalLM")
    assert (spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k) == (128, 256, 8, 2)
    assert spec.moe_layers == tuple(range(6))
    assert spec.kv_bytes_per_token == 2 * 6 * 2 * 32 * 2
    # Tied embeddings are in the file once, so the file tells what is not expert.
    tensors = Checkpoint.open(TINY_MIXTRAL).tensors
    assert spec.non_expert_bytes == sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_saved_model_is_accounted_for(families: dict[str, Path], family: str) -> None:
    folder = families[family]
    spec, sizes = describe(read_config(folder), name=family, where="config.json")
    wide = (spec.intermediate_size, spec.hidden_size)
    names = spec.expert_tensors
    expected = sizes.non_expert_tensors() | {
        pattern.format(layer=layer, expert=expert): shape
        for layer in spec.moe_layers
        for expert in range(spec.num_experts)
        for pattern, shape in ((names.gate, wide), (names.up, wide), (names.down, wide[::-1]))
    }
    assert {name: info.shape for name, info in Checkpoint.open(folder).tensors.items()} == expected
    assert load_model(str(folder)) == spec


def test_gate_up_and_down_are_not_mixed_up(families: dict[str, Path]) -> None:
    """transformers keeps [gate; up] in one tensor: the order on disk must be the one that the spec names."""
    import torch
    import transformers

    for family, folder in families.items():
        spec = load_model(str(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        checkpoint = Checkpoint.open(folder)
        layer, expert = spec.moe_layers[-1], spec.num_experts - 1
        experts = next(
            m for n, m in model.named_modules() if hasattr(m, "is_concatenated") and f".layers.{layer}." in n
        )
        gate, up = experts.gate_up_proj[expert].chunk(2)
        for pattern, weight in zip(
            (spec.expert_tensors.gate, spec.expert_tensors.up, spec.expert_tensors.down),
            (gate, up, experts.down_proj[expert]),
            strict=True,
        ):
            stored = torch.empty(weight.shape, dtype=torch.bfloat16)
            checkpoint.read_into(pattern.format(layer=layer, expert=expert), stored)
            assert torch.equal(stored, weight), (family, pattern)


def test_layers_without_experts(families: dict[str, Path]) -> None:
    assert load_model(str(families["qwen3_moe"])).moe_layers == (0, 2, 3)


def test_sparse_step(families: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(families["qwen3_moe"] / "config.json", tmp_path)
    edit_config(tmp_path, mlp_only_layers=[3], decoder_sparse_step=2)
    assert load_model(str(tmp_path)).moe_layers == (1,)
    edit_config(tmp_path, mlp_only_layers=[0, 1, 2, 3])
    assert "at least one layer with experts" in error_of(tmp_path).line


@pytest.mark.parametrize("name", zoo_names())
def test_built_in_models_have_the_sizes_that_transformers_gives_them(name: str) -> None:
    import torch
    import transformers

    spec = load_model(name)
    values = dict(zoo.entry_of(name)["config"])
    config = transformers.CONFIG_MAPPING[values.pop("model_type")](**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    assert spec.non_expert_bytes == 2 * others
    assert len(spec.moe_layers) * spec.num_experts * spec.expert_bytes == 2 * experts
    assert type(model).__name__ == spec.architecture


def test_built_in_sizes_as_published() -> None:
    """Hidden, intermediate, experts, top-k and layers as the models' papers and cards give them."""
    sizes = {
        name: (s.name, s.hidden_size, s.intermediate_size, s.num_experts, s.top_k, s.num_layers)
        for name in zoo_names()
        for s in (load_model(name),)
    }
    assert sizes == {
        "mixtral": ("mixtral-8x7b", 4096, 14336, 8, 2, 32),
        "mixtral-8x22b": ("mixtral-8x22b", 6144, 16384, 8, 2, 56),
        "olmoe": ("olmoe-1b-7b", 2048, 1024, 64, 8, 16),
        "phi-3.5-moe": ("phi-3.5-moe", 4096, 6400, 16, 2, 32),
        "qwen3-30b-a3b": ("qwen3-30b-a3b", 2048, 768, 128, 8, 48),
    }


def test_a_model_answers_to_its_own_name_too() -> None:
    assert load_model("mixtral-8x7b") == load_model("mixtral")


def test_a_directory_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY_MIXTRAL, tmp_path / "mixtral")
    monkeypatch.chdir(tmp_path)
    assert load_model("mixtral").hidden_size == 128


def test_a_directory_without_weights_is_as_good_as_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-mixtral"
    folder.mkdir()
    shutil.copy(TINY_MIXTRAL / "config.json", folder)
    assert load_model(str(folder)) == load_model(str(TINY_MIXTRAL))


def test_name_from_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY_MIXTRAL)
    assert load_model(".").name == "tiny-mixtral"


def test_a_plan_of_a_built_in_name_accepts_both_spellings_of_the_experts_key(tmp_path: Path) -> None:
    """Published Qwen3-MoE configs say num_experts; transformers 5 writes num_local_experts."""
    spec = load_model("qwen3-30b-a3b")
    values = dict(zoo.entry_of("qwen3-30b-a3b")["config"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    check_identity(spec, tmp_path)
    edit_config(tmp_path, num_experts=..., num_local_experts=128)
    check_identity(spec, tmp_path)
    assert load_model(str(tmp_path)).fingerprint == spec.fingerprint
    edit_config(tmp_path, num_local_experts=64)
    with pytest.raises(FiddlerError, match="found num_experts = 64, expected num_experts = 128"):
        check_identity(spec, tmp_path)


def test_fine_tunes_with_another_vocabulary_run_with_the_plan(demo: Path) -> None:
    spec = load_model(str(demo))
    edit_config(demo, vocab_size=4096, max_position_embeddings=2048)
    check_identity(spec, demo)


def test_fingerprint_is_of_the_architecture_not_of_the_name(demo: Path) -> None:
    assert load_model(str(demo)).fingerprint == load_model(str(TINY_MIXTRAL)).fingerprint
    assert load_model("mixtral").fingerprint != load_model("mixtral-8x22b").fingerprint


def test_unknown_name_lists_the_known_ones() -> None:
    error = error_of("mixtral-9x9b")
    assert error.what == "no such model directory or built-in name"
    assert all(name in str(error.expected) for name in zoo_names())


def test_onnx_is_refused_by_name(tmp_path: Path) -> None:
    error = error_of(tmp_path / "model.onnx")
    assert error.found == "an ONNX file"
    assert "config.json" in str(error.expected)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert error_of(tmp_path / "weights.gguf").found == "a file"
    (tmp_path / "config.json").write_text("{}")
    assert f"fiddlerc compile {tmp_path}" in str(error_of(tmp_path / "model.onnx").hint)


def test_directory_without_config(tmp_path: Path) -> None:
    error = error_of(tmp_path)
    assert "not a Hugging Face model directory" in error.what
    assert error.hint is not None and "download" in error.hint


@pytest.mark.parametrize("text", ["", "{", "[1]", '"mixtral"', "\xff"])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in error_of(tmp_path).what


def test_unknown_architecture_lists_the_known_ones(demo: Path) -> None:
    edit_config(demo, model_type="dbrx")
    error = error_of(demo)
    assert "unknown architecture" in error.what
    assert error.found == "model_type dbrx"
    assert error.expected == "one of mixtral, phimoe, olmoe, qwen3_moe"


def test_a_classifier_is_not_a_language_model(demo: Path) -> None:
    edit_config(demo, architectures=["MixtralForSequenceClassification"])
    assert "MixtralForCausalLM" in str(error_of(demo).expected)


@pytest.mark.parametrize("key", [
    "model_type", "hidden_act", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "num_local_experts", "num_experts_per_tok", "vocab_size", "intermediate_size", "max_position_embeddings",
])  # fmt: skip
def test_missing_key(demo: Path, key: str) -> None:
    edit_config(demo, **{key: ...})
    error = error_of(demo)
    assert "lacks a key" in error.what
    assert error.found == f"no {key}"


@pytest.mark.parametrize("changes", [
    {"hidden_size": "128"}, {"hidden_size": 0}, {"hidden_size": -1}, {"hidden_size": True}, {"hidden_size": 1.5},
    {"hidden_size": 2**40}, {"num_experts_per_tok": 9}, {"hidden_act": "gelu"}, {"hidden_act": 1}, {"head_dim": 0},
    {"tie_word_embeddings": 1}, {"head_dim": None, "num_attention_heads": 3},
    {"architectures": "MixtralForCausalLM"}, {"quantization_config": {"quant_method": "fp8"}},
])  # fmt: skip
def test_wrong_values(demo: Path, changes: dict[str, Any]) -> None:
    edit_config(demo, **changes)
    error = error_of(demo)
    key = next(reversed(changes))
    assert key in error.line
    assert error.expected is not None


def test_null_key_value_heads_means_one_per_query_head(demo: Path) -> None:
    before = load_model(str(demo)).kv_bytes_per_token
    (demo / "model.safetensors").unlink()
    edit_config(demo, num_key_value_heads=None)
    assert load_model(str(demo)).kv_bytes_per_token == 2 * before


def test_unused_keys_may_be_anything(demo: Path) -> None:
    edit_config(demo, rope_scaling={"x": [None]}, mlp_only_layers="no such thing in Mixtral", comment=3)
    assert load_model(str(demo)).hidden_size == 128


def test_half_a_checkpoint_names_what_is_missing(demo: Path) -> None:
    edit_config(demo, num_hidden_layers=7)
    error = error_of(demo)
    assert "incomplete" in error.what
    assert error.found == "no tensor model.layers.6.block_sparse_moe.experts.0.w1.weight and 23 more"


def test_missing_part_that_is_not_an_expert(demo: Path) -> None:
    edit_config(demo, tie_word_embeddings=False)
    assert error_of(demo).found == "no tensor lm_head.weight"


def test_config_and_weights_disagree(demo: Path) -> None:
    edit_config(demo, intermediate_size=128)
    error = error_of(demo)
    assert "does not fit its config.json" in error.what
    assert error.found == "model.layers.0.block_sparse_moe.experts.0.w1.weight of shape [256, 128]"


def test_fp16_and_sharded_checkpoints_are_fine(tmp_path: Path) -> None:
    folder = save_family("mixtral", tmp_path / "m", dtype="float16", shards="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert load_model(str(folder)).num_experts == 6
