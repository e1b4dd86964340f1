"""Activations other than SwiGLU and biases, on every instruction set: the oracles of test_kernels_numbers.py again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_samples import (
    FORMS,
    ISAS,
    Expert,
    activated,
    before,
    empty_packed,
    one_expert,
    open_isa,
    random_expert,
    reference,
    run_moe,
)

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import Kernels
from fiddler_runtime.lanes.expert import UnpackedExpert, unpack_expert
from fiddler_runtime.makespan import CPU, SPLIT
from fiddlerc.ir import Activation

SHAPE = (129, 198)  # odd pairs; three blocks of 64 rows and a tail, so that experts can be split
TOKENS = (1, 7, 33, 300)

every_form = pytest.mark.parametrize(("activation", "bias"), FORMS, ids=[f"{a}{'_bias' * b}" for a, b in FORMS])
every_isa = pytest.mark.parametrize("isa", ISAS)


def opened(isa: str, activation: Activation, bias: bool) -> Kernels:
    return open_isa(SHAPE, isa, 2, activation, bias)


def integers(activation: Activation, bias: bool, tokens: int) -> tuple[Expert, torch.Tensor]:
    """Numbers that stay exact in fp32: gates of 64 and more, where every activation is a gate of its own or 7.

    7 / (1 + e^-11.9) times the integers up to 8 rounds to a multiple of 7 in bf16.
    """
    generator = torch.Generator().manual_seed(1)
    hidden, intermediate = SHAPE

    def pick(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=generator)

    gate, up, down = (
        pick(0, 1, intermediate, hidden),
        pick(-1, 1, intermediate, hidden),
        pick(-1, 1, hidden, intermediate),
    )
    gate[:, 0] = 8
    x = torch.zeros(tokens, hidden, dtype=torch.int64)
    for row in x:
        row[pick(1, hidden - 1, 4)] = pick(1, 2, 4)
    x[:, 0] = 8
    up[:, 0] = 0
    sizes = (intermediate, intermediate, hidden) if bias else ()
    biases = tuple(pick(0, 3, size).bfloat16() for size in sizes)
    return Expert(gate.bfloat16(), up.bfloat16(), down.bfloat16(), biases), x.bfloat16()


@every_isa
@every_form
def test_integers_are_exact(activation: Activation, bias: bool, isa: str) -> None:
    with opened(isa, activation, bias) as kernels, opened("scalar", activation, bias) as scalar:
        for tokens in TOKENS:
            expert, hidden = integers(activation, bias, tokens)
            expected, _ = reference(expert, hidden, activation)
            assert torch.equal(expected, expected.round())
            out = one_expert(kernels, expert, hidden)
            assert torch.equal(out.double(), expected), tokens
            assert torch.equal(out, one_expert(scalar, expert, hidden)), tokens


@every_isa
@every_form
def test_random_numbers_are_within_the_bound(activation: Activation, bias: bool, isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    expert = random_expert(SHAPE, generator, bias)
    with opened(isa, activation, bias) as kernels:
        for tokens in TOKENS:
            # Up to where every part of an activation has been visited: limits, tails, the middle.
            hidden = (torch.randn(tokens, SHAPE[0], generator=generator) * 4).bfloat16()
            out = one_expert(kernels, expert, hidden)
            expected, bound = reference(expert, hidden, activation)
            excess = (out.double() - expected).abs() - bound
            assert (excess <= 0).all(), (tokens, excess.max())


@every_isa
@pytest.mark.parametrize("activation", ["silu", "gptoss", "gelu", "gelu_tanh"])
def test_the_activation_alone(activation: Activation, isa: str) -> None:
    """All bf16 gates from -20 to 20 and some beyond, one a row, against float64: exact rounding but for the last bit.

    The gate is an input times 1, the up projection likewise, and down is the identity.
    """
    bias = dict(FORMS).get(activation, False)
    hidden, intermediate = SHAPE
    steps = torch.cat([torch.logspace(-20, 4.35, 90, base=2.0), torch.tensor([30.0, 80.0, 88.0, 120.0, 1e4, 1e30])])
    gates = torch.cat([steps, -steps, torch.tensor([0.0, -0.0])]).bfloat16()
    ups = torch.tensor([1.0, -3.0, 6.5, -7.0, 9.0, -30.0]).bfloat16()
    x = torch.zeros(len(gates) * len(ups), hidden).bfloat16()
    x[:, 0], x[:, 1] = torch.cartesian_prod(gates, ups).T
    gate, up, down = (
        torch.zeros(size).bfloat16() for size in ((intermediate, hidden),) * 2 + ((hidden, intermediate),)
    )
    gate[:, 0], up[:, 1] = 1.0, 1.0
    down[:, :hidden].fill_diagonal_(1.0)
    biases = tuple(torch.zeros(size).bfloat16() for size in (intermediate, intermediate, hidden)) if bias else ()
    with opened(isa, activation, bias) as kernels:
        out = one_expert(kernels, Expert(gate, up, down, biases), x)
    g, u = x[:, 0].double(), x[:, 1].double()
    expected = activated(activation, g, u)
    # As in `reference`; what is as small as denormals may become zero.
    error = (16 + before(activation, g).clamp(max=2.0**17)) * 2.0**-24 * expected.abs() + 2.0**-118 * u.abs()
    low, high = ((expected + sign * error).bfloat16() for sign in (-1, 1))
    bad = (out[:, 0] < low) | (out[:, 0] > high)
    assert not bad.any(), (x[bad][:5, :2], out[bad][:5, 0], expected[bad][:5])
    assert torch.equal(out, out[:, :1].expand_as(out)), "every column alike, whatever its lane"


def test_the_reference_is_torchs_gelu() -> None:
    gate = torch.linspace(-12, 12, 1000, dtype=torch.float64)
    for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        expected = torch.nn.functional.gelu(gate, approximate=approximate)
        found = activated(activation, gate, torch.ones_like(gate))  # type: ignore[arg-type]
        assert torch.allclose(found, expected, rtol=0, atol=2.0**-48)


@every_isa
@every_form
def test_nan_and_infinity_as_in_torch(activation: Activation, bias: bool, isa: str) -> None:
    """An infinite gate or up goes through the limits of gpt-oss; NaN passes everywhere and stays in its row."""
    generator = torch.Generator().manual_seed(8)
    expert = random_expert(SHAPE, generator, bias)
    hidden = torch.randn(6, SHAPE[0], generator=generator).bfloat16()
    hidden[1, -1], hidden[2, 0], hidden[3, -1], hidden[4] = float("nan"), float("inf"), float("-inf"), 3e38
    with opened(isa, activation, bias) as kernels:
        out = one_expert(kernels, expert, hidden)
    gate_bias, up_bias, down_bias = (b.float() for b in expert.biases or (torch.zeros(1),) * 3)
    g, u = hidden.float() @ expert.gate.float().T + gate_bias, hidden.float() @ expert.up.float().T + up_bias
    inner = activated(activation, g, u).bfloat16().float()
    expected = inner @ expert.down.float().T + down_bias
    finite = expected.isfinite().all(1)
    assert finite.tolist() == [True, False, False, False, False, True]
    assert torch.equal(out.isfinite().all(1), finite)
    assert out[1].isnan().all()
    assert torch.allclose(out[finite], expected[finite], rtol=2**-6, atol=2**-5)


@every_isa
@pytest.mark.parametrize("what", ["gate", "up"])
def test_limits_bound_infinity(what: str, isa: str) -> None:
    """gpt-oss's activation of an infinity is finite, except for a gate of minus infinity (0 * inf in torch as well)."""
    expert = Expert(*(torch.zeros(s).bfloat16() for s in (SHAPE[::-1], SHAPE[::-1], SHAPE)),
                    tuple(torch.zeros(s).bfloat16() for s in (SHAPE[1], *SHAPE[::-1])))  # fmt: skip
    expert.down[:] = 1 / 256
    expert.biases[0][:], expert.biases[1][:] = 2.0, 2.0
    expert.biases[0 if what == "gate" else 1][7] = float("inf")
    with opened(isa, "gptoss", True) as kernels:
        out = one_expert(kernels, expert, torch.ones(2, 129).bfloat16())
    expected, bound = reference(expert, torch.ones(2, 129).bfloat16(), "gptoss")
    assert expected.isfinite().all()
    assert torch.allclose(out.double(), expected, rtol=2.0**-8)
    assert bound is not None


