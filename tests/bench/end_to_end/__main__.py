"""The Fiddler paper's experiment, on this machine: strategies side by side, measured beside predicted.

    python -m tests.bench.end_to_end --model mixtral --random-weights --gpu-memory 24GiB
    python -m tests.bench.end_to_end ... --only ours,cpu,decode:32/64,prefill    a part of it, minutes instead of hours
    python -m tests.bench.end_to_end ... --layers 4                              a part of the model: less memory
    python -m tests.bench.end_to_end --show                                      the tables of what there is

docs/end-to-end.md says what is measured and how. Every measurement is kept as soon as it is there: run the same command
again, and it goes on where it was. Results: results.json, results.md, results.svg in the output folder.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from fiddler_runtime.errors import FiddlerError, FiddlerWarning

from .strategies import NAMES


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    from .command import run

    try:
        with warnings.catch_warnings():
            # Latencies of a quick calibration, and of other strategies: what differs is in the tables.
            warnings.filterwarnings("ignore", ".* what the plan says", FiddlerWarning)
            run(args)
    except FiddlerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {args.output / 'results.json'} has what was measured", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from fiddlerc.cli import parse_bytes

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def size(text: str) -> int:
        try:
            return int(parse_bytes(text))
        except Exception as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(
        "python -m tests.bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mixtral", help="a built-in name, or a directory; default: mixtral")
    parser.add_argument("--random-weights", action="store_true", help="of a built-in name's shapes, in memory only")
    parser.add_argument("--layers", type=int, help="of a random model: only so many")
    parser.add_argument(
        "--gpu-memory", type=size, default=24 << 30, help="that the accelerator may use; default: 24GiB"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "simulated", "none"), default="auto")
    parser.add_argument("--hw", help="calibration or name of the catalogue; default: this machine is measured")
    parser.add_argument(
        "--routing", type=Path, help="a trace of the whole model, replayed instead of its routers' choices"
    )
    parser.add_argument(
        "--only",
        type=names,
        default=[],
        help=f"strategies ({', '.join(NAMES)}), scenarios, configurations (decode:32/64)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="of every generation; the median counts; default: 1")
    parser.add_argument("--output", type=Path, default=Path("build/end-to-end"), help="default: build/end-to-end")
    parser.add_argument("--show", action="store_true", help="measure nothing: the tables of what there is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
