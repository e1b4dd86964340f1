"""A config.json, and the weights beside it if there are any, to a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fiddler_runtime.checkpoint import Checkpoint, has_weights, read_config
from fiddler_runtime.errors import FiddlerError
from fiddlerc.ir import ModelSpec

from .architectures import ARCHITECTURES, Architecture
from .config import Config
from .discovery import discover
from .sizes import Sizes, read_sizes


def load_directory(model_dir: Path) -> ModelSpec:
    """A Hugging Face directory. Weights are not needed; if there are any, all of them must be there.

    Raises FiddlerError for what config.json or the checkpoint lacks, and for architectures and dtypes without support.
    """
    values = read_config(model_dir)
    name, where = model_dir.resolve().name, str(model_dir / "config.json")
    others: dict[str, tuple[int, ...]] = {}
    if has_row(Config(values, where)):
        spec, sizes = describe(values, name=name, where=where)
        others = sizes.non_expert_tensors()
    else:
        refuse_quantised(values, where)
        spec = discover(model_dir, values, name=name)
    if has_weights(model_dir):
        checkpoint = Checkpoint.open(model_dir)
        checkpoint.check_experts(spec)
        checkpoint.check_tensors(others)
    return spec


def describe(values: Mapping[str, Any], *, name: str, where: str) -> tuple[ModelSpec, Sizes]:
    """config.json's values to what the compiler needs, and all sizes behind it. `where` names the file for people."""
    config = Config(values, where)
    row = _find(config)
    refuse_quantised(values, where)
    sizes = read_sizes(row, config)
    cache = sizes.cache
    spec = ModelSpec(
        name=name,
        architecture=row.class_name,
        num_layers=sizes.layers,
        moe_layers=sizes.moe_layers,
        num_experts=sizes["experts"],
        top_k=sizes.top_k,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        activation=sizes.activation,
        expert_bias=bool(row.tensors.gate_bias),
        vocab_size=sizes["vocab"],
        max_context=sizes.max_context,
        expert_tensors=row.tensors,
        identity={
            # What running the experts depends on. Vocabulary and context vary between a model and its fine-tunes.
            "model_type": config.text("model_type"),
            "hidden_act": config.text("hidden_act"),
            "hidden_size": sizes["hidden"],
            "num_hidden_layers": sizes.layers,
            "num_experts_per_tok": sizes.top_k,
            row.experts: sizes["experts"],
            row.intermediate: sizes["intermediate"],
        },
        non_expert_bytes=sizes.non_expert_bytes,
        kv_bytes_per_token=cache.bytes_per_token,
        workspace_bytes_per_token=sizes.workspace_bytes_per_token,
        window=cache.window,
        window_kv_bytes_per_token=cache.window_bytes_per_token,
        expanded_bytes_per_token=sizes.expanded_bytes_per_token,
    )
    return spec, sizes


# quantization_config's quant_method: what people call it, and where its bf16 weights are to be had.
_QUANTISED = {
    "mxfp4": ("MXFP4", "transformers' Mxfp4Config(dequantize=True) and save_pretrained, or a bf16 upload of the model"),
    "fp8": ("FP8", "a bf16 upload of the model, or transformers' FineGrainedFP8Config(dequantize=True)"),
    "compressed-tensors": ("compressed-tensors (INT4 or FP8)", "the model's bf16 release"),
    "awq": ("AWQ INT4", "the bf16 model that it was made from"),
    "gptq": ("GPTQ INT4", "the bf16 model that it was made from"),
    "bitsandbytes": ("bitsandbytes INT4 or INT8", "the bf16 model that it was made from"),
}


def refuse_quantised(values: Mapping[str, Any], where: str) -> None:
    """Raises FiddlerError, naming the format, for the config.json of a quantised checkpoint."""
    quantised = values.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    name, instead = _QUANTISED.get(str(method), (f"quant_method {method}", "the model's bf16 release"))
    raise FiddlerError(
        f"{where} describes a quantised checkpoint",
        found=f"quantization_config: {name}",
        expected="bf16, fp16 or fp32 weights",
        hint=f"use {instead}",
    )


def has_row(config: Config) -> bool:
    """Whether the family is in the table. Raises FiddlerError without a model_type."""
    model_type = config.text("model_type")
    return any(model_type in row.model_types for row in ARCHITECTURES)


def _find(config: Config) -> Architecture:
    row = next(row for row in ARCHITECTURES if config.text("model_type") in row.model_types)
    classes = config.values.get("architectures") or [row.class_name]
    if not isinstance(classes, list) or classes[0] not in row.class_names:
        raise config.wrong("architectures", classes, f"a model that writes text: {' or '.join(row.class_names)}")
    return row
