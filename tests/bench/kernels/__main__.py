"""Speed of the expert kernels beside this machine's limits and beside other implementations.

    python -m tests.bench.kernels --shapes mixtral,qwen3 --tokens 1,4,16 --threads 1,2 --peers torch,onednn
    python -m tests.bench.kernels --shapes qwen3 --layer                    the whole MoE layer, uniform routing
    python -m tests.bench.kernels --shapes qwen3 --build /tmp/old           keep this checkout's libraries, and later
    python -m tests.bench.kernels --shapes qwen3 --against /tmp/old         compare with them in one process

docs/kernels-measured.md, Measuring, says what is measured and how.
Shapes are the files in tests/bench/shapes, or HIDDENxINTERMEDIATE.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import KNOWN_ISAS, usable_cores

from .command import run

EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAYER_TOKENS = (1, 4, 16, 64, 256, 1024)

_TUNABLES = "glibc.malloc.hugetlb=1"


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.hw and not args.build:
        parser.error("--hw says for which machine to --build; what is measured is measured on this one")
    if args.tokens is None:
        args.tokens = LAYER_TOKENS if args.layer else EXPERT_TOKENS
    # The runtime keeps its weights on huge pages; so that peers have them too, malloc is told to.
    if _TUNABLES not in os.environ.get("GLIBC_TUNABLES", ""):
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), _TUNABLES)))
        os.execv(sys.executable, [sys.executable, "-m", "tests.bench.kernels", *sys.argv[1:]])
    try:
        run(args)
    except FiddlerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def arguments() -> argparse.ArgumentParser:
    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    def counts(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split(","))
        if any(not 1 <= value <= 1 << 20 for value in values):
            raise argparse.ArgumentTypeError("counts from 1 on, with commas between")
        return values

    parser = argparse.ArgumentParser(
        "python -m tests.bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=names, default=("mixtral", "qwen3"), help="default: mixtral,qwen3")
    parser.add_argument("--tokens", type=counts, help="default: 1,2,4 ... 1024; of a layer 1,4,16 ... 1024")
    parser.add_argument("--threads", type=counts, default=(usable_cores(),), help="default: one per core")
    parser.add_argument("--isa", choices=KNOWN_ISAS, help="default: the best that runs here")
    parser.add_argument("--layer", action="store_true", help="the whole MoE layer instead of one expert per call")
    parser.add_argument("--experts", type=int, help="of a layer, instead of the model's number")
    parser.add_argument("--peers", type=names, default=("torch",), help="names, all or none; default: torch")
    parser.add_argument("--library", type=Path, help="measure this built library (file or folder), not this checkout's")
    parser.add_argument("--against", type=Path, help="and this one beside it")
    parser.add_argument(
        "--both", action="store_true", help="and a loop that only reads and multiplies: what a core can do at once"
    )
    parser.add_argument(
        "--build", type=Path, metavar="FOLDER", help="only build this checkout's libraries into a folder"
    )
    parser.add_argument("--hw", metavar="HW", help="with --build: as for that machine (hw.json or catalogue name)")
    parser.add_argument("--rounds", type=int, default=15, help="undisturbed rounds of each row; default: 15")
    parser.add_argument("--time-budget", type=float, default=240, metavar="S", help="seconds in all; default: 240")
    parser.add_argument("--memory", type=float, default=4, metavar="GIB", help="for weights; default: 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and machine record there, row by row")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline there")
    parser.add_argument("--pool", action="store_true", help="measure the thread pool's latency instead")
    parser.add_argument("--read", type=Path, nargs="+", metavar="JSON", help="measure nothing: print and plot these")
    return parser


if __name__ == "__main__":
    sys.exit(main())
