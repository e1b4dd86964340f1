"""Whether a contender computes the right thing: its rows against the formula in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import silu

from fiddler_runtime.errors import FiddlerError

from .contender import Weights

# bf16 rounds to 2^-9 of a value. Peers round gate, up, their product, the output, and in a layer each weighted sum. The
# largest seen on the models' shapes is 0.0052, torch eager; on 48x40, where two experts of a token may cancel, 0.0096.
TOLERANCE = 2.0**-6

_ROWS = 1024  # of a matrix at a time: the fp32 copy of a whole one may be 900 MB


def reference(weights: Weights, e: int, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) * up x) of expert e in fp32: x [m, H] to [m, H]."""
    x = x.float()
    y = torch.zeros_like(x)
    size = weights.intermediate_size
    for first in range(0, size, _ROWS):
        last = min(first + _ROWS, size)
        gate = weights.gate_up[e, first:last].float()
        up = weights.gate_up[e, size + first : size + last].float()
        y += (silu(x @ gate.T) * (x @ up.T)) @ weights.down[e, :, first:last].float().T
    return y


def layer_reference(weights: Weights, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each token's experts in fp32: [m, H]."""
    y = torch.zeros(x.shape)
    for e in ids.unique().tolist():
        token, choice = torch.where(ids == e)
        y.index_add_(0, token, reference(weights, e, x[token]) * topk_weights[token, choice, None])
    return y


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest row's |found - expected| / |expected|, NaN counting as infinite."""
    rows = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
    return float(rows.nan_to_num(nan=torch.inf).max())


def require(name: str, tokens: int, errors: Iterable[float]) -> float:
    """The largest error. Raises FiddlerError if it is beyond the tolerance."""
    worst = max(errors)
    if worst > TOLERANCE:
        raise FiddlerError(
            f"{name} computes something else at {tokens} tokens",
            found=f"a relative error of {worst:.2g}",
            expected=f"at most {TOLERANCE:.2g} (tests/bench/kernels/check.py)",
        )
    return worst
