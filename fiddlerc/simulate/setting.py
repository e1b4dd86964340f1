"""What every strategy is given: one model on one machine, with one budget of experts on the accelerator."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import Latencies, dense, look_up

from ..ir import ModelSpec, Tables

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Setting:
    """Latencies, placement and memory that all strategies share.

    latencies    of one expert; .rows is nonzero where ours may split one
    tokens, rest float64 [n]: microseconds of a step of that many tokens without its routed experts; rest_kv_us: what
                 each cached token attended to adds
    rest_on_cpu  there is no GPU: the rest of a step runs on the CPU under every strategy
    resident     bool [layers, experts]: our placement;  popularity float64 [layers, experts], rows sum to 1
    prefetch     int16 [layers, experts, 2], see Tables; None where ours does not prefetch
    """

    spec: ModelSpec
    latencies: Latencies
    tokens: Floats
    rest: Floats
    rest_kv_us: float
    rest_on_cpu: bool
    has_accelerator: bool
    resident: Bools
    popularity: Floats
    prefetch: npt.NDArray[np.int16] | None

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.resident.shape[0])

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """The budget of resident experts in equal parts, int64 [layers]: what a cache has in each layer."""
        total = int(self.resident.sum())
        return total // self.layers + (np.arange(self.layers) < total % self.layers).astype(np.int64)

    @property
    def popular(self) -> Bools:
        """As many experts as ours has, the most popular of all layers together; of equals one of each layer in turn."""
        order = np.argsort(-self.popularity, axis=1, kind="stable")
        ranks = np.argsort(order, axis=1, kind="stable").ravel()
        layer = np.repeat(np.arange(self.layers), self.popularity.shape[1])
        chosen = np.lexsort((layer, ranks, -self.popularity.ravel()))[: int(self.resident.sum())]
        marked = np.zeros(self.resident.size, np.bool_)
        marked[chosen] = True
        return marked.reshape(self.resident.shape)

    def cached(self, layer: int) -> list[int]:
        """What a cache of equal parts starts with in a layer: the most popular, the least popular of them first."""
        most = np.argsort(-self.popularity[layer], kind="stable")[: int(self.slots[layer])]
        return [int(expert) for expert in most[::-1]]

    def cpu_us(self, counts: npt.NDArray[np.integer]) -> Floats:
        """c of each count."""
        return look_up(self.latencies.cpu_us, counts)

    def gpu_us(self, counts: npt.NDArray[np.integer]) -> Floats:
        """g of each count."""
        return look_up(self.latencies.gpu_us, counts)

    def rest_us(self, tokens: npt.NDArray[np.integer], kv: npt.NDArray[np.integer]) -> Floats:
        """All of a step but its routed experts, where our runtime puts it, float64 [steps]."""
        last, slope = self.tokens[-1], (self.rest[-1] - self.rest[-2]) / (self.tokens[-1] - self.tokens[-2])
        beyond = np.maximum(tokens - last, 0.0)
        us: Floats = np.interp(tokens, self.tokens, self.rest) + slope * beyond + self.rest_kv_us * kv
        return us

    def cpu_rest_us(self, tokens: npt.NDArray[np.integer], kv: npt.NDArray[np.integer]) -> Floats:
        """The same on the CPU.

        Nobody measured it where there is a GPU. Attention's weights are matrices as an expert's are: they take the
        time of as many bytes of experts, and cached keys and values that of reading them at the rate of a one-token
        expert.
        """
        if self.rest_on_cpu:
            return self.rest_us(tokens, kv)
        bytes_per_us = self.spec.expert_bytes / float(self.cpu_us(np.ones(1, np.int64))[0])
        weights = self.cpu_us(tokens) * self.spec.non_expert_bytes / self.spec.expert_bytes
        us: Floats = weights + kv * self.spec.kv_bytes_per_token / bytes_per_us
        return us


def make_setting(
    spec: ModelSpec, tables: Tables, accelerator: str, features: Collection[str] = (), regime: int | None = None
) -> Setting:
    """A plan's setting, with these features on, in one of its memory's regimes (default: the one that was seen most).

    accelerator  its kind, as in machine.Accelerator
    """
    return Setting(
        spec=spec,
        latencies=dense(tables, regime, spec.intermediate_size if "split" in features else 0),
        tokens=tables.tokens.astype(np.float64),
        rest=tables.rest_us.astype(np.float64),
        rest_kv_us=float(tables.rest_kv_us[0]),
        rest_on_cpu=accelerator != "cuda",
        has_accelerator=accelerator != "none",
        resident=tables.resident != 0,
        popularity=tables.popularity.astype(np.float64),
        prefetch=tables.prefetch if "prefetch" in features else None,
    )
