"""Predicted against measured tokens/s of a model through its plan, on the machine the plan was made for.

    python -m tests.bench.prediction PLAN --model DIR [--hw HW.json] [--trace FILE] [--device none] [--json]

Compile PLAN from a fresh `fiddlerc calibrate --model DIR`, on an idle machine. The trace should be of text like the
bench's own (fiddlerc/execution/text.txt); without one, routing is drawn from the plan's popularity. A model of real
shapes without real weights: python -m tests.bench.random_model mixtral --layers 3 -o DIR.

Decode and beam count the steps after the first token, prefill the time to it; measured figures are medians over rounds
after a warm-up, with the lowest and highest round. A prediction is of a memory bandwidth, and shared machines' changes.
With HW.json, from which the plan was compiled, memory is probed before and after each round: a round is held against
the prediction of the regime whose bandwidth (within a tenth) it had, and left out if it had neither or memory changed
meanwhile. Without it all count as of the regime seen more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiddler_runtime.machine import this_machine
from fiddler_runtime.plan import Plan, read_plan
from fiddlerc import hardware, simulate, trace
from fiddlerc.execution.compare import OUR_TEXT, timed
from fiddlerc.execution.loading import load_model, load_tokenizer, read_text
from fiddlerc.simulate.predict import plan_setting, predict_policy
from fiddlerc.simulate.workload import BEAM_INPUT, BEAM_OUTPUT, heldout

REGIMES = ("fast", "slow")
_PATIENCE = 6  # rounds tried for each one wanted


@dataclasses.dataclass(frozen=True)
class Truth:
    """One scenario in one regime of the memory, tokens/s."""

    scenario: str
    regime: str
    rounds: int
    predicted: float
    measured: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


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
    for (scenario, regime), rates in sorted(measured.items()):
        regime = regime if regime in predicted else prevailing
        forecast = predicted[regime][scenario]
        results.append(Truth(scenario, regime, len(rates), forecast, statistics.median(rates), min(rates), max(rates)))
    machine = this_machine()
    if arguments.json:
        value = {"model": spec.name, "device": arguments.device, "machine": dataclasses.asdict(machine)}
        rows = [{**dataclasses.asdict(result), "ratio": result.ratio} for result in results]
        print(json.dumps({**value, "results": rows}, indent=1))
        return
    print(f"{spec.name}, device {arguments.device}; {machine.cpu}, {machine.cores} cores, {', '.join(machine.isa)}")
    print(f"plan for {plan.header.hardware.name} ({plan.header.hardware.provenance}): {plan.header.hardware.source}")
    print(f"{'':8}{'memory':>8}{'rounds':>8}{'predicted tok/s':>17}{'measured tok/s':>34}{'predicted / measured':>22}")
    for result in results:
        spread = f"{result.measured:.4g} ({result.low:.4g}-{result.high:.4g})"
        print(
            f"{result.scenario:8}{result.regime:>8}{result.rounds:8}{result.predicted:17.4g}{spread:>34}"
            f"{result.ratio:22.3f}"
        )


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


def measure(
    plan: Plan, workload: simulate.Workload, arguments: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Tokens/s of each round, by scenario and regime; scenarios take turns."""
    regimes: dict[str, float] | None = None
    if arguments.hw is not None:
        limits = hardware.load_hardware(str(arguments.hw)).limits
        regimes = {"fast": limits.cpu_read_gbps, "slow": limits.cpu_read_slow_gbps}
    probed = torch.ones(64 << 20, dtype=torch.bfloat16)
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
    rates: dict[tuple[str, str], list[float]] = {}

    def regime() -> str | None:
        if regimes is None:
            return ""
        gbps = model.fiddler._kernels.read_gbps(probed)
        return next((name for name, known in regimes.items() if abs(gbps - known) <= 0.1 * known), None)

    try:
        for turn in range(1 + (1 if regimes is None else _PATIENCE) * arguments.rounds):
            for scenario, (prompt, new, beams) in {
                "decode": (workload.input_tokens, workload.output_tokens, 1),
                "prefill": (workload.prefill_tokens, 1, 1),
                "beam": (BEAM_INPUT, BEAM_OUTPUT, workload.beam_width),
            }.items():
                inputs = ids[:, :prompt].to(model.device)
                assert inputs.shape[1] == prompt, "the text is too short for the prompt"
                before = regime()
                timing = timed(model, inputs, new, beams).timing(prompt)
                rate = prompt / timing.ttft_s if scenario == "prefill" else timing.decode_tokens_per_s
                if turn and before is not None and before == regime():  # the first is the warm-up
                    rates.setdefault((scenario, before), []).append(rate)
            if rates and min(map(len, rates.values())) >= arguments.rounds:
                break
    finally:
        model.fiddler.close()
    return rates


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the model's directory, with weights")
    parser.add_argument("--hw", type=Path, help="the calibration that the plan was compiled from")
    parser.add_argument("--trace", type=Path, help="its trace")
    parser.add_argument("--device", choices=("auto", "cuda", "simulated", "none"), default="none")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
