"""Latencies of a machine that nobody measured: its limits, times what software reaches of them.

The efficiencies are ours; `compile` and the report say that such a plan rests on a data sheet.
"""

from __future__ import annotations

import numpy as np

from ..ir import Limits, Regime
from .points import Ceiling, Floats, Work

# A data sheet's bandwidth is channels x transfer rate. Streaming reads of DRAM and HBM reach 75-90 % of it, and copies
# alike: one 352 MB expert over PCIe 4.0 x16 in 13.98 ms (arXiv 2509.23638) is 0.80 of the link's 31.5 GB/s, and over
# PCIe 3.0 x16 in 26.7 ms it is 0.84 of 15.75 GB/s.
BANDWIDTH_EFFICIENCY = 0.8
# Packed CPU kernels reach 0.8-1.0 of the measured peak, AMX half of it (docs/kernels-measured.md), and a data sheet's
# peak is cores x base clock with all cores in wide vector code; on the GPU two narrow GEMMs and their element-wise
# kernels reach about as much of the tensor peak.
PEAK_EFFICIENCY = 0.6
# An expert on the GPU is seven small kernels (gather, GEMM, SiLU, product, GEMM, weighting, scatter); launching one
# from torch takes about 5 us, whatever little there is to compute.
GPU_OPERATION_US = 5.0
GPU_LAUNCH_US = 7 * GPU_OPERATION_US
# A decoder layer without its experts is some twenty kernels (norms, projections, rotary embedding, attention, router);
# a step cannot be shorter than launching them one by one, as transformers does.
GPU_LAYER_OPERATIONS = 20
# Where torch runs it on the CPU, Python and torch's dispatcher come on top of the computing. The demo model, which has
# next to nothing to compute (hidden size 128), takes 0.6 ms a layer on a Zen 4 core and 0.3 ms on a Zen 5 core.
CPU_LAYER_US = 450.0
# Copies take their share of the host memory's bandwidth from the CPU lane, but never more than half: memory
# controllers arbitrate between requesters.
MAX_COPY_SHARE = 0.5


def cpu_ceiling(limits: Limits, efficiency: bool, regime: Regime = "fast") -> Ceiling:
    """The CPU's limits in bytes and operations per microsecond, or what is reached of them."""
    gbps = limits.cpu_read_gbps if regime == "fast" else limits.cpu_read_slow_gbps
    return _ceiling(gbps, limits.cpu_peak_gflops, efficiency)


def gpu_ceiling(limits: Limits, efficiency: bool) -> Ceiling:
    """The accelerator's limits in bytes and operations per microsecond, or what is reached of them."""
    return _ceiling(limits.gpu_read_gbps, limits.gpu_peak_gflops, efficiency)


def copy_ceiling(limits: Limits, efficiency: bool) -> Ceiling:
    """The host-to-device link's limit in bytes per microsecond, or what is reached of it."""
    return _ceiling(limits.host_to_device_gbps, 1.0, efficiency)


def cpu_us(work: Work) -> Floats:
    """One expert on the CPU; `work` was made with the ceiling that is reached."""
    return work.roofline_us


def gpu_us(work: Work) -> Floats:
    """One expert on the GPU; `work` was made with the ceiling that is reached."""
    return np.maximum(work.roofline_us, GPU_LAUNCH_US)


def contention(limits: Limits) -> float:
    """gamma: the relative slow-down of a memory-bound CPU lane that gives a share of its bandwidth to copies."""
    share = min(MAX_COPY_SHARE, limits.host_to_device_gbps / limits.cpu_read_gbps)
    return share / (1.0 - share)


def _ceiling(gbps: float, gflops: float, efficiency: bool) -> Ceiling:
    # 1 GB/s is 1000 bytes a microsecond.
    return Ceiling(
        gbps * 1e3 * (BANDWIDTH_EFFICIENCY if efficiency else 1.0),
        gflops * 1e3 * (PEAK_EFFICIENCY if efficiency else 1.0),
    )
