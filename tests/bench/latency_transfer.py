"""How well a calibration of two expert shapes predicts two others.

    python -m tests.bench.latency_transfer [--quick] [--accelerator none] [--json]

Measures Mixtral's and Qwen3's experts and those of OLMoE and Phi-3.5-MoE, fits the first two, predicts the others.
Minutes, on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from fiddlerc import hardware, latency

from .kernels.contender import build_library
from .kernels.shapes import load_shape

KNOWN = ((4096, 14336), (2048, 768))
ASKED = ((2048, 1024), (4096, 6400))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--accelerator", choices=["auto", "cuda", "simulated", "none"], default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    calibration = hardware.measure(
        {(h, i): build_library(load_shape(f"{h}x{i}")) for h, i in KNOWN + ASKED},
        quick=arguments.quick,
        accelerator=arguments.accelerator,
        name="transfer",
        source="tests.bench.latency_transfer",
        progress=lambda label, done, total: print(f"{done}/{total} {label}", file=sys.stderr),
    )
    errors = latency.transfer_errors(calibration, KNOWN, ASKED)
    machine = calibration.machine
    if arguments.json:
        rows = [
            {"quantity": quantity, "hidden_size": h, "intermediate_size": i, "median": median, "max": worst}
            for (quantity, h, i), (median, worst) in errors.items()
        ]
        limits = dataclasses.asdict(calibration.limits)
        print(json.dumps({"machine": dataclasses.asdict(machine), "limits": limits, "errors": rows}, indent=1))
        return
    print(f"{machine.cpu}, {machine.cores} cores; fitted to {KNOWN}; {calibration.source}")
    for (quantity, hidden, intermediate), (median, worst) in errors.items():
        print(f"{quantity:10} {hidden:5} x {intermediate:5}   median error {median:6.1%}   largest {worst:6.1%}")


if __name__ == "__main__":
    main()
