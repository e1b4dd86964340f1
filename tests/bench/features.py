"""Where splitting an expert between CPU and link pays, and where prefetch does: simulated gains over the catalogue.

    python -m tests.bench.features

A gain is the share of a step's expert time that is saved: decode, a prompt, four beams. Built-in models are placed
without a trace, which knows nothing to prefetch; the demo model has one, and a quarter of its experts on the
accelerator.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fiddler_runtime.plan import Options
from fiddlerc import frontend, hardware, latency, placement, simulate, trace
from fiddlerc.ir import Feature, MemoryBudget

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("mixtral", "phi-3.5-moe", "olmoe", "qwen3-30b-a3b")
MACHINES = ("fiddler-env1", "fiddler-env2", "rtx4090", "a100-40gb", "a100", "h100")
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
SHARE = 4  # one of so many experts is on the accelerator


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| model | machine | experts on the GPU | w / c(1) | split: decode, prompt, beam | prefetch: the same |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in MODELS:
        for machine in MACHINES:
            show(model, machine, None)
    show(str(EXAMPLES / "tiny-mixtral"), "epyc-zen5-2c", EXAMPLES / "tiny-mixtral-trace.safetensors")
    print("\n| w / c(1) | split: decode, prompt, beam |\n| --- | --- |")
    for ratio in RATIOS:
        show("mixtral", "rtx4090", None, ratio)


def show(model: str, machine: str, recorded: Path | None, ratio: float | None = None) -> None:
    """One row; ratio: w / c(1) instead of the machine's own."""
    spec = frontend.load_model(model)
    calibration = hardware.load_hardware(machine)
    fitted = latency.fit(calibration, spec)
    text = None if recorded is None else trace.read_trace(recorded, spec)
    popularity = trace.popularity(text, spec, "balanced")
    kind = calibration.machine.accelerator.kind
    memory = calibration.machine.accelerator.memory_bytes
    options = Options("balanced", min(4096, spec.max_context), 4, memory)
    steps = trace.sample_steps(text, popularity, spec, options)
    if ratio is not None:
        fitted = replace(fitted, stream_us=ratio * float(fitted.prevailing_us[1]))
    experts = spec.total_experts
    budget = placement.count_memory(spec, options)
    # What fits as a whole has no misses; then a quarter, to see what the link is worth.
    resident = budget.resident_experts if budget.resident_experts < experts else experts // SHARE
    budget = MemoryBudget(0, (), resident)
    known = None if text is None else steps
    placed = placement.place(spec, placement.latencies(fitted), known, popularity, budget, "balanced", "")
    prefetch = placement.make_prefetch(trace.successors(text, spec), placed.resident)
    tables = placement.make_tables(spec, fitted, placed, prefetch)
    split, fetching = simulate.features(spec, tables, kind, steps, "balanced")
    if ratio is not None:
        print(f"| {ratio:g} | {gains(split)} |")
        return
    ratio = float(tables.scalars_us[2]) / float(fitted.prevailing_us[1])
    print(f"| {spec.name} | {machine} | {resident}/{experts} | {ratio:.3g} | {gains(split)} | {gains(fetching)} |")


def gains(feature: Feature) -> str:
    """'0.0 %, 7.2 %, 0.0 %: on'."""
    found = (feature.gain_decode, feature.gain_prefill, feature.gain_beam)
    return ", ".join(f"{gain:.1%}" for gain in found) + (": on" if feature.on else "")


if __name__ == "__main__":
    main()
