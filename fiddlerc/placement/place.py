"""Which experts live on the accelerator."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..ir import MemoryBudget, ModelSpec, Placement, PlacementSummary


def place(spec: ModelSpec, popularity: npt.NDArray[np.float64], budget: MemoryBudget, basis: str) -> Placement:
    """The most popular experts of all layers together, as many as the budget has room for.

    popularity  float64 [layers, experts], rows sum to 1: every layer makes equally many choices, so shares compare
                across layers, and this choice maximises the hit rate
    basis       where the popularity comes from, for people

    Equally popular experts are spread over the layers: a layer without residents leaves the accelerator idle until a
    copy arrives. hit_rate is the share of expert choices that find their expert resident, if they are made as
    `popularity` says; random_hit_rate that of as many residents chosen blindly.
    """
    layers, experts = len(spec.moe_layers), spec.num_experts
    assert popularity.shape == (layers, experts), "popularity is of another model"
    # An expert's rank counts its peers in the layer that come first. Ties are decided by it, then by the layer: one
    # expert of each layer, then the next one of each.
    order = np.argsort(-popularity, axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable")
    layer_of = np.repeat(np.arange(layers), experts)
    chosen = np.lexsort((layer_of, ranks.ravel(), -popularity.ravel()))[: budget.resident_experts]
    resident = np.zeros((layers, experts), np.bool_)
    resident.reshape(-1)[chosen] = True
    # fsum rounds once: numpy's sum depends on the CPU's vector width in the last bit, and a plan's bytes must not.
    hits = math.fsum(popularity[resident].tolist()) / layers
    summary = PlacementSummary(
        basis=basis,
        resident_experts=len(chosen),
        total_experts=layers * experts,
        hit_rate=min(1.0, hits),
        random_hit_rate=len(chosen) / (layers * experts),
    )
    return Placement(resident, popularity, summary)
