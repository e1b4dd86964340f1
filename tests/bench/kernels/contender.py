"""What is measured: our kernels, or a peer's, behind one small interface."""

from __future__ import annotations

import ctypes
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from fiddler_runtime import arena
from fiddler_runtime.build import build_kernels
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import KernelLibrary, Kernels, make_pointers
from fiddler_runtime.machine import Machine, lane_cpus, missing_flags, this_machine, usable_cores
from fiddlerc.codegen import generate

from .shapes import Shape


def need_avx512_bf16() -> None:
    """Raises ImportError where a peer made for it would refuse its calls, or end the process."""
    if missing := missing_flags("avx512_bf16"):
        raise ImportError(f"this CPU has no {', '.join(missing)}")


@dataclass(frozen=True)
class Weights:
    """Experts in checkpoint order: gate_up bf16 [n, 2I, H] with the gate first, down bf16 [n, H, I]. All differ."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @property
    def count(self) -> int:
        return self.gate_up.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]


def random_weights(shape: Shape, count: int, generator: torch.Generator) -> Weights:
    """`count` experts on the memory that the runtime uses. Each is the first one with its gate's rows moved on."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    gate_up = arena.allocate(count * 2 * intermediate * hidden * 2).view(count, 2 * intermediate, hidden)
    down = arena.allocate(count * hidden * intermediate * 2).view(count, hidden, intermediate)
    gate_up[0].copy_(torch.randn(2 * intermediate, hidden, generator=generator) / hidden**0.5)
    down[0].copy_(torch.randn(hidden, intermediate, generator=generator) / intermediate**0.5)
    for e in range(1, count):
        gate_up[e, :intermediate] = gate_up[0, :intermediate].roll(e, 0)
        gate_up[e, intermediate:] = gate_up[0, intermediate:]
        down[e] = down[0]
    return Weights(gate_up, down)


class Contender:
    """One implementation.

    name      in tables and on the command line
    packs     whether `prepare` makes a copy of the weights in a layout of its own
    computes  whether results are to be checked
    expert    y = down(silu(gate x) * up x) of one expert: bf16 x [m, H] to y [m, H]
    layer     sum over k of topk_weights[t, k] * expert(ids[t, k])(x[t]): ids int64 [m, k], topk_weights fp32 [m, k]
    regions   the memory of one expert's weights as a call reads it
    Either of `expert` and `layer` may be missing (NotImplementedError).
    """

    name: ClassVar[str]
    packs: ClassVar[bool] = True
    has_expert: ClassVar[bool] = True
    has_layer: ClassVar[bool] = True
    computes: ClassVar[bool] = True

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        """Once for each set of weights, for calls of `layer` or else of `expert`."""
        self.weights = weights

    def set_threads(self, threads: int) -> None:
        """Before the first call, and between calls."""
        torch.set_num_threads(threads)

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def regions(self, e: int) -> list[torch.Tensor]:
        return [self.weights.gate_up[e], self.weights.down[e]]

    def settle(self) -> float:
        """Seconds until its threads stop spinning after a call: the next probe would find them."""
        return 0.01

    def close(self) -> None:
        """Frees what `prepare` made."""
        del self.weights


class Ours(Contender):
    """A kernel library of this project, through the call that the runtime makes."""

    name = "ours"

    def __init__(self, library: KernelLibrary, isa: str | None, name: str = "ours") -> None:
        self.name = name  # type: ignore[misc]
        self.library = library
        self.isa = isa
        self._kernels: Kernels | None = None

    @property
    def kernels(self) -> Kernels:
        assert self._kernels is not None, "set_threads comes first"
        return self._kernels

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        stride = -(-self.library.packed_bytes // 4096) * 4096
        self._packed = arena.allocate(weights.count * stride).view(weights.count, stride // 2)
        self._packed = self._packed[:, : self.library.packed_bytes // 2]
        intermediate = weights.intermediate_size
        with self.library.open(self.isa, cpus=lane_cpus(usable_cores())) as kernels:
            for e in range(weights.count):
                kernels.settle(self._packed[e])
                gate, up = weights.gate_up[e, :intermediate], weights.gate_up[e, intermediate:]
                kernels.pack(gate, up, weights.down[e], self._packed[e])
        self.share_packed(self)

    def share_packed(self, other: Ours) -> None:
        """Reads the weights that the other one has packed."""
        self._packed = other._packed
        addresses = [row.data_ptr() for row in self._packed]
        self._pointers = make_pointers(addresses)
        self._one = [make_pointers([address]) for address in addresses]
        self._out = torch.empty(0)

    def set_threads(self, threads: int) -> None:
        if self._kernels is not None:
            self._kernels.close()
        self._kernels = self.library.open(self.isa, threads, cpus=lane_cpus(threads))

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        if self._out.shape != x.shape:
            self._out = torch.empty(x.shape)
            self._zeros, self._ones = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        self.kernels.moe(x, self._zeros, self._ones, self._one[e], self._out)
        return self._out

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if self._out.shape != x.shape:
            self._out = torch.empty(x.shape)
        self.kernels.moe(x, ids, topk_weights, self._pointers, self._out)
        return self._out

    def regions(self, e: int) -> list[torch.Tensor]:
        return [self._packed[e]]

    def settle(self) -> float:
        return 0.0

    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.close()
            self._kernels = None
        del self._packed


def build_library(shape: Shape, machine: Machine | None = None) -> KernelLibrary:
    """This checkout's library for a shape, cut for `machine` or else this one; built or from the cache."""
    sources = generate(shape.hidden_size, shape.intermediate_size, machine=machine or this_machine("none"))
    with tempfile.TemporaryDirectory() as folder:
        return KernelLibrary(build_kernels(sources.write(Path(folder))), sources.spec)


def open_library(path: Path, shape: Shape) -> KernelLibrary:
    """A library that was built elsewhere: a file, or the one for this shape in a folder.

    Raises FiddlerError if there is none, or one of another shape, ABI or packed size.
    """
    spec = generate(shape.hidden_size, shape.intermediate_size).spec
    file = path / f"lib{spec.name}.so" if path.is_dir() else path
    if not file.is_file():
        raise FiddlerError(
            "no kernel library there",
            found=str(file),
            expected="a file, or a folder of libNAME.so",
            hint=f"python -m tests.bench.kernels --shapes {shape.name} --build {path}",
        )
    try:
        describe = ctypes.CDLL(str(file)).fdl_describe
    except (OSError, AttributeError) as error:
        raise FiddlerError(f"cannot load the kernel library {file.name}", found=str(error)) from None
    describe.restype = ctypes.c_char_p
    isas = json.loads(describe())["isas"]  # another checkout's may differ from ours; all else must agree
    return KernelLibrary(file, replace(spec, variants=tuple(replace(spec.variants[0], isa=isa) for isa in isas)))
