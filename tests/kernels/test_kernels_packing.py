"""The packed layout: exactly reversible, zero-padded, the documented order, from every order of a checkpoint."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import SHAPES, Expert, open_isa, random_expert

from fiddler_runtime import orders
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import empty_packed
from fiddler_runtime.plan import ExpertTensors, packed_bytes


def packed_by_definition(expert: Expert) -> torch.Tensor:
    """The layout as docs/kernels.md states it, with torch's own reshaping."""
    intermediate, hidden = expert.gate.shape

    def pad(matrix: torch.Tensor, rows: int) -> torch.Tensor:
        out = torch.zeros(-(-matrix.shape[0] // rows) * rows, -(-matrix.shape[1] // 2) * 2, dtype=torch.bfloat16)
        out[: matrix.shape[0], : matrix.shape[1]] = matrix
        return out

    gate, up, down = pad(expert.gate, 16), pad(expert.up, 16), pad(expert.down, 32)
    blocks = torch.cat([gate.view(-1, 16, gate.shape[1]), up.view(-1, 16, up.shape[1])], dim=1)
    first = blocks.view(len(blocks), 32, -1, 2).permute(0, 2, 1, 3)
    second = down.view(-1, 32, down.shape[1] // 2, 2).permute(0, 2, 1, 3)
    assert intermediate <= gate.shape[0] and hidden <= down.shape[0]
    return torch.cat([first.reshape(-1), second.reshape(-1)])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s[0]}_i{s[1]}")
@pytest.mark.parametrize("threads", [1, 2])
def test_pack_follows_the_layout_and_unpack_reverses_it(shape: tuple[int, int], threads: int) -> None:
    expert = random_expert(shape, torch.Generator().manual_seed(1))
    with open_isa(shape, "scalar", threads) as kernels:
        packed = expert.packed(kernels)
        assert packed.nbytes == packed_bytes(*shape) == kernels.library.packed_bytes
        assert torch.equal(packed, packed_by_definition(expert))
        matrices = [torch.full_like(m, float("nan")) for m in (expert.gate, expert.up, expert.down)]
        kernels.unpack(packed, *matrices)
    for found, expected in zip(matrices, (expert.gate, expert.up, expert.down), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(8, 24), (129, 40)]))
def test_every_bit_pattern_survives(seed: int, shape: tuple[int, int]) -> None:
    """NaN payloads and denormals too: packing moves bits and never calculates."""
    hidden, intermediate = shape
    generator = torch.Generator().manual_seed(seed)

    def bits(rows: int, columns: int) -> torch.Tensor:
        raw = torch.randint(-(2**15), 2**15, (rows, columns), generator=generator, dtype=torch.int16)
        return raw.view(torch.bfloat16)

    expert = Expert(bits(intermediate, hidden), bits(intermediate, hidden), bits(hidden, intermediate))
    with open_isa(shape, "scalar", 1) as kernels:
        packed = expert.packed(kernels)
        matrices = [torch.empty_like(m) for m in (expert.gate, expert.up, expert.down)]
        kernels.unpack(packed, *matrices)
    for found, expected in zip(matrices, (expert.gate, expert.up, expert.down), strict=True):
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


# gate and up in one tensor, [inputs, outputs], gate and up in turn
ORDERS = [order for order in itertools.product([False, True], repeat=3) if order[0] or not order[2]]


def stored(names: ExpertTensors, *parts: torch.Tensor) -> torch.Tensor:
    """The bytes of a checkpoint's tensor that holds `parts`, by torch's own reshaping."""
    both = torch.stack(parts, 1).flatten(0, 1) if names.interleaved else torch.cat(parts)
    return (both.T if names.transposed and both.dim() == 2 else both).contiguous().view(-1)


@pytest.mark.parametrize(("joined", "transposed", "interleaved"), ORDERS)
@pytest.mark.parametrize(
    ("shape", "bias"), [*((shape, False) for shape in SHAPES), ((1, 1), False), ((129, 200), True)]
)
def test_pack_takes_every_order_of_a_checkpoint_as_it_is(
    shape: tuple[int, int], bias: bool, joined: bool, transposed: bool, interleaved: bool
) -> None:
    """The same bytes as from rows, and back; the numbers were put where they are by torch.cat, stack and T."""
    names = ExpertTensors(
        "gate", "gate" if joined else "up", "down", "bg", "bg" if joined else "bu", "bd", transposed, interleaved
    )
    expert = random_expert(shape, torch.Generator().manual_seed(4), bias)
    pairs = [(expert.gate, expert.up), *([expert.biases[:2]] if bias else [])]
    alone = [expert.down, *expert.biases[2:]]
    # As read from a shard: a piece of one buffer, at an odd address.
    shift = torch.zeros(1, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    for pair, one in zip(pairs, alone, strict=True):
        for held in ([pair] if joined else [pair[:1], pair[1:]]) + [(one,)]:  # type: ignore[operator]
            memory = torch.cat([shift, stored(names, *held)])[1:]
            kept += orders.views(memory, len(held), held[0].shape, names)
            assert orders.whole(kept[-len(held) :], names) is not None
    with open_isa(shape, "scalar", bias=bias) as kernels:
        expected = expert.packed(kernels)
        found = empty_packed(expected.nbytes)
        found.fill_(float("nan"))
        kernels.pack(*kept[:3], found, kept[3:])
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        back = [torch.full_like(part, float("nan")) for part in (expert.gate, expert.up, expert.down, *expert.biases)]
        kernels.unpack(found, *back[:3], back[3:])
    assert all(
        torch.equal(a, b) for a, b in zip(back, (expert.gate, expert.up, expert.down, *expert.biases), strict=True)
    )


def test_other_orders_are_refused() -> None:
    expert = random_expert((129, 40), torch.Generator().manual_seed(4))
    gaps = torch.zeros(80, 260, dtype=torch.bfloat16)[::2, ::2][:, :129]
    turn = torch.zeros(129, 80, dtype=torch.bfloat16).T
    with open_isa((129, 40), "scalar") as kernels:
        packed = empty_packed(kernels.library.packed_bytes)
        with pytest.raises(FiddlerError, match=r"wrong gate weights: found bfloat16 \[40, 129\] strides \(520, 2\)"):
            kernels.pack(gaps, gaps, expert.down, packed)
        with pytest.raises(FiddlerError, match="wrong up weights"):
            kernels.pack(expert.gate, turn[:40], expert.down, packed)
        with pytest.raises(FiddlerError, match="wrong gate weights"):
            kernels.pack(turn[1::2], turn[::2], expert.down, packed)
        with pytest.raises(FiddlerError, match="wrong down weights"):
            kernels.pack(expert.gate, expert.up, torch.zeros(40, 258, dtype=torch.bfloat16)[:, ::2].T, packed)
        with pytest.raises(FiddlerError, match="wrong gate to unpack to"):
            kernels.unpack(packed, turn[:40], turn[40:], expert.down)
