"""A trace's invariants, checked where one comes into being and where one is read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fiddler_runtime.errors import FiddlerError
from fiddlerc.ir import ModelSpec, Trace

PREFILL, DECODE = 0, 1
# Expert ids are kept in 16 bits.
MAX_EXPERTS = 2**16


def count(experts: npt.NDArray[np.uint16], phase: npt.NDArray[np.uint8], num_experts: int) -> npt.NDArray[np.int64]:
    """experts [tokens, layers, top_k], phase [tokens] -> choices int64 [2, layers, num_experts]."""
    layers = experts.shape[1]
    counts = np.zeros((2, layers, num_experts), np.int64)
    for which in (PREFILL, DECODE):
        chosen = experts[phase == which]
        for layer in range(layers):
            counts[which, layer] = np.bincount(chosen[:, layer].ravel(), minlength=num_experts)
    return counts


def check(trace: Trace, spec: ModelSpec, where: str) -> None:
    """Raises FiddlerError unless the trace is one of `spec` and agrees with itself; `where` names it for people."""
    layers = len(spec.moe_layers)
    _expect(where, "counts", trace.counts, np.int64, (2, layers, spec.num_experts))
    if (trace.counts < 0).any():
        raise FiddlerError(f"{where} is not valid", found="a negative count", expected="counts from 0")
    rows = (trace.experts, trace.sequence, trace.position, trace.phase)
    if trace.experts is None or trace.sequence is None or trace.position is None or trace.phase is None:
        if any(row is not None for row in rows):
            raise FiddlerError(
                f"{where} is not valid",
                found="some of experts, sequence, position and phase",
                expected="all of them, or none (counts only)",
            )
        return
    tokens = trace.experts.shape[0]
    _expect(where, "experts", trace.experts, np.uint16, (tokens, layers, spec.top_k))
    _expect(where, "sequence", trace.sequence, np.int32, (tokens,))
    _expect(where, "position", trace.position, np.int32, (tokens,))
    _expect(where, "phase", trace.phase, np.uint8, (tokens,))
    if tokens and trace.experts.max() >= spec.num_experts:
        raise FiddlerError(
            f"{where} is not valid", found=f"expert {trace.experts.max()}", expected=f"0 to {spec.num_experts - 1}"
        )
    if (trace.phase > DECODE).any():
        raise FiddlerError(f"{where} is not valid", found=f"phase {trace.phase.max()}", expected="0 or 1")
    if tokens and (trace.sequence.min() < 0 or trace.position.min() < 0):
        raise FiddlerError(f"{where} is not valid", found="a negative sequence or position", expected="from 0")
    if not np.array_equal(trace.counts, count(trace.experts, trace.phase, spec.num_experts)):
        raise FiddlerError(
            f"{where} is not valid", found="counts that are not those of its experts", expected="counts that agree"
        )


def _expect(
    where: str, name: str, array: npt.NDArray[np.generic], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise FiddlerError(
            f"{where} is not valid",
            found=f"{name} of {array.dtype} {list(array.shape)}",
            expected=f"{np.dtype(dtype)} {list(shape)}",
        )
