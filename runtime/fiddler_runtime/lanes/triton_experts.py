# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Experts in Triton, straight from the packed layout of docs/kernels.md: what was copied is computed without unpacking.

The only module that imports triton, and itself imported where a kernel of it runs, never before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs

from ..plan import ExpertForm
from .expert import DOWN_LANES, GATE_UP_LANES, LIMIT, PackedExpert
from .transfers import send_numbers

_ACTIVATIONS = {"silu": 0, "gptoss": 1, "gelu": 2, "gelu_tanh": 3}


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: tokens x outputs x pairs of inputs to a program; down: parts of the inputs, added up."""

    tokens: int
    outputs: int
    pairs: int
    parts: int
    warps: int


TILES = {
    # tl.dot wants 16 rows at least. Weights are read once, so what counts is how many programs read at once.
    "few": Tiles(tokens=16, outputs=32, pairs=64, parts=4, warps=4),
    "some": Tiles(tokens=32, outputs=64, pairs=32, parts=2, warps=4),
    "many": Tiles(tokens=64, outputs=64, pairs=32, parts=1, warps=8),
}


def table(work: Sequence[tuple[PackedExpert, int, int]], tiles: Tiles, device: torch.device) -> torch.Tensor:
    """What each program does, int64 [programs, 3]: an expert's address, and the rows from .. to; for (expert, rows)."""
    cut = [
        (expert.words.data_ptr(), first, min(first + tiles.tokens, stop))
        for expert, start, stop in work
        for first in range(start, stop, tiles.tokens)
    ]
    return send_numbers(np.array(cut, np.int64).reshape(-1, 3), device)


