"""What a core can do at once: a contender that reads the weights and multiplies, and computes nothing.

Each limit of the roofline is that of a core which does one thing alone. These loops do the least of both that a kernel
has to do (both.hpp), in the kernels' place: threads, tasks and blocks are theirs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fiddler_runtime.build import build_kernels
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import KernelLibrary
from fiddler_runtime.machine import this_machine
from fiddlerc.codegen import generate
from fiddlerc.codegen.targets import TARGETS

from .contender import Contender, Ours, Weights
from .shapes import Shape

LOOPS = {
    "1 place": (1, 0, 1),
    "1 place, 8 KiB ahead": (1, 64, 1),
    "1 place, 8 KiB ahead, to L2": (1, 64, 2),
    "4 places": (4, 0, 1),
    "4 places, 1 KiB ahead": (4, 2, 1),
    "4 places, 4 KiB ahead": (4, 8, 1),
}
"""Places of a block's depth that are read in turn, rows ahead at each, the cache fetched into."""

_ROUNDS = 5
_SECONDS = 0.01


class Both(Contender):
    """The loop that is fastest with so many tokens on so many threads, on the memory that `ours` has packed.

    Raises FiddlerError for tiles: no loop of registers stands for those.
    """

    name = "both"
    packs = False
    computes = False

    def __init__(self, ours: Ours, shape: Shape, isa: str) -> None:
        if TARGETS[isa].tiles_from:
            raise FiddlerError("no loop for tiles", found=isa, expected="vectors", hint="--both --isa avx512_bf16")
        self._ours = ours
        self._loops = {name: Ours(_build(shape, isa, loop), isa, name) for name, loop in LOOPS.items()}
        self._fastest: dict[int, Ours] = {}

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        self._experts = weights.count
        for loop in self._loops.values():
            loop.share_packed(self._ours)

    def set_threads(self, threads: int) -> None:
        self._fastest.clear()
        for loop in self._loops.values():
            loop.set_threads(threads)

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        return self._choose(x, lambda loop, call: loop.expert(call % self._experts, x)).expert(e, x)

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return self._choose(x, lambda loop, _: loop.layer(x, ids, topk_weights)).layer(x, ids, topk_weights)

    def regions(self, e: int) -> list[torch.Tensor]:
        return self._ours.regions(e)

    def settle(self) -> float:
        return 0.0

    def close(self) -> None:
        for loop in self._loops.values():
            loop.close()

    def _choose(self, x: torch.Tensor, call: Callable[[Ours, int], object]) -> Ours:
        """The fastest with so many tokens: tried once."""
        tokens = x.shape[0]
        if tokens not in self._fastest:
            seconds: dict[str, list[float]] = {name: [] for name in self._loops}
            at = 0
            for _ in range(_ROUNDS):
                for name, loop in self._loops.items():
                    first, begin = at, time.perf_counter()
                    while (spent := time.perf_counter() - begin) < _SECONDS:
                        call(loop, at)
                        at += 1
                    seconds[name].append(spent / (at - first))
            self._fastest[tokens] = self._loops[min(seconds, key=lambda name: statistics.median(seconds[name]))]
        return self._fastest[tokens]


def _build(shape: Shape, isa: str, loop: tuple[int, int, int]) -> KernelLibrary:
    """The library for the shape with that loop in its kernel's place."""
    sources = generate(shape.hidden_size, shape.intermediate_size, (isa,), machine=this_machine("none"))
    include = '#include "fiddler/kernel.hpp"\n'
    macros = "".join(f"#define {a} {b}\n" for a, b in zip(("PLACES", "AHEAD", "LEVEL"), loop, strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        folder = sources.write(Path(scratch))
        kernel = folder / f"{sources.spec.variants[0].symbol}.cpp"
        text = kernel.read_text()
        for old, new in ((include, f'{include}{macros}#include "both.hpp"\n'), ("{ run<", "{ both<")):
            assert text.count(old) == 1, f"{kernel.name} has changed: {old!r}"
            text = text.replace(old, new)
        kernel.write_text(text)
        (folder / "both.hpp").write_text(Path(__file__).with_name("both.hpp").read_text())
        return KernelLibrary(build_kernels(folder), sources.spec)
