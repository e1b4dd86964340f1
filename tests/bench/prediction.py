"""Predicted against measured tokens/s of a model through its plan, on the machine the plan was made for.

    python -m tests.bench.prediction PLAN --model DIR [--trace FILE] [--device none] [--rounds 5] [--json]

Compile PLAN from a fresh `fiddlerc calibrate --model DIR`, on an idle machine. The trace should be of text like the
bench's own (fiddlerc/execution/text.txt); without one, routing is drawn from the plan's popularity. A model of real
shapes without real weights: python -m tests.bench.random_model mixtral --layers 3 -o DIR.

Decode and beam count the steps after the first token, prefill the time to it; measured figures are medians over rounds
after a warm-up, with the lowest and highest round. On a machine whose memory has two regimes both predictions are
printed: a round falls into one of them, or between.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from fiddler_runtime.machine import this_machine
from fiddler_runtime.plan import Plan, read_plan
from fiddlerc import simulate, trace
from fiddlerc.execution.compare import OUR_TEXT, timed
from fiddlerc.execution.loading import load_model, load_tokenizer, read_text
from fiddlerc.simulate.predict import plan_setting, predict_policy
from fiddlerc.simulate.workload import BEAM_INPUT, BEAM_OUTPUT, heldout

REGIMES = ("fast", "slow")


@dataclasses.dataclass(frozen=True)
class Truth:
    """One scenario, tokens/s; predicted by regime, fast first."""

    scenario: str
    predicted: dict[str, float]
    measured: float
    low: float
    high: float
    ratio: float


def main() -> None:
    arguments = _arguments()
    plan = read_plan(arguments.plan)
    spec = plan.header.model
    workload = dataclasses.replace(
        simulate.default_workload(spec), prefill_tokens=arguments.prefill_tokens, beam_width=arguments.beams
    )
    predicted = predictions(plan, arguments.trace, workload)
    measured = measure(plan, workload, arguments)
    prevailing = REGIMES[int(np.argmax(plan.tables.regime_shares))]
    results = []
    for scenario, rates in measured.items():
        median = statistics.median(rates)
        forecast = {regime: by_scenario[scenario] for regime, by_scenario in predicted.items()}
        ratio = forecast[prevailing] / median
        results.append(Truth(scenario, forecast, median, min(rates), max(rates), ratio))
    machine = this_machine()
    if arguments.json:
        value = {"model": spec.name, "device": arguments.device, "machine": dataclasses.asdict(machine)}
        print(json.dumps({**value, "results": [dataclasses.asdict(result) for result in results]}, indent=1))
        return
    print(f"{spec.name}, device {arguments.device}; {machine.cpu}, {machine.cores} cores, {', '.join(machine.isa)}")
    print(f"plan for {plan.header.hardware.name} ({plan.header.hardware.provenance}): {plan.header.hardware.source}")
    print(f"{'':8}{'predicted tok/s':>32}{'measured tok/s':>32}{'predicted / measured':>22}")
    for result in results:
        forecast_text = ", ".join(f"{rate:.4g} ({regime})" for regime, rate in result.predicted.items())
        spread = f"{result.measured:.4g} ({result.low:.4g}-{result.high:.4g})"
        print(f"{result.scenario:8}{forecast_text:>32}{spread:>32}{result.ratio:22.3f}")


def predictions(plan: Plan, recorded: Path | None, workload: simulate.Workload) -> dict[str, dict[str, float]]:
    """Tokens/s by regime and scenario."""
    spec, tables = plan.header.model, plan.tables
    text = None if recorded is None else trace.read_trace(recorded, spec)
    popularity = tables.popularity.astype(np.float64)
    sampled = trace.sample_steps(text, popularity, spec, plan.header.options)
    steps = {scenario: heldout(part) for scenario, part in sampled.items()}
    found = {}
    for regime in range(len(tables.regime_shares)):
        setting = plan_setting(plan.header, tables, regime)
        result = predict_policy(simulate.POLICIES[0], steps, setting, workload)
        found[REGIMES[regime]] = {
            "decode": result.decode_tokens_per_s,
            "prefill": workload.prefill_tokens / result.ttft_s,
            "beam": result.beam_tokens_per_s,
        }
    return found


def measure(plan: Plan, workload: simulate.Workload, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens/s of each round, by scenario; scenarios take turns."""
    ids = load_tokenizer(arguments.model)(read_text(OUR_TEXT), return_tensors="pt")["input_ids"]
    model: Any = load_model(
        plan.path,
        arguments.model,
        device=arguments.device,
        isa=None,
        threads=None,
        strategies=None,
        trust_binaries=False,
        progress=None,
    )
    rates: dict[str, list[float]] = {"decode": [], "prefill": [], "beam": []}
    try:
        for turn in range(1 + arguments.rounds):
            for scenario, (prompt, new, beams) in {
                "decode": (workload.input_tokens, workload.output_tokens, 1),
                "prefill": (workload.prefill_tokens, 1, 1),
                "beam": (BEAM_INPUT, BEAM_OUTPUT, workload.beam_width),
            }.items():
                inputs = ids[:, :prompt].to(model.device)
                assert inputs.shape[1] == prompt, "the text is too short for the prompt"
                timing = timed(model, inputs, new, beams).timing(prompt)
                rate = prompt / timing.ttft_s if scenario == "prefill" else timing.decode_tokens_per_s
                if turn:  # the first is the warm-up
                    rates[scenario].append(rate)
    finally:
        model.fiddler.close()
    return rates


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the model's directory, with weights")
    parser.add_argument("--trace", type=Path, help="its trace")
    parser.add_argument("--device", choices=("auto", "cuda", "simulated", "none"), default="none")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
