"""Tiny random models of every supported family, saved by transformers as it would save a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TINY_MIXTRAL = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
FAMILIES = ("mixtral", "phimoe", "olmoe", "qwen3_moe")
_COMMON = {
    # The demo model's tokenizer goes with all of them.
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def config_of(family: str, **changes: Any) -> Any:
    """A transformers config; every family with what makes it special switched on."""
    import transformers

    special: dict[str, dict[str, Any]] = {
        "mixtral": {"num_hidden_layers": 2, "intermediate_size": 96, "num_local_experts": 6},
        "phimoe": {
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_local_experts": 6,
            "attention_bias": True,
            "lm_head_bias": True,
        },
        "olmoe": {"num_hidden_layers": 2, "intermediate_size": 48, "num_experts": 6, "attention_bias": True},
        "qwen3_moe": {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "head_dim": 32,
            "mlp_only_layers": [1],
        },
    }
    return transformers.CONFIG_MAPPING[family](**{**_COMMON, **special[family], **changes})


def save_family(family: str, folder: Path, *, dtype: str = "bfloat16", shards: str = "50GB", **changes: Any) -> Path:
    """Saves a random model with the demo model's tokenizer; returns the folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shards)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MIXTRAL / name, folder / name)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; a value of ... removes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    path.write_text(json.dumps(config))
