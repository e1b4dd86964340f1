"""What placement wants to know of a trace."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fiddler_runtime.errors import FiddlerError
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
# Tokens per step of the co-activation sum: bounds its temporary array at 256 experts to 64 MB.
_CHUNK = 1 << 16


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


def coactivation(trace: Trace) -> npt.NDArray[np.float64]:
    """[layer, i, j]: of the tokens that chose expert i, the share that chose j too; float64 [layers, experts, experts].

    The diagonal is 1, the rest of a row sums to top_k - 1; the row of an expert that nobody chose is 0. Raises
    FiddlerError for a trace that has counts only.
    """
    if trace.experts is None:
        raise FiddlerError(
            "co-activation needs a trace with tokens",
            found=f"counts only ({trace.source})",
            expected="a recorded trace",
            hint="fiddlerc trace MODEL_DIR --text FILE -o trace.safetensors",
        )
    tokens, layers, _ = trace.experts.shape
    num_experts = trace.counts.shape[2]
    together = np.zeros((layers, num_experts, num_experts))
    for begin in range(0, tokens, _CHUNK):
        for layer in range(layers):
            ids = trace.experts[begin : begin + _CHUNK, layer].astype(np.int64)
            chosen = np.zeros((len(ids), num_experts), np.float32)
            np.put_along_axis(chosen, ids, 1.0, axis=1)
            together[layer] += chosen.T @ chosen
    alone = np.einsum("lii->li", together)[:, :, None]
    shares: npt.NDArray[np.float64] = np.divide(together, alone, out=np.zeros_like(together), where=alone > 0)
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
