"""Predicted against measured tokens/s of a model through its plan, on the machine the plan was made for.

    python -m tests.bench.prediction --model DIR --cycles 5 [--trace FILE] [--device none] [--json]
    python -m tests.bench.prediction PLAN --model DIR [--hw HW.json] [--trace FILE] [--device none] [--json]

On an idle machine. A cycle is `fiddlerc calibrate --quick --model DIR`, `fiddlerc compile` and the measurement. The
ratio of several is the median of their own: a drift of the machine between two cycles is no error of the prediction.
With PLAN, which should come from a fresh calibration, that one is measured. The trace should be of text like the
bench's own (fiddlerc/execution/text.txt); without one, routing is drawn from the plan's popularity. A model of real
shapes without real weights: python -m tests.bench.random_model mixtral --layers 3 -o DIR.

Decode and beam count the steps after the first token, prefill the time to it; measured figures are medians over rounds
after a warm-up, with the lowest and highest round. A prediction is of a memory bandwidth, and shared machines' changes.
If the experts are larger than the caches and the calibration is known, memory is probed before and after each round: a
round is held against the prediction of the regime whose bandwidth (within a tenth) it had, and left out if it had
neither or memory changed meanwhile. Otherwise all count as of the regime seen more. A ratio of fewer rounds than asked
for is printed and does not count in the median.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fiddler_runtime import hf
from fiddler_runtime.machine import this_machine
from fiddler_runtime.plan import Plan, read_plan
from fiddlerc import hardware, simulate, trace
from fiddlerc.execution.compare import OUR_TEXT, timed
from fiddlerc.execution.loading import load_model, read_text
from fiddlerc.hardware.lanes import memory_probe
from fiddlerc.simulate.predict import plan_setting, predict_policy
from fiddlerc.simulate.workload import BEAM_INPUT, BEAM_OUTPUT, heldout

REGIMES = ("fast", "slow")
_PATIENCE = 4  # rounds tried for each one wanted
_PATIENCE_S = 10.0  # waited for a bandwidth that the calibration met


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
    machine = this_machine()
    if not arguments.json:
        print(f"{arguments.model}, device {arguments.device}; {machine.cpu}, {machine.cores} cores")
        print(f"{'':8}{'memory':>8}{'rounds':>8}{'predicted tok/s':>17}{'measured tok/s':>34}{'ratio':>11}")
    results = []
    for _ in range(arguments.cycles):
        with tempfile.TemporaryDirectory() as folder:
            given = arguments.plan, arguments.hw
            found = truths(arguments, *(calibrated(arguments, Path(folder)) if arguments.plan is None else given))
        results += found
        if not arguments.json:
            for truth in found:
                spread = f"{truth.measured:.4g} ({truth.low:.4g}-{truth.high:.4g})"
                print(
                    f"{truth.scenario:8}{truth.regime:>8}{truth.rounds:8}{truth.predicted:17.4g}{spread:>34}"
                    f"{truth.ratio:11.3f}",
                    flush=True,
                )
    believed = [truth for truth in results if truth.rounds >= arguments.rounds]
    ratios = {of: [truth.ratio for truth in believed if truth.scenario == of] for of in ("decode", "prefill", "beam")}
    medians = {scenario: statistics.median(found) for scenario, found in ratios.items() if found}
    if arguments.json:
        value = {"model": str(arguments.model), "device": arguments.device, "machine": dataclasses.asdict(machine)}
        rows = [{**dataclasses.asdict(truth), "ratio": truth.ratio} for truth in results]
        print(json.dumps({**value, "results": rows, "median_ratio": medians}, indent=1))
    else:
        print("median  " + ", ".join(f"{scenario} {ratio:.3f}" for scenario, ratio in medians.items()))


def calibrated(arguments: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(plan, calibration) as a user makes them, in processes of their own."""
    plan, hw = folder / "plan", folder / "hw.json"
    traced = [] if arguments.trace is None else ["--trace", str(arguments.trace)]
    of = ["--model", str(arguments.model)]
    for command in (
        ["calibrate", "--quick", "--accelerator", arguments.device, *of, "-o", str(hw)],
        ["compile", str(arguments.model), "--hw", str(hw), *traced, "-o", str(plan)],
    ):
        done = subprocess.run([sys.executable, "-m", "fiddlerc", *command], stdout=subprocess.DEVNULL)
        if done.returncode:  # it has said why
            raise SystemExit(done.returncode)
    return plan, hw


