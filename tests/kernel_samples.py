"""Kernel libraries and experts for the kernel tests, and the references they are held against."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fiddler_runtime.build import build_kernels
from fiddler_runtime.kernels import KernelLibrary, Kernels, empty_packed, make_pointers
from fiddler_runtime.machine import KNOWN_ISAS, missing_flags, refused
from fiddlerc.codegen import generate
from fiddlerc.codegen.selection import most_of_one_pass
from fiddlerc.codegen.targets import TARGETS
from fiddlerc.ir import Activation, KernelSources, Machine

# (hidden, intermediate), with tails of every kind: odd, below one block, several depth blocks.
SHAPES = ((8, 24), (129, 40), (41, 2880), (768, 33), (2880, 129), (256, 1408))

# Activations and biases beside plain SwiGLU.
FORMS: tuple[tuple[Activation, bool], ...] = (("silu", True), ("gptoss", True), ("gelu", False), ("gelu_tanh", True))


EMULATED = Path(__file__).parent / "kernels" / "emulated"


def emulated(sources: KernelSources, isas: tuple[str, ...] = ()) -> KernelSources:
    """The same with the tile instructions of AMX emulated, and with AVX2 `isas` and what this CPU lacks of AVX-512."""
    replaced = [TARGETS[isa] for isa in ("avx512_bf16", "avx512f") if isa in isas or missing_flags(isa)]
    headers = ("amx_permission.hpp", "amx_tiles.hpp", "vectors.hpp", *(target.header for target in replaced))
    files = {**sources.files, **{f"include/fiddler/{name}": (EMULATED / name).read_text() for name in headers}}
    for target in replaced:
        files["library.cpp"] = files["library.cpp"].replace(f" {target.check},", " has_avx2,")
        # The longer list first: the other one is its beginning.
        files["CMakeLists.txt"] = files["CMakeLists.txt"].replace(";".join(target.flags), "-mavx2;-mfma;-Og")
    return replace(sources, files=files)


@functools.cache
def library(
    hidden: int,
    intermediate: int,
    isas: tuple[str, ...] | None = None,
    activation: Activation = "silu",
    bias: bool = False,
    machine: Machine | None = None,
    emulate: tuple[str, ...] | None = None,
) -> KernelLibrary:
    sources = generate(hidden, intermediate, isas, activation=activation, bias=bias, machine=machine)
    if emulate is not None:
        sources = emulated(sources, emulate)
    with tempfile.TemporaryDirectory() as folder:
        return KernelLibrary(build_kernels(sources.write(Path(folder))), sources.spec)


def open_isa(
    shape: tuple[int, int],
    isa: str,
    threads: int = 2,
    activation: Activation = "silu",
    bias: bool = False,
    machine: Machine | None = None,
) -> Kernels:
    """The kernels of exactly that instruction set, cut for `machine`; emulated if this CPU lacks it.

    Skips the test, naming the flag, if there is no AVX2 to emulate it with.
    """
    if missing_flags("avx2") and (missing := missing_flags(isa)):
        pytest.skip(f"{isa} needs CPU flags that are missing here: {' '.join(missing)}")
    isas = None if machine is None else (isa,)
    emulate = () if refused("amx_bf16") else None
    kernels = library(*shape, isas, activation, bias, machine, emulate).open(isa, threads)
    assert kernels.isa == isa
    return kernels


@dataclass(frozen=True)
class Expert:
    """gate, up bf16 [I, H], down bf16 [H, I]; biases bf16 of gate [I], up [I], down [H], or none."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: tuple[torch.Tensor, ...] = ()

    def packed(self, kernels: Kernels) -> torch.Tensor:
        packed = empty_packed(kernels.library.packed_bytes)
        packed.fill_(float("nan"))
        kernels.pack(self.gate, self.up, self.down, packed, self.biases)
        return packed


def random_expert(shape: tuple[int, int], generator: torch.Generator, bias: bool = False) -> Expert:
    hidden, intermediate = shape
    sizes = (intermediate, intermediate, hidden) if bias else ()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    matrices = matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate)
    return Expert(*matrices, tuple(torch.randn(size, generator=generator).bfloat16() for size in sizes))


