"""Kernel libraries and experts for the kernel tests, and the references they are held against."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fiddler_runtime.build import build_kernels
from fiddler_runtime.kernels import KernelLibrary, Kernels, empty_packed, make_pointers
from fiddler_runtime.machine import KNOWN_ISAS, missing_flags
from fiddlerc.codegen import generate
from fiddlerc.ir import KernelSources

# (hidden, intermediate), with tails of every kind: odd, below one block, several depth blocks.
SHAPES = ((8, 24), (129, 40), (41, 2880), (768, 33), (2880, 129), (256, 1408))


def write_sources(sources: KernelSources, folder: Path) -> Path:
    for name, text in sources.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@functools.cache
def library(hidden: int, intermediate: int, isas: tuple[str, ...] | None = None) -> KernelLibrary:
    sources = generate(hidden, intermediate, isas)
    with tempfile.TemporaryDirectory() as folder:
        return KernelLibrary(build_kernels(write_sources(sources, Path(folder))), sources.spec)


def open_isa(shape: tuple[int, int], isa: str, threads: int = 2) -> Kernels:
    """The kernels of exactly that instruction set; skips the test, naming the flag, if this CPU lacks it."""
    missing = missing_flags(isa)
    if missing:
        pytest.skip(f"{isa} needs CPU flags that are missing here: {' '.join(missing)}")
    kernels = library(*shape).open(isa, threads)
    assert kernels.isa == isa
    return kernels


@dataclass(frozen=True)
class Expert:
    """gate, up bf16 [I, H], down bf16 [H, I]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def packed(self, kernels: Kernels) -> torch.Tensor:
        packed = empty_packed(kernels.library.packed_bytes)
        packed.fill_(float("nan"))
        kernels.pack(self.gate, self.up, self.down, packed)
        return packed


def random_expert(shape: tuple[int, int], generator: torch.Generator) -> Expert:
    hidden, intermediate = shape

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    return Expert(matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate))


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


ISAS = KNOWN_ISAS