@every_isa
@every_form
def test_part_of_an_expert_adds_its_down_bias_once(activation: Activation, bias: bool, isa: str) -> None:
    """Bit for bit what the expert gives whose other rows add nothing: down has zeros for them.

    With odd pairs, of which all variants add up one after the other.
    """
    generator = torch.Generator().manual_seed(11)
    whole, split = random_expert(SHAPE, generator, bias), random_expert(SHAPE, generator, bias)
    rows = 128
    rest = Expert(split.gate, split.up, split.down.clone(), split.biases)
    rest.down[:, :rows] = 0
    hidden = torch.randn(40, SHAPE[0], generator=generator).bfloat16()
    ids = torch.tensor([[0, 1], [1, -1], [-1, 0]])[torch.randint(0, 3, (40,), generator=generator)]
    weights = torch.rand(40, 2, generator=generator)
    with opened(isa, activation, bias) as kernels:
        expected = run_moe(kernels, [whole, rest], hidden, ids, weights)
        strategy = np.array([CPU, SPLIT], np.uint8)
        assert torch.equal(run_moe(kernels, [whole, split], hidden, ids, weights, strategy, rows), expected)


@every_form
def test_pack_and_unpack_are_exact(activation: Activation, bias: bool) -> None:
    expert = random_expert(SHAPE, torch.Generator().manual_seed(3), bias)
    with opened("scalar", activation, bias) as kernels:
        form = kernels.library.spec.expert
        packed = expert.packed(kernels)
        assert packed.nbytes == form.packed_bytes
        found = UnpackedExpert.empty(form)
        for part in (*found.matrices, *found.biases):
            part.fill_(float("nan"))
        kernels.unpack(packed, *found.matrices, found.biases)
    on_device = unpack_expert(packed, form)
    wanted = (expert.gate, expert.up, expert.down, *expert.biases)
    for unpacked in (found, on_device):
        parts = (*unpacked.matrices, *unpacked.biases)
        assert all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=True))
    if bias:  # documented: 32 fp32 a block, gate before up, zeros for what is not there
        tail = packed.view(torch.float32)[-(13 + 5) * 32 :].view(-1, 32)
        gates, ups, downs = tail[:13, :16].flatten(), tail[:13, 16:].flatten(), tail[13:].flatten()
        for stored, given in zip((gates, ups, downs), expert.biases, strict=True):
            assert torch.equal(stored[: len(given)], given.float())
            assert not stored[len(given) :].any()


def test_biases_that_do_not_fit_are_refused() -> None:
    expert = random_expert(SHAPE, torch.Generator().manual_seed(3), bias=True)
    with opened("scalar", "silu", True) as kernels:
        packed = empty_packed(kernels.library.packed_bytes)
        matrices = (expert.gate, expert.up, expert.down)
        with pytest.raises(FiddlerError, match=r"wrong biases.*found 0, expected three"):
            kernels.pack(*matrices, packed)
        with pytest.raises(FiddlerError, match=r"wrong bias: found bfloat16 \[129\]"):
            kernels.pack(*matrices, packed, (expert.biases[2], *expert.biases[1:]))
        with pytest.raises(FiddlerError, match="wrong bias: found float32"):
            kernels.pack(*matrices, packed, tuple(bias.float() for bias in expert.biases))
    with open_isa((8, 24), "scalar") as plain, pytest.raises(FiddlerError, match=r"wrong biases.*expected none"):
        small = random_expert((8, 24), torch.Generator().manual_seed(3), bias=True)
        small.packed(plain)
