"""What the simulation predicts for the two environments of the Fiddler paper, beside what was published.

    python -m tests.bench.reproduction                                   the tables of docs/reproduction.md
    python -m tests.bench.reproduction --write docs/reproduction.md      put them there
    python -m tests.bench.reproduction --counts FILE [FILE ...]          popularity from published expert counts

Nothing is measured here. Popularity is drawn (seeded) with the mean and spread that the paper states, unless counts of
Mixtral-8x7B are named; published figures are in tests/data/fiddler_published.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fiddler_runtime.plan import Options
from fiddlerc import frontend, hardware, latency, placement, simulate, trace
from fiddlerc.ir import MemoryBudget, Scenario, Steps
from fiddlerc.simulate import Policy, Setting
from fiddlerc.simulate.workload import BEAM_INPUT, BEAM_OUTPUT, beam_steps, decode_steps, prompt_steps

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "data" / "fiddler_published.json"
BEGIN = "<!-- begin: python -m tests.bench.reproduction -->\n"
END = "<!-- end -->\n"
CONTEXT = 4096

BASELINES = ("llama.cpp", "deepspeed-mii", "mixtral-offloading-code")
"""Those that the paper compares with; Mixtral-Offloading as its published code does it, which is what could be run."""
SHOWN = ("ours", "fiddler", "fiddler-code", *BASELINES)
REPEATED = (1, 2, 4, 8, 16)
ENVIRONMENTS = {"env1": "fiddler-env1", "env2": "fiddler-env2"}


@dataclass(frozen=True)
class Environment:
    """One machine of the paper with as many experts on its GPU as stated."""

    name: str
    setting: Setting
    steps: dict[Scenario, Steps]
    hit_rate: float


@dataclass(frozen=True)
class Row:
    """One configuration: what each strategy reaches, more is better."""

    label: str
    rates: dict[str, float]

    def over_best(self, name: str) -> float:
        """Times the best baseline."""
        return self.rates[name] / max(self.rates[baseline] for baseline in BASELINES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts", type=Path, nargs="+", default=[], help="of Mixtral-8x7B, as `fiddlerc trace` imports"
    )
    parser.add_argument("--write", type=Path, help="a document with the two marks between which the tables belong")
    arguments = parser.parse_args()
    text = tables(arguments.counts)
    if arguments.write is None:
        print(text, end="")
        return
    document = arguments.write.read_text()
    before, rest = document.split(BEGIN)
    arguments.write.write_text(before + BEGIN + text + END + rest.split(END)[1])


def tables(counts: Sequence[Path] = ()) -> str:
    """All tables, as Markdown."""
    published = json.loads(PUBLISHED.read_text())
    spec = frontend.load_model("mixtral")
    if not counts:
        popularity = drawn_popularity(published, len(spec.moe_layers), spec.num_experts)
    else:
        texts = [trace.from_counts(path, spec) for path in counts]
        together = replace(texts[0], counts=np.sum([text.counts for text in texts], axis=0))
        popularity = trace.popularity(together, spec, "decode")
    places = {key: environment(key, published, popularity) for key in ENVIRONMENTS}
    decode = {key: list(decode_rows(place, published)) for key, place in places.items()}
    prefill = {key: list(prefill_rows(place, published)) for key, place in places.items()}
    beam = {key: list(beam_rows(place, published)) for key, place in places.items()}
    parts = [
        hit_rates(places, published),
        summary({"single_batch_decode": decode, "long_prefill": prefill, "beam_search": beam}, published),
        repeats(places, beam),
        measured(decode["env2"], prefill["env2"], published),
        *(section(f"Decode, {key}: tokens/s, prompt included", "in/out", rows) for key, rows in decode.items()),
        *(section(f"Prefill, {key}: prompts/s", "tokens", rows) for key, rows in prefill.items()),
        *(section(f"Beam search, {key}: tokens/s, 32 in, 64 out", "beams", rows) for key, rows in beam.items()),
    ]
    return "\n".join(parts)


def drawn_popularity(published: dict[str, Any], layers: int, experts: int) -> npt.NDArray[np.float64]:
    """Expert popularity [layers, experts] with the published mean and standard deviation relative to the largest."""
    stated = published["popularity_relative_to_most_popular"]
    rng = np.random.Generator(np.random.PCG64(0))
    relative = np.minimum(1.0, rng.normal(stated["mean"], stated["std"], (layers, experts)))
    shares: npt.NDArray[np.float64] = relative / relative.sum(axis=1, keepdims=True)
    return shares


def environment(key: str, published: dict[str, Any], popularity: npt.NDArray[np.float64]) -> Environment:
    """The catalogue's entry, with the published number of experts placed by popularity, as the paper does."""
    spec = frontend.load_model("mixtral")
    fitted = latency.fit(hardware.load_hardware(ENVIRONMENTS[key]), spec)
    options = Options("decode", CONTEXT, 1, 0)
    steps = trace.sample_steps(None, popularity, spec, options)
    budget = MemoryBudget(0, (), published["environments"][key]["experts_on_gpu"])
    placed = placement.place(spec, placement.latencies(fitted), None, popularity, budget, "decode", "")
    made = placement.make_tables(spec, fitted, placed)
    return Environment(key, simulate.make_setting(spec, made, "cuda"), steps, placed.summary.hit_rate)


