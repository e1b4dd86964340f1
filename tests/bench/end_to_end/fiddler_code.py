"""Fiddler as it was published: its rule, torch's CPU kernels, one expert after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fiddler_runtime.lanes.device import Device
from fiddler_runtime.lanes.expert import UnpackedExpert, activate, run_expert
from fiddler_runtime.plan import ModelSpec
from fiddler_runtime.progress import Progress
from fiddler_runtime.weights import ExpertWeights
from fiddlerc.simulate.fiddler import CODE_COPY_MS, CODE_CPU_MS


class FiddlerCode:
    """Experts as its published code (mixtral.py) runs them.

    It minimises the sum of typed-in costs over all 2^E choices, which is each expert where it alone is cheaper: copied
    from 10 tokens on. First those of the accelerator in order, each copy (from pageable memory, as there) waited for,
    then those of the CPU by three torch linears each. Left out are its thousands of small launches around that.

    resident  bool [MoE layers, experts]: the most popular ones
    threads   torch's, while an expert runs on the CPU
    """

    def __init__(
        self,
        spec: ModelSpec,
        resident: npt.NDArray[np.bool_],
        weights: ExpertWeights,
        device: Device,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._device, self._threads, self._spec = device, threads, spec
        self._rows = {layer: row for row, layer in enumerate(spec.moe_layers)}
        self._resident = resident
        self._placeholder = UnpackedExpert.empty(spec.expert, device.torch_device)
        self._experts: dict[tuple[int, int], UnpackedExpert] = {}
        for number, (layer, expert) in enumerate(weights.order(spec)):
            if progress is not None:
                progress("loading experts", number, resident.size)
            read = UnpackedExpert.empty(spec.expert)
            weights.read(layer, expert, *read.matrices, read.biases)
            row = self._rows[layer]
            self._experts[row, expert] = read.to(device.torch_device) if resident[row, expert] else read
        self.reset_counters()

    def moe(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See Engine.moe."""
        row = self._rows[layer]
        flat = ids.flatten().cpu()
        counts = np.bincount(flat.numpy(), minlength=self._spec.num_experts)
        here = self._resident[row]
        copied = (counts > 0) & ~here & (CODE_CPU_MS * counts >= CODE_COPY_MS)
        on_cpu = (counts > 0) & ~here & ~copied
        for name, mask in (("resident", (counts > 0) & here), ("streamed", copied), ("cpu", on_cpu)):
            self._calls[name] += int(mask.sum())

        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        scale = weights.flatten().float().cpu()
        choices = {e: torch.nonzero(flat == e).flatten() for e in np.flatnonzero(counts).tolist()}
        top_k = ids.shape[1]
        for expert in np.flatnonzero((counts > 0) & ~on_cpu).tolist():
            chosen = choices[expert]
            self._device.join(
                self._device.submit(
                    self._there, hidden, chosen // top_k, scale[chosen], self._experts[row, expert], here[expert], out
                )
            )
        before = torch.get_num_threads()
        if before != self._threads:
            torch.set_num_threads(self._threads)
        for expert in np.flatnonzero(on_cpu).tolist():
            chosen = choices[expert]
            tokens = (chosen // top_k).to(hidden.device)
            result = run_on_cpu(hidden[tokens].cpu(), self._experts[row, expert]) * scale[chosen, None]
            out.index_add_(0, tokens, result.to(out.device))
        if before != self._threads:
            torch.set_num_threads(before)
        return out.to(hidden.dtype)

    def _there(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        scale: torch.Tensor,
        expert: UnpackedExpert,
        resident: bool,
        out: torch.Tensor,
    ) -> None:
        """One expert on the accelerator."""
        where = self._device.torch_device
        if not resident:
            for target, source in zip(
                (*self._placeholder.matrices, *self._placeholder.biases),
                (*expert.matrices, *expert.biases),
                strict=True,
            ):
                target.copy_(source)
            expert = self._placeholder
        run_expert(hidden, tokens.to(where), scale.to(where), expert, out)

    def counters(self) -> dict[str, Any]:
        """expert_calls as Engine.counters has them."""
        return {"expert_calls": dict(self._calls)}

    def reset_counters(self) -> None:
        """Sets them to zero."""
        self._calls = {"resident": 0, "streamed": 0, "cpu": 0}

    def close(self) -> None:
        """Lets the weights go."""
        self._experts.clear()
        self._device.close()


def run_on_cpu(hidden: torch.Tensor, expert: UnpackedExpert) -> torch.Tensor:
    """Three linears in bf16: [n, H] -> [n, H]."""
    gate, up, down = expert.matrices
    gate_bias, up_bias, down_bias = expert.biases or (None, None, None)
    inner = activate(expert.activation, F.linear(hidden, gate, gate_bias), F.linear(hidden, up, up_bias))
    return F.linear(inner, down, down_bias)
