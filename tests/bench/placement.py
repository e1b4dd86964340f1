"""How placements compare: ours, by popularity, random, worst, on steps held out; for several budgets and machines.

    python -m tests.bench.placement

The demo model on its recorded trace; Mixtral-8x7B on the published expert counts that `--counts` names, if given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fiddler_runtime.plan import Options
from fiddlerc import frontend, hardware, latency, placement, trace
from fiddlerc.ir import MemoryBudget, Objective

EXAMPLES = Path(__file__).parents[2] / "examples"
OBJECTIVES: tuple[Objective, ...] = ("decode", "prefill", "beam", "balanced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, help="Mixtral-8x7B's, as `fiddlerc trace --from-counts` reads")
    arguments = parser.parse_args()
    demo = str(EXAMPLES / "tiny-mixtral")
    print(f"{'model':14} {'machine':14} {'residents':>9} {'objective':9} {'method':14} ours   random worst")
    print("expected time relative to placement by popularity")
    cases = [(demo, EXAMPLES / "tiny-mixtral-trace.safetensors", "epyc-zen5-2c")]
    if arguments.counts:
        cases += [("mixtral", arguments.counts, name) for name in ("fiddler-env1", "a100", "rtx4090", "h100")]
    for model, recorded, machine in cases:
        spec = frontend.load_model(model)
        read = trace.read_trace if recorded.suffix == ".safetensors" else trace.from_counts
        text = read(recorded, spec)
        latencies = placement.latencies(latency.fit(hardware.load_hardware(machine), spec))
        total = spec.total_experts
        for share in (8, 4, 2):
            for objective in OBJECTIVES:
                popularity = trace.popularity(text, spec, objective)
                steps = trace.sample_steps(text, popularity, spec, Options(objective, 1024, 4, 0))
                budget = MemoryBudget(0, (), total // share)
                summary = placement.place(spec, latencies, steps, popularity, budget, objective, "").summary
                ours, _, blind, worst = (
                    summary.relative_time[name] for name in ("placed", "popularity", "random", "worst")
                )
                print(
                    f"{spec.name:14} {machine:14} {total // share:5}/{total:<3} {objective:9} {summary.method:14} "
                    f"{ours:.4f} {blind:.4f} {worst:.4f}"
                )


if __name__ == "__main__":
    main()
