"""Writes a model of a real model's expert shape with random weights, as Hugging Face shards.

    python -m tests.bench.random_model mixtral --layers 3 -o /tmp/mixtral-3

Shapes are those of the built-in model, the tokenizer and vocabulary the demo model's. Weights are normal with the scale
that keeps activations near 1, so that routing is close to uniform. One shard a layer; memory for one layer is needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

DEMO = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
SHAPES = {
    # hidden, intermediate, experts, top-k, heads, key/value heads: the checkpoints' config.json on Hugging Face
    "mixtral": (4096, 14336, 8, 2, 32, 8),
    "small": (1024, 3584, 8, 2, 8, 2),
}


def write(shape: str, layers: int, dest: Path, *, seed: int = 0) -> None:
    """Writes config.json, tokenizer and `layers` + 1 shards with their index below `dest`, which must not exist."""
    hidden, intermediate, experts, top_k, heads, kv_heads = SHAPES[shape]
    dest.mkdir(parents=True)
    config = json.loads((DEMO / "config.json").read_bytes())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
    }
    (dest / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (DEMO / name).exists():
            shutil.copy(DEMO / name, dest / name)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # The same random rows again and again: drawing billions of numbers takes longer than all else.
        block = torch.randn(min(rows, 256), columns, generator=generator).mul_(columns**-0.5).bfloat16()
        return block.repeat(-(-rows // len(block)), 1)[:rows].contiguous()

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    shards: list[dict[str, torch.Tensor]] = []
    index: dict[str, str] = {}

    def shard(tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{len(shards) + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, dest / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        shards.append({})

    for layer in range(layers):
        at = f"model.layers.{layer}."
        width = hidden // heads * kv_heads
        tensors = {
            f"{at}self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{at}self_attn.k_proj.weight": matrix(width, hidden),
            f"{at}self_attn.v_proj.weight": matrix(width, hidden),
            f"{at}self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{at}input_layernorm.weight": norm(),
            f"{at}post_attention_layernorm.weight": norm(),
            f"{at}block_sparse_moe.gate.weight": torch.randn(experts, hidden, generator=generator)
            .mul_(0.02)
            .bfloat16(),
        }
        for expert in range(experts):
            for part, (rows, columns) in {
                "w1": (intermediate, hidden),
                "w2": (hidden, intermediate),
                "w3": (intermediate, hidden),
            }.items():
                tensors[f"{at}block_sparse_moe.experts.{expert}.{part}.weight"] = matrix(rows, columns)
        shard(tensors)
        print(f"layer {layer + 1} of {layers}", flush=True)
    vocabulary = config["vocab_size"]
    shard(
        {
            "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator).bfloat16(),
            "model.norm.weight": norm(),
            "lm_head.weight": matrix(vocabulary, hidden),
        }
    )
    total = sum((dest / name).stat().st_size for name in set(index.values()))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1, sort_keys=True)
    (dest / "model.safetensors.index.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    write(arguments.shape, arguments.layers, arguments.output)


if __name__ == "__main__":
    main()
