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
from .sizes import Sizes, read_sizes


def load_directory(model_dir: Path) -> ModelSpec:
    """A Hugging Face directory. Weights are not needed; if there are any, all of them must be there.

    Raises FiddlerError for what config.json or the checkpoint lacks, and for architectures and dtypes without support.
    """
    values = read_config(model_dir)
    spec, sizes = describe(values, name=model_dir.resolve().name, where=str(model_dir / "config.json"))
    if has_weights(model_dir):
        checkpoint = Checkpoint.open(model_dir)
        checkpoint.check_experts(spec)
        checkpoint.check_tensors(sizes.non_expert_tensors())
    return spec


def describe(values: Mapping[str, Any], *, name: str, where: str) -> tuple[ModelSpec, Sizes]:
    """config.json's values to what the compiler needs, and all sizes behind it. `where` names the file for people."""
    config = Config(values, where)
    row = _find(config)
    if values.get("quantization_config") is not None:
        raise FiddlerError(
            f"{where} describes a quantised checkpoint",
            found="quantization_config",
            expected="bf16, fp16 or fp32 weights",
            hint="use the model's bf16 release",
        )
    sizes = read_sizes(row, config)
    spec = ModelSpec(
        name=name,
        architecture=row.class_name,
        num_layers=sizes.layers,
        moe_layers=sizes.moe_layers,
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        activation="silu",
        expert_bias=False,
        vocab_size=sizes.vocab,
        max_context=sizes.max_context,
        expert_tensors=row.expert_tensors,
        identity={
            # What running the experts depends on. Vocabulary and context vary between a model and its fine-tunes.
            "model_type": row.model_type,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_experts_per_tok": sizes.top_k,
            row.num_experts: sizes.experts,
            row.intermediate_size: sizes.intermediate,
        },
        non_expert_bytes=sizes.non_expert_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        workspace_bytes_per_token=sizes.workspace_bytes_per_token,
    )
    return spec, sizes


def _find(config: Config) -> Architecture:
    model_type = config.text("model_type")
    rows = [row for row in ARCHITECTURES if row.model_type == model_type]
    if not rows:
        raise FiddlerError(
            f"unknown architecture in {config.where}",
            found=f"model_type {model_type}",
            expected="one of " + ", ".join(row.model_type for row in ARCHITECTURES),
            hint="docs/models.md lists what is supported",
        )
    row = rows[0]
    classes = config.values.get("architectures") or [row.class_name]
    known = (row.class_name, *row.other_class_names)
    if not isinstance(classes, list) or classes[0] not in known:
        raise config.wrong("architectures", classes, f"a model that writes text: {' or '.join(known)}")
    return row