def run(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    form: ExpertForm,
    table: torch.Tensor,
    out: torch.Tensor,
    tiles: Tiles,
) -> None:
    """out[rows] += weights * expert(hidden[rows]) for the rows and experts of a `table`.

    hidden bf16 [T, H]; rows int64 [n], below 0 where there is nothing to do; weights fp32 [n]; out fp32 [T, H]; all
    contiguous on one device. H and I of `form` are even. Sums are fp32, and added to out in no certain order. Weights
    of a tile without a row to do are not read.
    """
    if not len(table):
        return
    pairs, inner_pairs = form.hidden_size // 2, form.intermediate_size // 2
    blocks, down_blocks = -(-form.intermediate_size // GATE_UP_LANES), -(-form.hidden_size // DOWN_LANES)
    down_at = blocks * pairs * 2 * GATE_UP_LANES
    bias_at = down_at + down_blocks * inner_pairs * DOWN_LANES
    inner = torch.empty(rows.numel(), form.intermediate_size, dtype=torch.bfloat16, device=hidden.device)
    common: dict[str, Any] = {
        "BIAS": form.bias,
        "TOKENS": tiles.tokens,
        "OUTPUTS": tiles.outputs,
        "PAIRS": tiles.pairs,
        # Triton's interpreter (3.7) multiplies the bits of bf16 numbers as if they were integers.
        "WIDE": knobs.runtime.interpret,
        "num_warps": tiles.warps,
    }
    gate_up_kernel[(len(table), triton.cdiv(form.intermediate_size, tiles.outputs))](
        hidden.view(torch.int32),
        table,
        rows,
        inner,
        pairs,
        form.intermediate_size,
        bias_at,
        ACTIVATION=_ACTIVATIONS[form.activation],
        LIMIT=LIMIT,
        **common,
    )
    down_kernel[(len(table), triton.cdiv(form.hidden_size, tiles.outputs), tiles.parts)](
        inner.view(torch.int32),
        table,
        rows,
        weights,
        out,
        inner_pairs,
        form.hidden_size,
        down_at,
        bias_at + blocks * 2 * GATE_UP_LANES,
        PARTS=tiles.parts,
        **common,
    )


@triton.jit
def _even(pairs, WIDE: tl.constexpr):
    """The first bf16 of each pair."""
    return _number(pairs & 0xFFFF, WIDE)


@triton.jit
def _odd(pairs, WIDE: tl.constexpr):
    """The second one."""
    return _number((pairs >> 16) & 0xFFFF, WIDE)


@triton.jit
def _number(bits, WIDE: tl.constexpr):
    found = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    if WIDE:
        found = found.to(tl.float32)
    return found


@triton.jit
def gate_up_kernel(
    hidden,
    table,
    rows,
    inner,
    pairs,
    intermediate,
    bias_at,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """inner[row] = activation(gate, up) of one tile of tokens and outputs: bf16 [n, I]."""
    tile = tl.program_id(0)
    # Packed experts lie on addresses that are multiples of 64 and more: said for loads of more than one lane at once.
    weights = tl.multiple_of(tl.load(table + 3 * tile), 64).to(tl.pointer_type(tl.int32))
    row = tl.load(table + 3 * tile + 1) + tl.arange(0, TOKENS)
    token = tl.load(rows + row, mask=row < tl.load(table + 3 * tile + 2), other=-1)
    live = token >= 0
    if tl.max(token, 0) < 0:
        return
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < intermediate
    # A block has 16 outputs: a row of it for one pair of inputs is gate's 16 lanes, then up's.
    lane = (output // 16).to(tl.int64) * pairs * 32 + output % 16
    gate = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    up = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, pairs, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        there = pair < pairs
        x = tl.load(hidden + token[:, None] * pairs + pair[None, :], mask=live[:, None] & there[None, :], other=0)
        at = weights + lane[None, :] + pair[:, None] * 32
        mask = there[:, None] & inside[None, :]
        g = tl.load(at, mask=mask, other=0)
        u = tl.load(at + 16, mask=mask, other=0)
        gate = tl.dot(_odd(x, WIDE), _odd(g, WIDE), tl.dot(_even(x, WIDE), _even(g, WIDE), gate))
        up = tl.dot(_odd(x, WIDE), _odd(u, WIDE), tl.dot(_even(x, WIDE), _even(u, WIDE), up))
    if BIAS:
        at_bias = weights + bias_at + output // 16 * 32 + output % 16
        gate += tl.load(at_bias, mask=inside, other=0).to(tl.float32, bitcast=True)[None, :]
        up += tl.load(at_bias + 16, mask=inside, other=0).to(tl.float32, bitcast=True)[None, :]
    if ACTIVATION == 0:
        found = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == 1:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        found = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    elif ACTIVATION == 2:
        found = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1
        found = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    to = inner + row[:, None].to(tl.int64) * intermediate + output[None, :]
    tl.store(to, found.to(tl.bfloat16), mask=live[:, None] & inside[None, :])


@triton.jit
def down_kernel(
    inner,
    table,
    rows,
    scale,
    out,
    pairs,
    hidden_size,
    down_at,
    bias_at,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out[token] += scale * down(inner) of one tile of tokens and outputs, for one part of the inputs."""
    tile, part = tl.program_id(0), tl.program_id(2)
    # Packed experts lie on addresses that are multiples of 64 and more: said for loads of more than one lane at once.
    weights = tl.multiple_of(tl.load(table + 3 * tile), 64).to(tl.pointer_type(tl.int32))
    row = tl.load(table + 3 * tile + 1) + tl.arange(0, TOKENS)
    token = tl.load(rows + row, mask=row < tl.load(table + 3 * tile + 2), other=-1)
    live = token >= 0
    if tl.max(token, 0) < 0:
        return
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < hidden_size
    lane = down_at + (output // 32).to(tl.int64) * pairs * 32 + output % 32
    found = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(part * PAIRS, pairs, PARTS * PAIRS):
        pair = start + tl.arange(0, PAIRS)
        there = pair < pairs
        at_x = inner + row[:, None].to(tl.int64) * pairs + pair[None, :]
        x = tl.load(at_x, mask=live[:, None] & there[None, :], other=0)
        w = tl.load(weights + lane[None, :] + pair[:, None] * 32, mask=there[:, None] & inside[None, :], other=0)
        found = tl.dot(_odd(x, WIDE), _odd(w, WIDE), tl.dot(_even(x, WIDE), _even(w, WIDE), found))
    if BIAS:
        bias = tl.load(weights + bias_at + output, mask=inside, other=0).to(tl.float32, bitcast=True)
        found += tl.where(part == 0, bias, 0.0)[None, :]
    found *= tl.load(scale + row, mask=live, other=0.0)[:, None]
    tl.atomic_add(out + token[:, None] * hidden_size + output[None, :], found, mask=live[:, None] & inside[None, :])
