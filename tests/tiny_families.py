"""Tiny random models of every supported family, saved by transformers as it would save a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TINY_MIXTRAL = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
COMMON: dict[str, Any] = {
    # The demo model's tokenizer goes with all of them.
    "vocab_size": 2048,
    # One shape of experts for all, so that they share a kernel library.
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
INTERMEDIATE = 288
"""Of an expert: four blocks of 64 rows and half a one, between which dispatch may split it."""
_LOCAL = {"num_local_experts": 6, "intermediate_size": INTERMEDIATE}
_MOE = {"num_experts": 6, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 96}
_ROUTED = {
    "n_routed_experts": 6,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 96,
    "first_k_dense_replace": 1,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# Every family with what makes it special switched on.
SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "phimoe": {**_LOCAL, "attention_bias": True, "lm_head_bias": True},
    "olmoe": {"num_experts": 6, "intermediate_size": INTERMEDIATE, "attention_bias": True},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": {**_MOE, "num_hidden_layers": 4, "head_dim": 32, "mlp_only_layers": [1]},
    "deepseek_v2": {**_ROUTED, **_MLA, "n_shared_experts": 2, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_ROUTED, **_MLA, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "gpt_oss": {**_LOCAL, "head_dim": 16, "sliding_window": 8},
    "granitemoe": {**_LOCAL, "tie_word_embeddings": True},
    "glm4_moe": {
        **_ROUTED,
        "head_dim": 16,
        "n_shared_experts": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "minimax_m2": {**_LOCAL, "head_dim": 16},
}
FAMILIES = tuple(SPECIAL)

_HYBRID = {"num_hidden_layers": 4, "head_dim": 16}
# Families without a row in the frontend's table: found out through transformers.
DISCOVERED: dict[str, dict[str, Any]] = {
    "afmoe": {**_MOE, "head_dim": 16, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8},
    "aria_text": {"moe_num_experts": 6, "moe_topk": 2, "intermediate_size": INTERMEDIATE, "moe_num_shared_experts": 1},
    "cohere2_moe": {**_LOCAL, "num_experts": 6, "head_dim": 16, "sliding_window": 8},
    "dots1": {**_ROUTED, "head_dim": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 96,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**_MOE, "head_dim": 16, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "sliding_window": 8},
    "flex_olmo": {"num_experts": 6, "intermediate_size": INTERMEDIATE},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 96,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4_moe_lite": {**_ROUTED, **_MLA, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "granitemoehybrid": {**_LOCAL, "shared_intermediate_size": 32, "layers_block_type": ["mamba", "attention", "mamba"],
                         "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {**_LOCAL, "num_experts": 6, "moe_topk": 2, "head_dim": 16},
    "jamba": {**_LOCAL, "num_experts": 6, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "lfm2_moe": {**_MOE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "minimax": {**_LOCAL, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_next": {**_MOE, **_HYBRID, "shared_expert_intermediate_size": 40, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "solar_open": {**_ROUTED, "head_dim": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    """A transformers config."""
    import transformers

    return transformers.CONFIG_MAPPING[family](**{**COMMON, **{**SPECIAL, **DISCOVERED}[family], **changes})


def save_family(family: str, folder: Path, *, dtype: str = "bfloat16", shards: str = "50GB", **changes: Any) -> Path:
    """Saves a random model with the demo model's tokenizer; returns the folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        # As initialised, experts are too small for their share to be seen in the logits, and routers nearly undecided.
        if ".experts." in name:
            inputs = {64, INTERMEDIATE} & set(parameter.shape[1:])
            torch.nn.init.normal_(parameter, std=max(inputs, default=4) ** -0.5)
        elif parameter.dim() == 2 and len(parameter) in (6, 8):
            torch.nn.init.normal_(parameter, std=0.5)  # sigmoids of more would be 1, and alike
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
