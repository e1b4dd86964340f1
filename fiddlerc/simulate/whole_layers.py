"""Strategies without a choice per expert: llama.cpp, DeepSpeed's ZeRO-Infinity, KTransformers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir import Steps
from .policy import StepTimes, Strategy, hits
from .setting import Setting

OFFLOAD_TOKENS = 32
"""llama.cpp computes a CPU layer's matrices on the GPU from so many tokens on (ggml-org/llama.cpp pull request
6083)."""

UBATCH_TOKENS = 512
"""llama.cpp's default micro-batch (--ubatch-size): a longer prompt sends the weights once for each."""


@dataclass(frozen=True)
class LlamaCpp(Strategy):
    """Whole layers, attention included, on the GPU as many as fit; the others on the CPU, one after another.

    A step of 32 tokens or more sends the CPU layers' weights, all experts of a layer, to the GPU and computes there;
    copies and computing take turns. Beams are decoded one by one, as its beam search did until it was removed
    (release b2956 calls llama_decode for each beam). Simplified in its favour: copies from pinned memory, our CPU
    kernels (its own reach nearly as much for one token), and a beam's step is one token, though it repeats those
    since the common prefix.
    """

    name: str = "llama.cpp"
    needs_accelerator: bool = False
    chunk_tokens: int = UBATCH_TOKENS
    beams_together: bool = False

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        lat, spec, layers = setting.latencies, setting.spec, setting.layers
        active = steps.counts > 0
        dense_bytes = spec.non_expert_bytes / layers  # of one layer
        layer_bytes = spec.num_experts * spec.expert_bytes + dense_bytes
        room = setting.resident.sum() * spec.expert_bytes + spec.non_expert_bytes
        at_home = np.zeros(setting.resident.shape, np.bool_)
        if setting.has_accelerator:
            at_home[layers - min(layers, int(room // layer_bytes)) :] = True  # the last ones, as -ngl does
        share = float(at_home[:, 0].mean())

        gpu = lat.gpu_overhead_us + np.where(active, setting.gpu_us(steps.counts), 0.0).sum(axis=2)
        cpu = lat.cpu_overhead_us + np.where(active, setting.cpu_us(steps.counts), 0.0).sum(axis=2)
        sent = layer_bytes / spec.expert_bytes * lat.stream_us + gpu
        offloaded = (steps.tokens >= OFFLOAD_TOKENS) & setting.has_accelerator
        elsewhere = np.where(offloaded[:, None], sent, cpu)
        experts = np.where(at_home[:, 0], gpu, elsewhere).sum(axis=1)
        on_gpu = setting.rest_us(steps.tokens, steps.kv)
        rest = np.where(offloaded, on_gpu, share * on_gpu + (1 - share) * setting.cpu_rest_us(steps.tokens, steps.kv))
        return StepTimes(rest + experts, hits(steps.counts, at_home))


@dataclass(frozen=True)
class ZeroInfinity(Strategy):
    """DeepSpeed-MII with ZeRO-Infinity (arXiv 2104.07857): all parameters in host memory, every layer sent in every
    step.

    Copies run ahead of the computing. All experts are sent, chosen or not: parameters are fetched before the router
    runs.
    """

    name: str = "deepspeed-mii"
    kernels: str = "none on the CPU"

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        lat, spec = setting.latencies, setting.spec
        gpu = np.where(steps.counts > 0, setting.gpu_us(steps.counts), 0.0).sum(axis=2) + lat.gpu_overhead_us
        attention = setting.rest_us(steps.tokens, steps.kv) / setting.layers
        sent = (spec.num_experts + spec.non_expert_bytes / setting.layers / spec.expert_bytes) * lat.stream_us
        finish = np.zeros(len(steps.tokens))
        for layer in range(setting.layers):
            finish = np.maximum(finish, (layer + 1) * sent) + attention + gpu[:, layer]
        return StepTimes(finish, np.zeros(len(finish), np.int64))


@dataclass(frozen=True)
class KTransformers(Strategy):
    """KTransformers (SOSP 2025): routed experts on the CPU, all else on the GPU.

    Simplified: no expert deferral (it changes the model's results), no copies for prompts, and our kernels instead of
    AMX and of weights split over NUMA nodes.
    """

    name: str = "ktransformers"
    needs_accelerator: bool = False

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        cpu = np.where(steps.counts > 0, setting.cpu_us(steps.counts), 0.0).sum(axis=(1, 2))
        us = setting.rest_us(steps.tokens, steps.kv) + cpu + setting.layers * setting.latencies.cpu_overhead_us
        return StepTimes(us, np.zeros(len(us), np.int64))