def strategies() -> Iterator[Policy]:
    """Those shown."""
    by_name = {policy.name: policy for policy in simulate.POLICIES}
    return (by_name[name] for name in SHOWN)


def seconds(policy: Policy, steps: Steps, setting: Setting) -> float:
    """Of all steps."""
    return float(policy.replay(steps, setting).us.sum()) / 1e6


def prompt_seconds(policy: Policy, place: Environment, tokens: int) -> float:
    """Of a prompt."""
    return seconds(policy, prompt_steps(place.steps, tokens, policy.chunk_tokens), place.setting)


def decode_rows(place: Environment, published: dict[str, Any]) -> Iterator[Row]:
    """Output tokens over the whole time, the prompt's included: the paper's measure."""
    stated = published["decode_configurations"]
    for entering in stated["input_tokens"]:
        prompts = {policy.name: prompt_seconds(policy, place, entering) for policy in strategies()}
        # A shorter answer's steps are the longest one's first.
        steps = decode_steps(place.steps["decode"], entering, max(stated["output_tokens"]))
        us = {policy.name: policy.replay(steps, place.setting).us for policy in strategies()}
        for leaving in stated["output_tokens"]:
            rates = {name: leaving / (prompts[name] + float(us[name][:leaving].sum()) / 1e6) for name in us}
            yield Row(f"{entering}/{leaving}", rates)


def prefill_rows(place: Environment, published: dict[str, Any]) -> Iterator[Row]:
    """Prompts per second, so that more is better."""
    for tokens in published["prefill_lengths"]:
        yield Row(str(tokens), {policy.name: 1 / prompt_seconds(policy, place, tokens) for policy in strategies()})


def beam_rows(place: Environment, published: dict[str, Any]) -> Iterator[Row]:
    """Tokens of the resulting text over the whole time."""
    prompts = {policy.name: prompt_seconds(policy, place, BEAM_INPUT) for policy in strategies()}
    for width in published["beam_widths"]:
        rates = {}
        for policy in strategies():
            steps = beam_steps(place.steps["decode"], width, policy.beams_together)
            rates[policy.name] = BEAM_OUTPUT / (prompts[policy.name] + seconds(policy, steps, place.setting))
        yield Row(str(width), rates)


def hit_rates(places: dict[str, Environment], published: dict[str, Any]) -> str:
    """By popularity, beside the published ones."""
    rows = []
    for key, place in places.items():
        stated = published["environments"][key]
        share = stated["experts_on_gpu"] / stated["of"]
        rows.append(
            [
                key,
                f"{stated['experts_on_gpu']}/{stated['of']}",
                f"{place.hit_rate:.1%}",
                f"{stated['hit_rate_popularity']:.1%}",
                f"{share:.1%}",
                f"{stated['hit_rate_random']:.1%}",
            ]
        )
    head = ["environment", "experts on the GPU", "hit rate by popularity", "published", "random", "published"]
    return titled("Hit rates", table(head, rows))