def truths(arguments: argparse.Namespace, plan_path: Path, hw: Path | None) -> list[Truth]:
    """Predictions of a plan held against what it does."""
    plan = read_plan(plan_path)
    spec = plan.header.model
    workload = dataclasses.replace(
        simulate.default_workload(spec), prefill_tokens=arguments.prefill_tokens, beam_width=arguments.beams
    )
    predicted = predictions(plan, arguments.trace, workload)
    measured = measure(plan, workload, arguments, hw)
    prevailing = REGIMES[int(np.argmax(plan.tables.regime_shares))]
    results = []
    for (scenario, regime), rates in sorted(measured.items()):
        regime = regime if regime in predicted else prevailing
        forecast = predicted[regime][scenario]
        results.append(Truth(scenario, regime, len(rates), forecast, statistics.median(rates), min(rates), max(rates)))
    return results


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
    plan: Plan, workload: simulate.Workload, arguments: argparse.Namespace, hw: Path | None
) -> dict[tuple[str, str], list[float]]:
    """Tokens/s of each round, by scenario and regime; scenarios take turns."""
    regimes: dict[str, float] | None = None
    spec = plan.header.model
    experts = spec.total_experts * spec.expert_bytes
    if hw is not None and experts > this_machine().l3_bytes:
        limits = hardware.load_hardware(str(hw)).limits
        regimes = {"fast": limits.cpu_read_gbps, "slow": limits.cpu_read_slow_gbps}
        if arguments.device == "simulated":  # whose own times are known in the regime that was seen more
            prevailing = REGIMES[limits.cpu_slow_share > 0.5]
            regimes = {prevailing: regimes[prevailing]}
    probed = memory_probe(this_machine())
    ids = hf.load_tokenizer(arguments.model)(read_text(OUR_TEXT), return_tensors="pt")["input_ids"]
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
    model.fiddler._kernels.settle_probed(probed)
    rates: dict[tuple[str, str], list[float]] = {}

    def regime() -> str | None:
        if regimes is None:
            return ""
        found = model.fiddler._kernels.read_gbps(probed)
        return next((name for name, known in regimes.items() if abs(found - known) <= 0.1 * known), None)

    def awaited() -> str | None:
        until = time.perf_counter() + _PATIENCE_S
        while (found := regime()) is None and time.perf_counter() < until:
            time.sleep(0.2)
        return found

    try:
        for turn in range(1 + (1 if regimes is None else _PATIENCE) * arguments.rounds):
            for scenario, (prompt, new, beams) in {
                "decode": (workload.input_tokens, workload.output_tokens, 1),
                "prefill": (workload.prefill_tokens, 1, 1),
                "beam": (BEAM_INPUT, BEAM_OUTPUT, workload.beam_width),
            }.items():
                inputs = ids[:, :prompt].to(model.device)
                assert inputs.shape[1] == prompt, "the text is too short for the prompt"
                if (before := awaited()) is None:
                    continue
                timing = timed(model, inputs, new, beams).timing(prompt)
                rate = prompt / timing.ttft_s if scenario == "prefill" else timing.decode_tokens_per_s
                if turn and before == regime():  # the first is the warm-up
                    rates.setdefault((scenario, before), []).append(rate)
            if len({scenario for (scenario, _), found in rates.items() if len(found) >= arguments.rounds}) == 3:
                break
    finally:
        model.fiddler.close()
    return rates


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, nargs="?")
    parser.add_argument("--cycles", type=int, default=1, help="how often; without PLAN each calibrates anew")
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
