"""Beside torch itself: an error below that of its bf16, and the same at the ends of the range, as its fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_samples import FORMS, ISAS, SHAPES, Expert, one_expert, open_isa, random_expert, reference
from torch.nn.functional import gelu, linear, silu

from fiddlerc.ir import Activation

SHAPE = (129, 198)
ALL_FORMS: tuple[tuple[Activation, bool], ...] = (("silu", False), *FORMS)
CASES = [(SHAPE, *form) for form in ALL_FORMS] + [(shape, "silu", False) for shape in SHAPES]

every_isa = pytest.mark.parametrize("isa", ISAS)


def eager(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As transformers' experts compute it, in the inputs' precision."""
    if activation == "gptoss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    }
    return functions[activation](gate) * up


def by_torch(
    expert: Expert,
    hidden: torch.Tensor,
    activation: Activation,
    dtype: torch.dtype,
    activated_in: torch.dtype | None = None,
) -> torch.Tensor:
    gate, up, down, x = (t.to(dtype) for t in (expert.gate, expert.up, expert.down, hidden))
    gate_bias, up_bias, down_bias = (b.to(dtype) for b in expert.biases) if expert.biases else (None,) * 3
    g, u = (t.to(activated_in or dtype) for t in (linear(x, gate, gate_bias), linear(x, up, up_bias)))
    return linear(eager(activation, g, u).to(dtype), down, down_bias)


@every_isa
@pytest.mark.parametrize(("shape", "activation", "bias"), CASES)
def test_the_error_is_never_above_torchs(shape: tuple[int, int], activation: Activation, bias: bool, isa: str) -> None:
    """Of a call's result as a whole, against float64 throughout. What was found: docs/kernels.md, Numbers."""
    generator = torch.Generator().manual_seed(2)
    expert = random_expert(shape, generator, bias)
    worst = 0.0
    with open_isa(shape, isa, 2, activation, bias) as kernels:
        for scale in (1, 4):
            for tokens in (1, 2, 3, 4, 7, 14, 15, 33, 300):
                hidden = (torch.randn(tokens, shape[0], generator=generator) * scale).bfloat16()
                exact = by_torch(expert, hidden, activation, torch.float64)
                ours = (one_expert(kernels, expert, hidden) - exact).norm()
                torchs = (by_torch(expert, hidden, activation, torch.bfloat16) - exact).norm()
                worst = max(worst, float(ours / torchs))
                assert ours <= torchs, (tokens, scale)
    print(f"{isa} {activation}{'_bias' * bias} {shape[0]}x{shape[1]}: at most {worst:.2f} of torch's")


@every_isa
@pytest.mark.parametrize(("activation", "bias"), ALL_FORMS)
def test_infinities_are_where_torchs_are(activation: Activation, bias: bool, isa: str) -> None:
    """All of a row's gates overflow, or none, and so do its ups, to either side; down adds or subtracts them all.

    The activation of fp32's infinities is that of float64: torch's vectorised fp32 GELU makes NaN of +inf on some CPUs.
    """
    ends = torch.tensor([3e38, -3e38, 1.0, -1.0, 0.0]).bfloat16()
    hidden = torch.zeros(len(ends) ** 2, SHAPE[0]).bfloat16()
    hidden[:, 0], hidden[:, 1] = torch.cartesian_prod(ends, ends).T
    expert = Expert(*(torch.zeros(s).bfloat16() for s in (SHAPE[::-1], SHAPE[::-1], SHAPE)),
                    tuple(torch.zeros(s).bfloat16() for s in (SHAPE[1], *SHAPE[::-1])) if bias else ())  # fmt: skip
    expert.gate[:, 0], expert.up[:, 1] = 4, 4
    expert.down[::2], expert.down[1::2] = 1, -1
    expected = by_torch(expert, hidden, activation, torch.float32, torch.float64)
    assert expected.isnan().any() and (expected.isposinf().any() or activation == "gptoss")
    with open_isa(SHAPE, isa, 2, activation, bias) as kernels:
        for first, last in ((0, 25), (0, 1), (5, 6), (24, 25)):  # several rows of an expert, and one
            out, wanted = one_expert(kernels, expert, hidden[first:last]), expected[first:last]
            assert torch.equal(out.isnan(), wanted.isnan())
            assert torch.equal(out.isposinf(), wanted.isposinf())
            assert torch.equal(out.isneginf(), wanted.isneginf())


def flushed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.where(tensor.abs() >= 2.0**-126, 0)


@every_isa
@pytest.mark.parametrize("what", ["inputs", "up", "intermediate", "down"])
def test_denormals_count(what: str, isa: str) -> None:
    """As in torch's fp32, to a last bit of theirs a term; bf16 instructions take them for zero (the manual says so).

    Their products are made large again: by gates of 64 and down weights of 2^100, or by large intermediates.
    """
    generator = torch.Generator().manual_seed(10)
    expert = random_expert(SHAPE, generator)
    hidden = torch.randn(5, SHAPE[0], generator=generator).bfloat16()
    expert.gate[:] = 0
    expert.gate[:, 0], hidden[:, 0], expert.up[:, 0] = 8, 8, 0

    def scaled(matrix: torch.Tensor, exponent: int) -> None:
        matrix[:] = (matrix.double() * 2.0**exponent).bfloat16()

    if what == "down":
        scaled(expert.up, 100)
        scaled(expert.down, -128)
    else:
        if what == "inputs":
            scaled(hidden[:, 1:], -130)
        elif what == "up":
            scaled(expert.up, -128)
        else:  # numbers that are not denormal, products of 2^-140
            scaled(hidden[:, 1:], -70)
            scaled(expert.up, -64)
        scaled(expert.down, 100)
    flushes = isa.endswith("_bf16")
    if flushes:
        expert = replace(expert, gate=flushed(expert.gate), up=flushed(expert.up), down=flushed(expert.down))
        hidden = flushed(hidden)
    # What is made of zeros is zero, to the same bits; only denormal products of other numbers are lost besides.
    tiny = 2.0**-126 if flushes and what == "intermediate" else 2.0**-149
    expected, bound = reference(expert, hidden, tiny=tiny)
    assert expected.norm() > 4 * bound.norm() or flushes, "a result of zeros would be seen"
    with open_isa(SHAPE, isa) as kernels:
        for rows in (slice(0, 5), slice(0, 1)):
            excess = (one_expert(kernels, expert, hidden[rows]) - expected[rows]).abs() - bound[rows]
            assert (excess <= 0).all(), excess.max()
