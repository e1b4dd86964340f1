"""The packed layout: exactly reversible, zero-padded, and the documented order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import SHAPES, Expert, library, open_isa, random_expert

from fiddler_runtime.plan import packed_bytes


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
    with library(hidden, intermediate).open("scalar", 1) as kernels:
        packed = expert.packed(kernels)
        matrices = [torch.empty_like(m) for m in (expert.gate, expert.up, expert.down)]
        kernels.unpack(packed, *matrices)
    for found, expected in zip(matrices, (expert.gate, expert.up, expert.down), strict=True):
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
