"""Model directories and built-in names to specs, held against transformers' own models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_families import DISCOVERED, FAMILIES, TINY_MIXTRAL, edit_config, save_family

from fiddler_runtime.checkpoint import Checkpoint, check_identity, expert_shapes, read_config
from fiddler_runtime.errors import FiddlerError, FiddlerWarning, install
from fiddler_runtime.lanes.expert import UnpackedExpert, activate
from fiddler_runtime.weights import ExpertWeights
from fiddlerc.frontend import load_model, zoo, zoo_names
from fiddlerc.frontend.discovery import discover
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
    expected = sizes.non_expert_tensors() | expert_shapes(spec)
    assert {name: info.shape for name, info in Checkpoint.open(folder).tensors.items()} == expected
    assert load_model(str(folder)) == spec


def test_gate_up_and_down_are_not_mixed_up(families: dict[str, Path]) -> None:
    """What is read for one expert is what transformers computes with, whatever the order on disk."""
    import torch
    import transformers

    for family, folder in families.items():
        spec = load_model(str(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        weights = ExpertWeights.load(folder)
        weights.check(spec)
        layer, expert = spec.moe_layers[-1], spec.num_experts - 1
        experts = next(
            m for n, m in model.named_modules() if hasattr(m, "is_concatenated") and f".layers.{layer}." in n
        )
        read = UnpackedExpert.empty(spec.expert)
        weights.read(layer, expert, *read.matrices, read.biases)
        x = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
        gate, up = torch.nn.functional.linear(x, read.gate_up, read.gate_up_bias).chunk(2, dim=-1)
        inner = activate(spec.activation, gate, up)
        ours = torch.nn.functional.linear(inner, read.down, read.down_bias)
        experts.config._experts_implementation = "eager"
        with torch.no_grad():
            theirs = experts(x, torch.full((5, 1), expert), torch.ones(5, 1, dtype=torch.bfloat16))
        # Two orders of rounding the same sums to bf16.
        assert torch.allclose(ours, theirs, rtol=2.0**-5, atol=2.0**-5), family


def test_the_table_and_transformers_tell_the_same(families: dict[str, Path]) -> None:
    """A family's row against what is found out about it without one: shapes, names, order, activation, cache."""
    for family, folder in families.items():
        row = load_model(str(folder))
        found = discover(folder, read_config(folder), name=row.name)
        # Of the activations' memory both give a bound of their own.
        loose = {"workspace_bytes_per_token": row.workspace_bytes_per_token, "identity": row.identity}
        assert replace(found, **loose) == row, family
        assert row.workspace_bytes_per_token <= found.workspace_bytes_per_token
        assert row.identity.items() <= {**read_config(folder), **found.identity, **row.identity}.items()


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
    values["model_type"] = {"kimi_k2": "deepseek_v3"}.get(values["model_type"], values["model_type"])
    config = transformers.CONFIG_MAPPING[values.pop("model_type")](**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {id(t): (n, t.numel()) for n, t in model.state_dict(keep_vars=True).items()}.values()  # tied ones once
    experts = sum(size for n, size in tensors if ".experts." in n)
    others = sum(size for n, size in tensors if ".experts." not in n)
    assert spec.non_expert_bytes == 2 * others
    assert spec.total_experts * spec.expert_bytes == 2 * experts
    assert type(model).__name__ == spec.architecture


# In thousand millions, as the models' cards give them: total and active per token.
PUBLISHED = {
    "deepseek-v2": (236, 21),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v3": (671, 37),
    "glm-4.5": (355, 32),
    "glm-4.5-air": (106, 12),
    "gpt-oss-120b": (116.8, 5.1),
    "gpt-oss-20b": (20.9, 3.6),
    "granite-3.1-1b-a400m": (1.3, 0.4),
    "granite-3.1-3b-a800m": (3.3, 0.8),
    "kimi-k2": (1026, 32),
    "minimax-m2": (230, 10),
    "mixtral": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "olmoe": (6.9, 1.3),
    "phi-3.5-moe": (41.9, 6.6),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen2-57b-a14b": (57.4, 14),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-30b-a3b": (30.5, 3.3),
}


@pytest.mark.parametrize("name", zoo_names())
def test_built_in_models_have_as_many_parameters_as_published(name: str) -> None:
    """Cards round, and count embeddings among the active ones or not."""
    spec = load_model(name)
    total, active = PUBLISHED[name]
    others, experts = spec.non_expert_bytes / 2e9, len(spec.moe_layers) * spec.expert_bytes / 2e9
    assert abs(others + experts * spec.num_experts - total) <= max(0.01 * total, 0.05)
    embeddings = 2 * spec.vocab_size * spec.hidden_size / 1e9
    assert active - 0.05 * active - 0.05 <= others + experts * spec.top_k <= active * 1.05 + embeddings + 0.05


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
    assert str(error_of("olmo").hint).endswith("a built-in name is, for example, olmoe")
    assert load_model("Mixtral-8x7B") == load_model("mixtral"), "as the model calls itself"


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    error = error_of(tmp_path / "weights.gguf")
    assert error.found == "a file"
    assert f"fiddlerc compile {tmp_path}" in str(error.hint)


def test_directory_without_config(tmp_path: Path) -> None:
    error = error_of(tmp_path)
    assert "not a Hugging Face model directory" in error.what
    assert error.hint is not None and "download" in error.hint


@pytest.mark.parametrize("text", ["", "{", "[1]", '"mixtral"', "\xff"])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in error_of(tmp_path).what


def test_an_unknown_architecture_is_refused_by_name(demo: Path) -> None:
    edit_config(demo, model_type="no_such_model")
    error = error_of(demo)
    assert "unknown architecture" in error.what
    assert error.found == "model_type no_such_model"
    assert "docs/models.md" in str(error.hint)


@pytest.mark.parametrize(("family", "config", "found"), [
    ("llama", {"intermediate_size": 96}, "has no experts that go through transformers' experts registry"),
    ("nemotron_h", {"layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "moe_intermediate_size": 48,
                    "moe_shared_expert_intermediate_size": 32}, "has experts without a gate"),
    ("deepseek_v4", None, "has experts with an activation of its own"),
    ("qwen3_vl_moe", None, "writes no text, or not from text alone"),
    ("lfm2_moe", {"layer_types": ["no_such_layer"] * 2}, "cannot be built by transformers"),
])  # fmt: skip
def test_models_that_cannot_run_are_refused_with_what_is_missing(
    tmp_path: Path, family: str, config: dict[str, Any] | None, found: str
) -> None:
    import transformers

    common = {} if config is None else {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, **config}
    values = {**transformers.CONFIG_MAPPING[family]().to_diff_dict(), "model_type": family, **common}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    error = error_of(tmp_path)
    assert found in str(error.found)
    assert error.expected is not None
    assert "docs/models.md" in str(error.hint)


def test_without_transformers_other_families_cannot_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    folder = save_family("qwen3_next", tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = error_of(folder)
    assert error.found == "model_type qwen3_next, and no transformers"
    assert error.hint == install("hf")


@pytest.mark.parametrize("family", DISCOVERED)
def test_families_without_a_row_are_found_out(tmp_path: Path, family: str) -> None:
    folder = save_family(family, tmp_path / "m")
    spec = load_model(str(folder))
    stored = {name: info.shape for name, info in Checkpoint.open(folder).tensors.items()}
    experts = expert_shapes(spec)
    assert experts.items() <= stored.items()
    elements = sum(info.elements for name, info in Checkpoint.open(folder).tensors.items() if name not in experts)
    assert spec.non_expert_bytes == 2 * elements
    (folder / "model.safetensors").unlink()
    assert load_model(str(folder)) == spec, "weights are not needed"


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
    {"hidden_size": 2**40}, {"num_experts_per_tok": 9}, {"hidden_act": "relu"}, {"hidden_act": 1}, {"head_dim": 0},
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
    with pytest.warns(FiddlerWarning, match="stored as float16"):
        assert load_model(str(folder)).num_experts == 6
