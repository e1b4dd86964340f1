"""Fiddler (arXiv 2402.07033): as its paper describes it, and as its published code does it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir import Steps
from .policy import StepTimes, Strategy, hits, overlapped_us
from .setting import Floats, Setting

CODE_CPU_MS, CODE_COPY_MS = 7, 70
"""What the published code takes a token on the CPU and a copy to cost, on every machine (mixtral.py)."""

EAGER_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
EAGER_FACTOR = (1.88, 1.57, 2.97, 1.81, 1.83, 1.47, 1.25, 1.09, 1.04, 1.08, 1.12)
"""Three F.linear of torch in bf16, over ours: shares of the roofline, measured for 4096 x 14336 on two cores of an EPYC
with AVX512_BF16 (docs/predict.md). CPUs without that instruction do worse."""


@dataclass(frozen=True)
class Fiddler(Strategy):
    """Algorithm 1: an expert off the GPU is copied if its copy and GPU time are less than its CPU time, else it runs
    there.

    Placement by popularity. Simplified in its favour: the lanes run side by side, and latencies are the fitted curves
    instead of a constant and a line.
    """

    name: str = "fiddler"

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        resident, total = setting.popular, setting.rest_us(steps.tokens, steps.kv)
        for layer in range(setting.layers):
            counts = steps.counts[:, layer].astype(np.int64)
            missing = (counts > 0) & ~resident[layer]
            copied = missing & (setting.cpu_us(counts) > setting.gpu_us(counts) + setting.latencies.stream_us)
            total = total + overlapped_us(counts, resident[layer], copied, setting)
        return StepTimes(total, hits(steps.counts, resident))


@dataclass(frozen=True)
class FiddlerCode(Strategy):
    """The code published with the paper: the least *sum* of costs, typed in as 7 a token and 70 a copy, and all in a
    row.

    The sum is least where each expert alone is cheapest: copied from 10 tokens on. First the GPU's experts, each copy
    waited for, then the CPU's, computed by stock torch. Simplified: its thousands of small GPU launches are not
    counted.
    """

    name: str = "fiddler-code"
    kernels: str = "torch eager"

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        lat, resident = setting.latencies, setting.popular
        missing = (steps.counts > 0) & ~resident
        copied = missing & (CODE_CPU_MS * steps.counts >= CODE_COPY_MS)
        on_cpu, on_gpu = missing & ~copied, ((steps.counts > 0) & resident) | copied
        experts = np.where(on_gpu, setting.gpu_us(steps.counts), 0.0) + np.where(copied, lat.stream_us, 0.0)
        experts += np.where(on_cpu, eager_us(steps, setting), 0.0)
        entries = on_gpu.any(axis=2) * lat.gpu_overhead_us + on_cpu.any(axis=2) * lat.cpu_overhead_us
        us = setting.rest_us(steps.tokens, steps.kv) + experts.sum(axis=(1, 2)) + entries.sum(axis=1)
        return StepTimes(us, hits(steps.counts, resident))


def eager_us(steps: Steps, setting: Setting) -> Floats:
    """Experts on the CPU by stock torch, float64 [steps, layers, experts]."""
    factor = np.interp(np.log2(np.maximum(steps.counts, 1)), np.log2(EAGER_TOKENS), EAGER_FACTOR)
    us: Floats = setting.cpu_us(steps.counts) * factor
    return us
