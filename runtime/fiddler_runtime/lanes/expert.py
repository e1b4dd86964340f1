"""One expert on an accelerator: the mathematics, and the layout in which its weights arrive there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..plan import packed_bytes

GATE_UP_LANES = 32  # outputs of gate, and as many of up, in a block of the packed layout
DOWN_LANES = 64


def run_expert(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[rows] += weights * down(silu(gate(hidden[rows])) * up(hidden[rows])), on whatever device the tensors are.

    hidden bf16 [T, H]; rows int64 [n]; weights fp32 [n]; gate_up bf16 [2I, H] with gate first; down bf16 [H, I];
    out fp32 [T, H]. Intermediates are bf16, as in transformers; the weighted sum over experts is fp32.
    """
    gate, up = F.linear(hidden.index_select(0, rows), gate_up).chunk(2, dim=-1)
    result = F.linear(F.silu(gate).mul_(up), down)
    out.index_add_(0, rows, result * weights.unsqueeze(1))


def unpack_expert(packed: torch.Tensor, hidden_size: int, intermediate_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed host layout (docs/kernels.md) to (gate_up [2I, H], down [H, I]), both contiguous, on packed's device.

    packed is bf16 [packed_bytes / 2]. Pairs of bf16 travel as one 32-bit element, so this is a plain transposition.
    """
    gate_up = packed.new_empty((2 * intermediate_size, hidden_size))
    down = packed.new_empty((hidden_size, intermediate_size))
    unpack_expert_into(packed, gate_up, down)
    return gate_up, down


def unpack_expert_into(packed: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """As `unpack_expert`, into gate_up [2I, H] and down [H, I] that exist already."""
    hidden_size, intermediate_size = down.shape
    if packed.numel() * 2 != packed_bytes(hidden_size, intermediate_size):
        raise ValueError(f"packed has {packed.numel() * 2} bytes, not those of {hidden_size} x {intermediate_size}")
    hidden_pairs, intermediate_pairs = -(-hidden_size // 2), -(-intermediate_size // 2)
    gate_blocks, down_blocks = -(-intermediate_size // GATE_UP_LANES), -(-hidden_size // DOWN_LANES)
    split = gate_blocks * hidden_pairs * 2 * GATE_UP_LANES
    lanes = packed.view(torch.int32)

    # [block, pair, gate|up, lane] -> [gate|up, block, lane, pair]
    both = lanes[:split].view(gate_blocks, hidden_pairs, 2, GATE_UP_LANES).permute(2, 0, 3, 1)
    _fill(gate_up.view(2, intermediate_size, hidden_size), both, gate_blocks * GATE_UP_LANES, hidden_pairs)
    # [block, pair, lane] -> [block, lane, pair]
    rows = lanes[split:].view(down_blocks, intermediate_pairs, DOWN_LANES).permute(0, 2, 1).unsqueeze(0)
    _fill(down.view(1, hidden_size, intermediate_size), rows, down_blocks * DOWN_LANES, intermediate_pairs)


def _fill(target: torch.Tensor, lanes: torch.Tensor, padded_rows: int, pairs: int) -> None:
    """target bf16 [m, rows, columns] from lanes int32 [m, block, lane, pair], leaving out the padding."""
    matrices, rows, columns = target.shape
    if rows == padded_rows and columns == 2 * pairs:
        target.view(torch.int32).view(lanes.shape).copy_(lanes)
        return
    padded = lanes.contiguous().view(matrices, padded_rows, pairs).view(torch.bfloat16)
    target.copy_(padded[:, :rows, :columns])