def run_moe(
    kernels: Kernels,
    experts: list[Expert | None],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    strategy: object = None,
    split_rows: int = 0,
) -> torch.Tensor:
    """One call; the output is poisoned with NaN first."""
    packed = [None if expert is None else expert.packed(kernels) for expert in experts]
    pointers = make_pointers([None if tensor is None else tensor.data_ptr() for tensor in packed])
    out = torch.full((hidden.shape[0], kernels.library.spec.hidden_size), float("nan"))
    kernels.moe(hidden, ids, weights, pointers, out, strategy, split_rows)  # type: ignore[arg-type]
    return out


def one_expert(kernels: Kernels, expert: Expert, hidden: torch.Tensor) -> torch.Tensor:
    """What one expert makes of every row, with weight 1."""
    tokens = hidden.shape[0]
    return run_moe(kernels, [expert], hidden, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))


def activated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What is multiplied by down, in the inputs' precision, from torch's own functions.

    Not gelu(): for negative gates it takes the difference of two numbers near 1.
    """
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gptoss":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * (1.702 * gate).sigmoid() * (up + 1)
    if activation == "gelu":
        return gate * torch.special.erfc(-gate / 2**0.5) / 2 * up
    return gate * ((8 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).sigmoid() * up


def before(activation: Activation, gate: torch.Tensor) -> torch.Tensor:
    """What the argument of the exponential is off by, in units of 2^-24: roundings times its size."""
    size = gate.abs()
    return {"silu": 0 * size, "gptoss": 4 * size, "gelu": size**2, "gelu_tanh": 10 * size + size**3}[activation]


def reference(
    expert: Expert, hidden: torch.Tensor, activation: Activation = "silu", tiny: float = 2.0**-126
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 result with the intermediate rounded to bf16, and how far a correct kernel may be from it.

    A sum of n fp32 terms is within n * (2^-24 * sum(|terms|) + tiny). That error may push an intermediate over a
    rounding boundary of bf16, so each may be any bf16 between the roundings of its ends.
    tiny  2^-126: VDPBF16PS takes denormals for zero. 2^-149, where they are kept, is their last bit
    """
    x, gate, up, down = (t.double() for t in (hidden, expert.gate, expert.up, expert.down))
    gate_bias, up_bias, down_bias = (b.double() for b in expert.biases or (torch.zeros(1),) * 3)
    unit = 2.0**-24
    terms, depth = expert.gate.shape[1] + 1, expert.gate.shape[0] + 1
    g, u = x @ gate.T + gate_bias, x @ up.T + up_bias
    g_error = terms * (unit * (x.abs() @ gate.abs().T + gate_bias.abs()) + tiny)
    u_error = terms * (unit * (x.abs() @ up.abs().T + up_bias.abs()) + tiny)
    h = activated(activation, g, u)
    slope = activated(activation, g, torch.ones_like(u)).abs()  # of up, at most twice that: gptoss counts from -1
    # No activation's slope in the gate is over 1.13. Exponential, division and products round to 16 units together;
    # what rounds before the exponential counts as often as its argument is large.
    error = (
        1.13 * g_error * (u.abs() + u_error + (activation == "gptoss"))
        + slope * u_error
        + (16 + before(activation, g)) * unit * h.abs()
    )
    rounded = h.bfloat16().double()
    h_error = torch.maximum(
        ((h + error).bfloat16().double() - rounded).abs(), ((h - error).bfloat16().double() - rounded).abs()
    )
    size = (rounded.abs() + h_error) @ down.abs().T + down_bias.abs()
    bound = h_error @ down.abs().T + depth * (unit * size + tiny)
    return rounded @ down.T + down_bias, bound


ISAS = KNOWN_ISAS


def orders(kernels: Kernels) -> tuple[int, ...]:
    """The fewest rows of an expert, ascending, from which on sums are made in another order than of fewer.

    Where one pass is enough, several places may be read in turn; tiles read larger pieces of them than vectors.
    """
    target = TARGETS[kernels.isa]
    (cut,) = (v.blocking for v in kernels.library.spec.variants if v.isa == kernels.isa)
    many = 1 if target.core.places == 1 else most_of_one_pass(target, cut) + 1
    return tuple(sorted({1, target.tiles_from or 1, many}))
