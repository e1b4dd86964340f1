"""Speed of the expert kernel beside torch eager (three F.linear in bf16) and beside this machine's limits.

    python -m tests.bench.kernels --shape 4096x14336 --tokens 1,4,16,64 [--isa avx512_bf16] [--threads 2] [--json x]

One expert per call, its weights rotated through more memory than the last-level cache holds. A repetition measures the
limits (read bandwidth, peak of the multiply instruction), ours, torch and the limits again, in one process, so that
every comparison is between neighbours in time. The limits are the best of six probes. A repetition in which a probe of
the peak fell a fifth below the best shows that something else ran; it is left out and counted. Figures are medians over
the other repetitions; the spread is from the first to the ninth decile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fiddler_runtime.build import build_kernels
from fiddler_runtime.kernels import KernelLibrary, Kernels, empty_packed, make_pointers
from fiddler_runtime.machine import this_machine, usable_cores
from fiddlerc.codegen import generate

_LEAST_SECONDS = 0.02
_DISTURBED = 0.2


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Microseconds of one call of each, and the limits around them."""

    ours_us: float
    torch_us: float
    read_gbps: float
    peak_gflops: float
    steady: bool


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    hidden, intermediate = args.shape
    sources = generate(hidden, intermediate)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        library = KernelLibrary(build_kernels(Path(folder)), sources.spec)
    machine = this_machine("none")
    with library.open(args.isa, args.threads) as kernels, torch.inference_mode():
        _say(f"{machine.cpu}, {kernels.threads} threads, {kernels.isa}, {sources.spec.name}")
        weights = _Weights(kernels, rotate_bytes=4 * max(machine.l3_bytes, 1 << 25))
        rows = [_measure(kernels, weights, tokens, args.repetitions) for tokens in args.tokens]
    record = {
        "command": "python -m tests.bench.kernels " + " ".join(sys.argv[1:]),
        "machine": dataclasses.asdict(machine),
        "torch": torch.__version__,
        "isa": kernels.isa,
        "threads": kernels.threads,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class _Weights:
    """Copies of one expert, packed and row-major, taken in turn."""

    def __init__(self, kernels: Kernels, rotate_bytes: int) -> None:
        spec = kernels.library.spec
        self.hidden, self.intermediate = spec.hidden_size, spec.intermediate_size
        self.copies = max(2, math.ceil(rotate_bytes / spec.packed_bytes))
        gate, up = (self._random(self.intermediate, self.hidden) for _ in range(2))
        down = self._random(self.hidden, self.intermediate)
        packed = empty_packed(spec.packed_bytes)
        kernels.pack(gate, up, down, packed)
        self.torch = [tuple(w.clone() for w in (gate, up, down)) for _ in range(self.copies)]
        self.packed = empty_packed(spec.packed_bytes, self.copies)
        self.packed[:] = packed
        self.pointers = [make_pointers([row.data_ptr()]) for row in self.packed]
        self.read = torch.ones(1 << 28, dtype=torch.uint8)

    @staticmethod
    def _random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) / columns**0.5).bfloat16()


def _measure(kernels: Kernels, weights: _Weights, tokens: int, repetitions: int) -> dict[str, object]:
    x = torch.randn(tokens, weights.hidden).bfloat16()
    ids, ones = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    out = torch.empty(tokens, weights.hidden)

    def ours(i: int) -> None:
        kernels.moe(x, ids, ones, weights.pointers[i % weights.copies], out)

    def eager(i: int) -> None:
        gate, up, down = weights.torch[i % weights.copies]
        linear = torch.nn.functional.linear
        linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)

    done: list[Repetition] = []
    for index in range(repetitions):
        before = _limits(kernels, weights)
        ours_us, torch_us = _time(ours), _time(eager)
        after = _limits(kernels, weights)
        peaks = [peak for _, peak in before + after]
        read = max(read for read, _ in before + after)
        done.append(Repetition(ours_us, torch_us, read, max(peaks), min(peaks) >= (1 - _DISTURBED) * max(peaks)))
        _say(f"\r{tokens:5} tokens: repetition {index + 1} of {repetitions}", end="")
    kept = [r for r in done if r.steady]
    return _row(weights, tokens, kept or done, len(done), len(done) - len(kept))


def _row(weights: _Weights, tokens: int, kept: list[Repetition], repetitions: int, rejected: int) -> dict[str, object]:
    weight_bytes = 3 * weights.hidden * weights.intermediate * 2
    flops = 6 * weights.hidden * weights.intermediate * tokens

    def roofline(us: float, r: Repetition) -> float:
        return max(weight_bytes / (r.read_gbps * 1e3), flops / (r.peak_gflops * 1e3)) / us

    ratios = sorted(r.torch_us / r.ours_us for r in kept)
    row: dict[str, object] = {
        "tokens": tokens,
        "ours_us": statistics.median(r.ours_us for r in kept),
        "torch_us": statistics.median(r.torch_us for r in kept),
        "torch_over_ours": statistics.median(ratios),
        "torch_over_ours_deciles": [ratios[len(ratios) // 10], ratios[len(ratios) - 1 - len(ratios) // 10]],
        "ours_roofline": statistics.median(roofline(r.ours_us, r) for r in kept),
        "torch_roofline": statistics.median(roofline(r.torch_us, r) for r in kept),
        "ours_gbps": statistics.median(weight_bytes / r.ours_us / 1e3 for r in kept),
        "ours_gflops": statistics.median(flops / r.ours_us / 1e3 for r in kept),
        "read_gbps": statistics.median(r.read_gbps for r in kept),
        "peak_gflops": statistics.median(r.peak_gflops for r in kept),
        "repetitions": repetitions,
        "rejected": rejected,
    }
    _say(
        "\r{tokens:5} tokens: ours {ours_us:9.0f} us, torch {torch_us:9.0f} us, ratio {torch_over_ours:5.2f}, "
        "roofline {ours_roofline:4.0%} (torch {torch_roofline:4.0%}), {ours_gbps:5.1f} of {read_gbps:5.1f} GB/s, "
        "{ours_gflops:6.0f} of {peak_gflops:6.0f} GFLOP/s, {rejected} of {repetitions} rejected".format(**row)
        + (" (none was left: figures of a disturbed machine)" if rejected == repetitions else "")
    )
    return row


def _limits(kernels: Kernels, weights: _Weights) -> list[tuple[float, float]]:
    """(GB/s, GFLOP/s), three times."""
    return [(kernels.read_gbps(weights.read), kernels.peak_gflops(4.0)) for _ in range(3)]


def _time(call: Callable[[int], None]) -> float:
    """Microseconds a call, over at least two calls and _LEAST_SECONDS."""
    begin, calls = time.perf_counter(), 0
    while True:
        call(calls)
        calls += 1
        elapsed = time.perf_counter() - begin
        if calls >= 2 and elapsed >= _LEAST_SECONDS:
            return 1e6 * elapsed / calls


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    def shape(text: str) -> tuple[int, int]:
        hidden, _, intermediate = text.partition("x")
        return int(hidden), int(intermediate)

    def counts(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, default=(4096, 14336), help="hidden x intermediate")
    parser.add_argument("--tokens", type=counts, default=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    parser.add_argument("--isa", default=None, help="an instruction set; default: the best that runs here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="write the figures and the machine record there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
