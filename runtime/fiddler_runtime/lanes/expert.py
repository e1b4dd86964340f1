"""One expert on an accelerator: the mathematics, and the layout in which its weights arrive there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..orders import StoredExpert
from ..plan import Activation, ExpertForm

GATE_UP_LANES = 16  # outputs of gate, and as many of up, in a block of the packed layout
DOWN_LANES = 32
LIMIT = 7.0  # of gpt-oss's activation


@dataclass(frozen=True)
class UnpackedExpert:
    """An expert as an accelerator computes with it: bf16, contiguous, on one device.

    gate_up [2I, H], gate first; down [H, I]; gate_up_bias [2I] and down_bias [H], or None where experts have none
    """

    activation: Activation
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @staticmethod
    def empty(form: ExpertForm, device: torch.device | str = "cpu") -> UnpackedExpert:
        """Room for one expert, uninitialised."""

        def room(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device)

        rows, width = form.intermediate_size, form.hidden_size
        biases = (room(2 * rows), room(width)) if form.bias else ()
        return UnpackedExpert(form.activation, room(2 * rows, width), room(width, rows), *biases)

    def to(self, device: torch.device) -> UnpackedExpert:
        """A copy on another device."""
        parts = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        moved = [None if part is None else part.to(device) for part in parts]
        return UnpackedExpert(self.activation, *moved)  # type: ignore[arg-type]

    def fill(self, other: UnpackedExpert | StoredExpert) -> None:
        """Copies another one of the same shape into this one, wherever the two are."""
        for mine, theirs in zip((*self.matrices, *self.biases), (*other.matrices, *other.biases), strict=True):
            mine.copy_(theirs)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views: gate [I, H], up [I, H], down [H, I]."""
        gate, up = self.gate_up.chunk(2)
        return gate, up, self.down

    @property
    def biases(self) -> tuple[torch.Tensor, ...]:
        """Views: gate [I], up [I], down [H]; empty where there are none."""
        if self.gate_up_bias is None or self.down_bias is None:
            return ()
        return (*self.gate_up_bias.chunk(2), self.down_bias)

    def rows(self, first: int) -> UnpackedExpert:
        """Room within this one for an expert of its first intermediate rows alone."""
        hidden = self.down.shape[0]
        gate_up = self.gate_up.view(-1)[: 2 * first * hidden].view(2 * first, hidden)
        down = self.down.view(-1)[: hidden * first].view(hidden, first)
        bias = None if self.gate_up_bias is None else self.gate_up_bias[: 2 * first]
        return UnpackedExpert(self.activation, gate_up, down, bias, self.down_bias)


