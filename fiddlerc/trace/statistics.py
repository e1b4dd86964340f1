"""What placement wants to know of a trace."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fiddlerc.ir import ModelSpec, Objective, Trace

from .check import DECODE, PREFILL

_PHASES: dict[Objective, tuple[int, ...]] = {
    "decode": (DECODE,),
    "prefill": (PREFILL,),
    "beam": (PREFILL, DECODE),
    "balanced": (PREFILL, DECODE),
}
# Added to every count (Jeffreys' prior): an expert that a finite text never chose is rare, not impossible.
_SMOOTHING = 0.5


def popularity(trace: Trace | None, spec: ModelSpec, objective: Objective) -> npt.NDArray[np.float64]:
    """Each expert's share of its layer's choices, float64 [layers, experts]; rows sum to 1.

    Decode looks at the choices of decoded tokens, prefill at those of prompts, beam and balanced at both. A trace that
    has none of the wanted phase, or does not tell phases apart, gives all it has. Shares are (n + 1/2) / (sum + E/2);
    without a trace they are equal.
    """
    layers = len(spec.moe_layers)
    if trace is None:
        return np.full((layers, spec.num_experts), 1.0 / spec.num_experts)
    counts = trace.counts[list(_PHASES[objective])].sum(axis=0)
    if trace.experts is None or not counts.any():
        counts = trace.counts.sum(axis=0)
    smooth = counts + _SMOOTHING
    shares: npt.NDArray[np.float64] = smooth / smooth.sum(axis=1, keepdims=True)
    return shares


def successors(trace: Trace | None, spec: ModelSpec) -> npt.NDArray[np.int32] | None:
    """[layer, i, j]: how often a token whose first choice in that layer was i chose j in the next MoE layer.

    int32 [layers, experts, experts]; after the last layer comes the first one of the sequence's next token. None where
    the trace does not have tokens.
    """
    if trace is None or trace.experts is None or trace.sequence is None:
        return None
    layers, experts = len(spec.moe_layers), spec.num_experts
    follows = np.zeros((layers, experts, experts), np.int32)
    goes_on = np.flatnonzero(np.diff(trace.sequence) == 0)
    for layer in range(layers):
        first = trace.experts[:, layer, 0].astype(np.int64)
        then = trace.experts[:, (layer + 1) % layers].astype(np.int64)
        if layer == layers - 1:
            first, then = first[goes_on], then[goes_on + 1]
        pairs = (first[:, None] * experts + then).ravel()
        follows[layer] = np.bincount(pairs, minlength=experts * experts).reshape(experts, experts)
    return follows
