"""Routed experts in a program of your own: torch, numpy and safetensors, no transformers.

python examples/embed.py PLAN [MODEL_DIR]      without MODEL_DIR the experts get random weights
"""

import sys

import torch

import fiddler_runtime

if len(sys.argv) < 2:
    sys.exit(__doc__)
plan = fiddler_runtime.load_plan(sys.argv[1])
source = fiddler_runtime.ExpertWeights
weights = source.load(sys.argv[2]) if len(sys.argv) > 2 else source.random(seed=0)

with fiddler_runtime.Engine(plan, weights) as engine:
    spec = engine.spec
    hidden = torch.randn(16, spec.hidden_size, dtype=torch.bfloat16)  # 16 tokens
    router = torch.randn(16, spec.num_experts).softmax(-1)  # stands for your model's router
    topk_weights, topk_ids = router.topk(spec.top_k)
    out = engine.moe(spec.moe_layers[0], hidden, topk_ids, topk_weights)
    print(tuple(out.shape), out.dtype, engine.counters()["expert_calls"])