@dataclass(frozen=True)
class PackedExpert:
    """An expert in the packed layout (docs/kernels.md) on one device: words int32 [packed_bytes / 4]."""

    form: ExpertForm
    words: torch.Tensor

    @staticmethod
    def empty(form: ExpertForm, device: torch.device | str = "cpu") -> PackedExpert:
        """Room for one expert, uninitialised."""
        return PackedExpert(form, torch.empty(form.packed_bytes // 4, dtype=torch.int32, device=device))

    @property
    def numbers(self) -> torch.Tensor:
        """The same as bf16, as packed experts lie in host memory."""
        return self.words.view(torch.bfloat16)

    def to(self, device: torch.device) -> UnpackedExpert:
        """Its matrices on another device. Nothing is unpacked where it is."""
        return unpack_expert(self.numbers.to(device), self.form)

    def rows(self, first: int) -> PackedExpert:
        """Room within this one for an expert of its first intermediate rows alone."""
        form = replace(self.form, intermediate_size=first)
        return PackedExpert(form, self.words[: form.packed_bytes // 4])


def run_expert(
    hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, expert: UnpackedExpert, out: torch.Tensor
) -> None:
    """out[rows] += weights * expert(hidden[rows]), on whatever device the tensors are.

    hidden bf16 [T, H]; rows int64 [n]; weights fp32 [n]; out fp32 [T, H]. Intermediates are bf16, as in transformers;
    the weighted sum over experts is fp32.
    """
    out.index_add_(0, rows, expert_result(hidden.index_select(0, rows), expert) * weights.unsqueeze(1))


def expert_result(hidden: torch.Tensor, expert: UnpackedExpert) -> torch.Tensor:
    """expert(hidden), bf16 [n, H] -> bf16 [n, H]."""
    gate, up = F.linear(hidden, expert.gate_up, expert.gate_up_bias).chunk(2, dim=-1)
    return F.linear(activate(expert.activation, gate, up), expert.down, expert.down_bias)


def activate(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What is multiplied by down, from gate and up [n, I] (plan.Activation has the formulas)."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gptoss":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(gate * 1.702) * (up + 1)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def unpack_expert(packed: torch.Tensor, form: ExpertForm) -> UnpackedExpert:
    """The packed host layout (docs/kernels.md) in matrix form, on packed's device.

    packed is bf16 [packed_bytes / 2]. Pairs of bf16 travel as one 32-bit element, so this is a plain transposition.
    """
    out = UnpackedExpert.empty(form, packed.device)
    unpack_expert_into(packed, out)
    return out


def unpack_expert_into(packed: torch.Tensor, out: UnpackedExpert) -> None:
    """As `unpack_expert`, into one that exists already."""
    hidden_size, intermediate_size = out.down.shape
    form = ExpertForm(hidden_size, intermediate_size, out.activation, out.down_bias is not None)
    if packed.numel() * 2 != form.packed_bytes:
        raise ValueError(f"packed has {packed.numel() * 2} bytes, not those of {hidden_size} x {intermediate_size}")
    hidden_pairs, intermediate_pairs = -(-hidden_size // 2), -(-intermediate_size // 2)
    gate_blocks, down_blocks = -(-intermediate_size // GATE_UP_LANES), -(-hidden_size // DOWN_LANES)
    lanes = packed.view(torch.int32)
    first = gate_blocks * hidden_pairs * 2 * GATE_UP_LANES
    last = first + down_blocks * intermediate_pairs * DOWN_LANES
    # [block, pair, gate|up, lane] -> [gate|up, block, lane, pair]
    both = lanes[:first].view(gate_blocks, hidden_pairs, 2, GATE_UP_LANES).permute(2, 0, 3, 1)
    _fill(out.gate_up.view(2, intermediate_size, hidden_size), both, gate_blocks * GATE_UP_LANES, hidden_pairs)
    # [block, pair, lane] -> [block, lane, pair]
    rows = lanes[first:last].view(down_blocks, intermediate_pairs, DOWN_LANES).permute(0, 2, 1).unsqueeze(0)
    _fill(out.down.view(1, hidden_size, intermediate_size), rows, down_blocks * DOWN_LANES, intermediate_pairs)
    if out.gate_up_bias is not None and out.down_bias is not None:
        by_block = lanes[last:].view(torch.float32).view(-1, 2, GATE_UP_LANES)
        both = by_block[:gate_blocks].permute(1, 0, 2).reshape(2, -1)[:, :intermediate_size]
        out.gate_up_bias.view(2, intermediate_size).copy_(both)
        out.down_bias.copy_(by_block[gate_blocks:].reshape(-1)[:hidden_size])


def pack_expert_into(expert: UnpackedExpert, packed: torch.Tensor) -> None:
    """The inverse of `unpack_expert_into`: packed bf16 [packed_bytes / 2], on the expert's device."""
    hidden_size, intermediate_size = expert.down.shape
    hidden_pairs, intermediate_pairs = -(-hidden_size // 2), -(-intermediate_size // 2)
    gate_blocks, down_blocks = -(-intermediate_size // GATE_UP_LANES), -(-hidden_size // DOWN_LANES)
    lanes = packed.view(torch.int32)
    first = gate_blocks * hidden_pairs * 2 * GATE_UP_LANES
    last = first + down_blocks * intermediate_pairs * DOWN_LANES
    both = _padded(expert.gate_up.view(2, intermediate_size, hidden_size), gate_blocks * GATE_UP_LANES, hidden_pairs)
    both = both.view(2, gate_blocks, GATE_UP_LANES, hidden_pairs).permute(1, 3, 0, 2)
    lanes[:first].view(both.shape).copy_(both)
    rows = _padded(expert.down.unsqueeze(0), down_blocks * DOWN_LANES, intermediate_pairs)
    rows = rows.view(down_blocks, DOWN_LANES, intermediate_pairs).permute(0, 2, 1)
    lanes[first:last].view(rows.shape).copy_(rows)
    if expert.gate_up_bias is not None and expert.down_bias is not None:
        by_lane = lanes[last:].view(torch.float32)
        by_lane.zero_()
        by_block = by_lane.view(-1, 2, GATE_UP_LANES)
        both = F.pad(expert.gate_up_bias.view(2, -1), (0, gate_blocks * GATE_UP_LANES - intermediate_size))
        by_block[:gate_blocks].copy_(both.view(2, gate_blocks, GATE_UP_LANES).permute(1, 0, 2))
        by_block[gate_blocks:].view(-1)[:hidden_size].copy_(expert.down_bias)


def _padded(matrices: torch.Tensor, rows: int, pairs: int) -> torch.Tensor:
    """bf16 [m, r, c] as pairs, int32 [m, rows, pairs], with zeros for what there is not."""
    _, present, columns = matrices.shape
    return F.pad(matrices, (0, 2 * pairs - columns, 0, rows - present)).contiguous().view(torch.int32)


def _fill(target: torch.Tensor, lanes: torch.Tensor, padded_rows: int, pairs: int) -> None:
    """target bf16 [m, rows, columns] from lanes int32 [m, block, lane, pair], leaving out the padding."""
    matrices, rows, columns = target.shape
    if rows == padded_rows and columns == 2 * pairs:
        target.view(torch.int32).view(lanes.shape).copy_(lanes)
        return
    padded = lanes.contiguous().view(matrices, padded_rows, pairs).view(torch.bfloat16)
    target.copy_(padded[:, :rows, :columns])