def summary(results: dict[str, dict[str, list[Row]]], published: dict[str, Any]) -> str:
    """Mean speed-ups over the best baseline of each configuration."""
    rows = []
    for scenario, by_environment in results.items():
        stated = published["headline_speedup_over_best_baseline"][scenario]
        for key, found in [*by_environment.items(), ("both", [r for part in by_environment.values() for r in part])]:
            means = [f"{statistics.fmean(r.over_best(name) for r in found):.2f} x" for name in SHOWN[:3]]
            rows.append([scenario.replace("_", " "), key, *means, f"{stated} x" if key == "both" else ""])
    head = ["scenario", "environment", "ours", "fiddler (Algorithm 1)", "fiddler-code", "published (Fiddler)"]
    return titled("Speed-up over the best baseline, mean over configurations", table(head, rows))


def repeats(places: dict[str, Environment], beam: dict[str, list[Row]]) -> str:
    """What it means for llama.cpp when each of its beams computes more than its last token again in every step."""
    by_name = {policy.name: policy for policy in strategies()}
    llama, names = by_name["llama.cpp"], ("fiddler", "fiddler-code")
    rows = []
    for tokens in REPEATED:
        ratios: dict[str, list[float]] = {name: [] for name in names}
        for key, place in places.items():
            prompt = prompt_seconds(llama, place, BEAM_INPUT)
            one = seconds(llama, beam_steps(place.steps["decode"], tokens, True), place.setting)
            for row in beam[key]:
                rates = {**row.rates, "llama.cpp": BEAM_OUTPUT / (prompt + int(row.label) * one)}
                for name in names:
                    ratios[name].append(Row(row.label, rates).over_best(name))
        rows.append([str(tokens), *(f"{statistics.fmean(ratios[name]):.2f} x" for name in names)])
    head = ["tokens a beam computes in a step of llama.cpp", "fiddler (Algorithm 1)", "fiddler-code"]
    return titled("Beam search, mean speed-up over the best baseline, if llama.cpp repeats tokens", table(head, rows))


def measured(decode: list[Row], prefill: list[Row], published: dict[str, Any]) -> str:
    """The baselines that were measured, on environment 2's GPU."""
    rows = []
    by_label = {row.label: row for row in decode}
    for name, found in published["measured_baselines"].items():
        if name == "gpu":
            continue
        rates = [
            (by_label[label].rates[name], one["output"] / (one["prefill_s"] + one["decode_s"]))
            for one in found["decode"]
            if (label := f"{one['input']}/{one['output']}") in by_label
        ]
        rows.append([name, f"decode, {len(rates)} configurations, tokens/s", *compared(rates)])
        for row in prefill:
            if row.label in found["prefill_s"]:
                times = [(1 / row.rates[name], found["prefill_s"][row.label])]
                rows.append([name, f"prompt of {row.label}, s", *compared(times)])
    return titled("Baselines as measured (env2)", table(["baseline", "what", "predicted", "measured", "ratio"], rows))


def compared(pairs: list[tuple[float, float]]) -> list[str]:
    """Medians of predicted and measured, and of their ratio."""
    predicted, found = (statistics.median(values) for values in zip(*pairs, strict=True))
    return [f"{predicted:.3g}", f"{found:.3g}", f"{statistics.median(a / b for a, b in pairs):.2f}"]


def section(title: str, label: str, rows: Iterable[Row]) -> str:
    """What each strategy reaches, and three of them over the best baseline."""
    head = [label, *SHOWN, *(f"{name} / best" for name in SHOWN[:3])]
    cells = [
        [row.label, *(f"{row.rates[n]:.3g}" for n in SHOWN), *(f"{row.over_best(n):.2f}" for n in SHOWN[:3])]
        for row in rows
    ]
    return titled(title, table(head, cells))


def titled(title: str, body: str) -> str:
    return f"### {title}\n\n{body}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
