"""Register tiles from the first-level cache, % of the peak: python -m tests.bench.tiles [--isa ISA] [--rounds N].

What a tile lacks here is its own or comes with the core: weights and inputs stay in the cache. (Tiles that fetch still
ask for lines behind them.) A tile is 128 pairs deep, as a pass of AVX2 is with 512 KiB of second-level cache; entry and
exit weigh more than in a deeper one. --expert SHAPE lets whole experts take turns with the tile of most tokens, on one
thread: what both lack is the core's.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fiddler_runtime.build import find_toolchain
from fiddler_runtime.machine import KNOWN_ISAS, missing_flags, this_machine
from fiddlerc.codegen import generate
from fiddlerc.codegen.selection import UNIT_TOKENS
from fiddlerc.codegen.targets import TARGETS

from .kernels.contender import Ours, build_library, random_weights
from .kernels.shapes import Shape, load_shape

SIZE = 256
"""Inputs: 16 KiB of weights, and 14 at most of a tile's inputs."""
SAMPLE_S = 0.002
WEIGHTS_BYTES = 512 << 20  # of experts that take turns: beyond the caches
# Tiles of AMX are no register tiles of these functions.
ISAS = tuple(isa for isa in KNOWN_ISAS if not TARGETS[isa].tiles_from)


def build(isa: str, folder: Path) -> tuple[ctypes.CDLL, int]:
    """The library of tiles.cpp for that instruction set, and the most tokens of a tile."""
    sources = generate(SIZE, SIZE, (isa,), machine=this_machine("none"))
    sources.write(folder)
    variant, target, library = sources.spec.variants[0], TARGETS[isa], folder / "tiles.so"
    subprocess.run(
        [
            str(find_toolchain().compiler), "-std=c++17", "-O3", "-Wno-psabi", "-Wno-ignored-attributes",
            "-ffp-contract=off", *target.flags, "-shared", "-fPIC", f"-I{folder}", f"-I{folder / 'include'}",
            f'-DKERNEL="{folder / variant.symbol}.cpp"', f"-DISA={target.policy}",
            str(Path(__file__).with_suffix(".cpp")), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    built = ctypes.CDLL(str(library))
    built.peak.restype = built.tiles.restype = ctypes.c_double
    built.results.restype = ctypes.POINTER(ctypes.c_float)
    built.peak.argtypes = (ctypes.c_int64,)
    built.tiles.argtypes = (ctypes.c_int64, ctypes.c_int64)
    return built, variant.blocking.tile_tokens


def gflops(work: Callable[[int], float], times: int = 64) -> float:
    """GFLOP/s of the work, repeated for SAMPLE_S; its argument says how often, `times` at first."""
    while True:
        started = time.perf_counter()
        done = work(times)
        seconds = time.perf_counter() - started
        if seconds >= SAMPLE_S:
            return done / seconds / 1e9
        times *= 2


def measure(isa: str, rounds: int) -> tuple[list[float], list[list[float]]]:
    """All peaks, GFLOP/s; and by tokens, from one on, of each round the tile's speed over the mean of the peaks right
    before and after."""
    with tempfile.TemporaryDirectory() as folder:
        library, most = build(isa, Path(folder))
    found: list[list[float]] = [[] for _ in range(most)]
    peaks = [gflops(library.peak)]
    for _ in range(rounds):
        for tokens in range(1, most + 1):
            speed = gflops(partial(library.tiles, tokens))
            peaks.append(gflops(library.peak))
            found[tokens - 1].append(speed / statistics.mean(peaks[-2:]))
    return peaks, found


def measure_expert(isa: str, shape: Shape, rounds: int) -> dict[str, list[float]]:
    """By name, of each round the speed over the mean of the peaks right before and after: of the tile of most tokens,
    then of experts with 1, 4, 16 ... such tiles, all on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        library, most = build(isa, Path(folder))
    weights = random_weights(shape, -(-WEIGHTS_BYTES // shape.expert_bytes), torch.Generator().manual_seed(0))
    ours = Ours(build_library(shape), isa)
    ours.prepare(weights, shape, layer=False)
    ours.set_threads(1)
    experts = itertools.cycle(range(weights.count))

    def expert(x: torch.Tensor, times: int) -> float:
        for _ in range(times):
            ours.expert(next(experts), x)
        return x.shape[0] * shape.row_flops * times

    works: dict[str, Callable[[int], float]] = {f"tile of {most}": partial(library.tiles, most)}
    for tiles in (1, 4, 16, UNIT_TOKENS // most):
        x = torch.randn(tiles * most, shape.hidden_size).bfloat16()
        works[f"expert, {len(x):3}"] = partial(expert, x)
    found: dict[str, list[float]] = {name: [] for name in works}
    peaks = [gflops(library.peak)]
    for _ in range(rounds):
        for name, work in works.items():
            speed = gflops(work, 1)
            peaks.append(gflops(library.peak))
            found[name].append(speed / statistics.mean(peaks[-2:]))
    ours.close()
    return found


def tenths(values: list[float]) -> tuple[float, float, float]:
    """The median, the first and the ninth decile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 10], ordered[9 * len(ordered) // 10]


def print_share(isa: str, what: str, shares: list[float]) -> None:
    middle, low, high = tenths(shares)
    print(f"{isa:12} {what:14} {middle:4.0%} ({low:.0%}-{high:.0%})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tiles", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--isa", choices=ISAS, help="default: all that run here")
    parser.add_argument("--rounds", type=int, default=99, metavar="N")
    parser.add_argument("--expert", type=load_shape, metavar="SHAPE", help="qwen3, mixtral, ... or HIDDENxINTERMEDIATE")
    options = parser.parse_args(argv)
    machine = this_machine()
    print(f"{machine.cpu}, {machine.cores} cores; % of peak: median (first and ninth decile), {options.rounds} rounds")
    for isa in (options.isa,) if options.isa else ISAS:
        if missing := missing_flags(isa):
            print(f"{isa:12} skipped: no {' '.join(missing)}")
            continue
        if options.expert:
            found = measure_expert(isa, options.expert, options.rounds)
            (tile, tiles), *experts = found.items()
            print_share(isa, tile, tiles)
            for name, shares in experts:
                print_share(isa, name, shares)
                print_share(isa, "  of the tile", [a / b for a, b in zip(shares, tiles, strict=True)])
            continue
        peaks, by_tokens = measure(isa, options.rounds)
        middle, low, high = tenths(peaks)
        print(f"{isa:12} peak {middle:.1f} GFLOP/s ({low:.1f}-{high:.1f})")
        for tokens, shares in enumerate(by_tokens, 1):
            print_share(isa, f"{tokens:2} tokens", shares)


if __name__ == "__main__":
    main()
