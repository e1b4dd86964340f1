"""Fiddler's Algorithm 1 (arXiv 2402.07033) in place of our dispatch: the lanes and the kernels stay ours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fiddler_runtime.dispatch import Dispatcher
from fiddler_runtime.makespan import CPU, IDLE, RESIDENT, STREAMED, look_up


class Algorithm1(Dispatcher):
    """An expert off the accelerator is copied if that and its time there are less than its time on the CPU.

    Each expert by itself, with the plan's curves in place of the paper's constant and line. Lanes are not predicted.
    """

    def decide(self, layer: int, topk_ids: torch.Tensor) -> npt.NDArray[np.uint8]:
        super().decide(layer, topk_ids)  # counts, and whether an expert has work at all
        lat, active = self._latencies, self.counts > 0
        cpu, gpu = look_up(lat.cpu_us, self.counts), look_up(lat.gpu_us, self.counts)
        elsewhere = np.where(cpu > gpu + lat.stream_us, STREAMED, CPU)
        self.strategy[:] = np.where(active, np.where(self._resident[layer] != 0, RESIDENT, elsewhere), IDLE)
        self.split[:] = -1, 0
        self.lane_us[:] = 0.0
        return self.strategy
