"""Cost of one dispatch decision through its Python call, and of a layer around its kernel.

    python -m tests.bench.dispatch

Medians over 9 rounds of 2,000 decisions each: routing in, strategies out, counting included. Then a layer of the demo
model, one token, through Engine.moe without an accelerator: all of it, and of that what is in the kernel's call.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fiddler_runtime import Engine, load_plan
from fiddler_runtime.build import build_kernels
from fiddler_runtime.dispatch import Dispatcher
from fiddler_runtime.drift import unheeded
from fiddler_runtime.kernels import KernelLibrary
from fiddler_runtime.machine import this_machine
from fiddler_runtime.plan import Tables
from fiddler_runtime.weights import ExpertWeights
from fiddlerc.codegen import generate

CASES = ((8, 2, 1), (8, 2, 512), (128, 8, 1), (256, 8, 1), (256, 8, 512), (256, 8, 2048))
ROUNDS, DECISIONS = 9, 2000
ROOT = Path(__file__).parents[2]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sources = generate(64, 64, ["scalar"])
    with tempfile.TemporaryDirectory() as folder:
        library = KernelLibrary(build_kernels(sources.write(Path(folder))), sources.spec)
    machine = this_machine("none")
    print(f"{machine.cpu}, {machine.cores} cores")
    for experts, top_k, tokens in CASES:
        dispatcher = Dispatcher(library, tables(experts, top_k), experts)
        torch.manual_seed(0)
        ids = torch.rand(tokens, experts).topk(top_k).indices
        rounds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(DECISIONS):
                dispatcher.decide(0, ids)
            rounds.append((time.perf_counter() - start) / DECISIONS * 1e6)
        print(f"{experts:4} experts, top-{top_k}, {tokens:5} tokens: {statistics.median(rounds):6.2f} us")
    whole, kernel = layer_us()
    print(f"Engine.moe, 8 experts, top-2, 1 token: {whole:.1f} us, {kernel:.1f} of them in the kernel's call")


def layer_us() -> tuple[float, float]:
    """Microseconds of a layer as its caller sees it, and in the call of its kernel."""
    weights = ExpertWeights.load(ROOT / "examples/tiny-mixtral")
    with Engine(load_plan(ROOT / "plans/tiny-mixtral-epyc-zen5-2c"), weights, device="none", threads=1) as engine:
        hidden = torch.randn(1, engine.spec.hidden_size).bfloat16()
        ids, scale = torch.tensor([[1, 5]]), torch.tensor([[0.6, 0.4]])
        rounds = []
        for _ in range(1 + ROUNDS):  # the first warms up
            engine.reset_counters()
            start = time.perf_counter()
            with unheeded():
                for _ in range(DECISIONS):
                    engine.moe(0, hidden, ids, scale)
            whole = (time.perf_counter() - start) / DECISIONS * 1e6
            rounds.append((whole, engine.counters()["lanes"]["cpu"]["actual_us"] / DECISIONS))
    whole, kernel = (statistics.median(part) for part in zip(*rounds[1:], strict=True))
    return whole, kernel


def tables(experts: int, top_k: int) -> Tables:
    """A third of the experts resident, and copies that pay from some tokens on."""
    tokens = np.arange(4097, dtype=np.int32)
    return Tables(
        tokens=tokens,
        cpu_us=tokens.astype(np.float32)[None],
        regime_shares=np.ones(1, np.float32),
        gpu_us=(0.1 * tokens).astype(np.float32),
        rest_us=np.zeros(len(tokens), np.float32),
        rest_kv_us=np.zeros(1, np.float32),
        scalars_us=np.array([1, 5, 8], np.float32),
        contention=np.array([0.1], np.float32),
        decode_streams=np.zeros(top_k + 1, np.int32),
        prefetch=np.full((1, experts, 2), -1, np.int16),
        resident=(np.arange(experts) % 3 == 0).astype(np.uint8)[None, :],
        popularity=np.full((1, experts), 1 / experts, np.float32),
    )


if __name__ == "__main__":
    main()
