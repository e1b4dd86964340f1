"""What can be wrong with a downloaded checkpoint, each with its message; and what is unusual but right."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import INTERMEDIATE, edit_config, save_family

from fiddler_runtime import ExpertWeights
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddlerc.frontend import load_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in ("mixtral", "gpt_oss", "granitemoe", "deepseek_v3"):
        save_family(family, folder / family)
    return folder


@pytest.fixture
def changed(families: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's model with other tensors."""

    def rewrite(family: str, change: Callable[[Tensors], object]) -> Path:
        tensors = load_file(families / family / "model.safetensors")
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((families / family / "config.json").read_bytes())
        return tmp_path

    return rewrite


def error_of(folder: Path) -> FiddlerError:
    with pytest.raises(FiddlerError) as caught:
        load_model(str(folder))
    return caught.value


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = save_family("gpt_oss", tmp_path / "m", shards="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[2].unlink()
    error = error_of(folder)
    assert error.found == f"no {shards[2].name}"
    assert error.expected == f"{len(shards)} shards, of which this is number 3"
    assert error.hint == "download the model again"


@pytest.mark.parametrize("where", ["index", "shard"])
def test_an_index_that_its_shards_contradict(tmp_path: Path, where: str) -> None:
    folder = save_family("granitemoe", tmp_path / "m", shards="800KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    if where == "index":
        del content["weight_map"][name]
    else:
        content["weight_map"]["model.layers.9.extra"] = content["weight_map"][name]
    index.write_text(json.dumps(content))
    error = error_of(folder)
    assert "and its shards disagree" in error.what
    assert (name if where == "index" else "model.layers.9.extra") in str(error.found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floating_types_are_rounded_with_a_notice(
    families: Path, changed: Callable[..., Path], dtype: torch.dtype
) -> None:
    def widen(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    folder = changed("gpt_oss", widen)
    with pytest.warns(FiddlerWarning, match=f"stored as {str(dtype)[6:]}: they are rounded to bf16"):
        spec = load_model(str(folder))
    weights, original = ExpertWeights.load(folder), ExpertWeights.load(families / "gpt_oss")
    with pytest.warns(FiddlerWarning, match="rounded to bf16"):
        weights.check(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.check(spec)  # told once
        original.check(spec)

    def read(source: ExpertWeights) -> list[torch.Tensor]:
        rows = INTERMEDIATE
        shapes = [(rows, 64), (rows, 64), (64, rows), (rows,), (rows,), (64,)]
        out = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in shapes]
        source.read(1, 4, *out[:3], out[3:])
        return out

    expected = [part.to(dtype).bfloat16() for part in read(original)]  # fp16 has fewer small numbers
    assert all(torch.equal(a, b) for a, b in zip(read(weights), expected, strict=True))


@pytest.mark.parametrize(("method", "name"), [
    ("mxfp4", "MXFP4"), ("fp8", "FP8"), ("gptq", "GPTQ INT4"), ("awq", "AWQ INT4"), ("bitsandbytes", "bitsandbytes"),
    ("compressed-tensors", "compressed-tensors"), ("new", "quant_method new"),
])  # fmt: skip
def test_quantised_checkpoints_are_refused_by_name(changed: Callable[..., Path], method: str, name: str) -> None:
    folder = changed("gpt_oss", lambda tensors: None)
    edit_config(folder, quantization_config={"quant_method": method})
    error = error_of(folder)
    assert "quantised checkpoint" in error.what
    assert name in str(error.found)
    assert "bf16" in str(error.hint)


def test_quantised_tensors_are_refused_where_config_json_is_silent(changed: Callable[..., Path]) -> None:
    def mxfp4(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        del tensors[name]
        tensors[f"{name}_blocks"] = torch.zeros(6, 2 * INTERMEDIATE, 2, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(6, 2 * INTERMEDIATE, 2, dtype=torch.uint8)

    error = error_of(changed("gpt_oss", mxfp4))
    assert error.found == "model.layers.0.mlp.experts.gate_up_proj_blocks (MXFP4)"
    assert error.hint is not None


def test_int4_tensors(changed: Callable[..., Path]) -> None:
    def gptq(tensors: Tensors) -> None:
        name = "model.layers.0.block_sparse_moe.experts.0.w1"
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = torch.zeros(8, INTERMEDIATE, dtype=torch.int32)

    error = error_of(changed("mixtral", gptq))
    assert error.found == "model.layers.0.block_sparse_moe.experts.0.w1.qweight (INT4: GPTQ or AWQ)"


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")])
def test_tensors_of_a_type_that_needs_scales(changed: Callable[..., Path], dtype: torch.dtype, name: str) -> None:
    tensor = "model.layers.1.mlp.experts.3.up_proj.weight"
    folder = changed("deepseek_v3", lambda tensors: tensors.update({tensor: tensors[tensor].to(dtype)}))
    error = error_of(folder)
    assert tensor in error.what
    assert error.found == name
    assert "quantised checkpoints are not supported" in str(error.hint)


def test_tied_embeddings_with_and_without_their_copy(families: Path, changed: Callable[..., Path]) -> None:
    stored = load_file(families / "granitemoe" / "model.safetensors")
    assert "lm_head.weight" not in stored
    spec = load_model(str(families / "granitemoe"))
    elements = sum(t.numel() for name, t in stored.items() if "_linear" not in name)
    assert spec.non_expert_bytes == 2 * elements
    folder = changed("granitemoe", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(str(folder)).non_expert_bytes == spec.non_expert_bytes
    edit_config(folder, tie_word_embeddings=False)
    assert load_model(str(folder)).non_expert_bytes == spec.non_expert_bytes + 2 * 2048 * 64


def test_tensors_that_nobody_asks_for_are_ignored(families: Path, changed: Callable[..., Path]) -> None:
    """DeepSeek-V3 comes with a layer that predicts further tokens."""
    import transformers

    extra = {
        "model.layers.61.mlp.experts.0.gate_proj.weight": torch.ones(INTERMEDIATE, 64).bfloat16(),
        "model.layers.61.shared_head.head.weight": torch.ones(2048, 64).bfloat16(),
        "something.else": torch.ones(3, dtype=torch.int64),
    }
    folder = changed("deepseek_v3", lambda tensors: tensors.update(extra))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(str(folder)).fingerprint == load_model(str(families / "deepseek_v3")).fingerprint
    assert transformers.AutoModelForCausalLM.from_pretrained(folder) is not None
