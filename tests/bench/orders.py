"""Packing an expert from every order of a checkpoint, and from rows made of it first: python -m tests.bench.orders."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from fiddler_runtime import arena
from fiddler_runtime.build import build_kernels
from fiddler_runtime.kernels import KernelLibrary, Kernels
from fiddler_runtime.lanes.expert import UnpackedExpert
from fiddler_runtime.machine import this_machine
from fiddler_runtime.orders import StoredExpert
from fiddler_runtime.plan import ExpertForm, ExpertTensors
from fiddlerc.codegen import generate

FORM = ExpertForm(2880, 2880, "gptoss", bias=True)
ROUNDS, COPIES = 9, 3
ORDERS = {
    "rows": (False, False),
    "rows in turn": (False, True),
    "columns": (True, False),
    "columns in turn": (True, True),
}


def seconds(kernels: Kernels, names: ExpertTensors) -> tuple[float, float]:
    """Medians: packing, and copying to rows and packing. Copies beyond the cache take turns."""
    targets = [arena.allocate(kernels.library.packed_bytes).fill_(0) for _ in range(COPIES)]
    experts = [StoredExpert.empty(FORM, names) for _ in range(COPIES)]
    rows = UnpackedExpert.empty(FORM)
    for expert in experts:
        for part in (*expert.matrices, *expert.biases):
            part.fill_(1)
    direct, rearranged = [], []
    for turn in range(ROUNDS):
        expert, target = experts[turn % COPIES], targets[turn % COPIES]
        started = time.perf_counter()
        kernels.pack(*expert.matrices, target, expert.biases)
        direct.append(time.perf_counter() - started)
        started = time.perf_counter()
        for to, part in zip((*rows.matrices, *rows.biases), (*expert.matrices, *expert.biases), strict=True):
            to.copy_(part)
        kernels.pack(*rows.matrices, target, rows.biases)
        rearranged.append(time.perf_counter() - started)
    return statistics.median(direct), statistics.median(rearranged)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sources = generate(FORM.hidden_size, FORM.intermediate_size, activation=FORM.activation, bias=FORM.bias)
    with tempfile.TemporaryDirectory() as folder:
        library = KernelLibrary(build_kernels(sources.write(Path(folder))), sources.spec)
    machine = this_machine()
    print(f"{machine.cpu}, {machine.cores} cores; {FORM.hidden_size} x {FORM.intermediate_size}, ms")
    with library.open() as kernels:
        for order, (transposed, interleaved) in ORDERS.items():
            names = ExpertTensors("both", "both", "down", "b", "b", "c", transposed, interleaved)
            direct, rearranged = seconds(kernels, names)
            print(f"{order:16} {1e3 * direct:6.1f}   rearranged first {1e3 * rearranged:6.1f}")


if __name__ == "__main__":
    main()
