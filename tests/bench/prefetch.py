"""What prefetch instructions bring while a core multiplies: python -m tests.bench.prefetch [--rounds N].

A loop of multiplies on registers asks for one cache line after so many of them, into the second-level cache, as kernels
fetch the next depth block. Then the lines are read. How many had come is told by the time that takes, between that of
lines that nothing asked for and that of lines read a moment ago. One thread; AVX2 and FMA.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fiddler_runtime import arena
from fiddler_runtime.build import find_toolchain
from fiddler_runtime.machine import missing_flags, this_machine

BLOCK = 32 << 10
"""Fetched, then read: a depth block of 256 pairs, half of whose lines a pass asks for."""
BYTES = 256 << 20
EIGHTS = (1, 2, 3, 4, 6, 8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.prefetch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    if missing := missing_flags("avx2"):
        print(f"error: found a CPU without {', '.join(missing)}, expected AVX2 and FMA", file=sys.stderr)
        return 1
    machine = this_machine("none")
    print(f"{machine.cpu}, {machine.cores} cores; {rounds} rounds, medians")
    data = arena.allocate(BYTES)
    data.fill_(1)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "prefetch.so"
        source = str(Path(__file__).with_suffix(".cpp"))
        flags = ("-std=c++17", "-O2", "-mavx2", "-mfma", "-shared", "-fPIC")
        subprocess.run([str(find_toolchain().compiler), *flags, source, "-o", str(library)], check=True)
        measure = ctypes.CDLL(str(library)).measure
    for eights in EIGHTS:
        samples = []
        for _ in range(rounds):
            seconds = (ctypes.c_double * 5)()
            measure(ctypes.c_void_p(data.data_ptr()), *map(ctypes.c_int64, (BYTES, BLOCK, eights)), seconds)
            fetching, after, cached, alone, missed = seconds
            came = min(1.0, max(0.0, (missed - after) / (missed - cached)))
            samples.append((BYTES / alone / 1e9, BYTES / fetching / 1e9, came))
        alone, asked, came = (statistics.median(values) for values in zip(*samples, strict=True))
        print(
            f"a line each {8 * eights:2} multiplies: {asked:5.1f} GB/s asked for ({alone:5.1f} without asking), "
            f"{came:4.0%} came, {asked * came:5.1f} GB/s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
