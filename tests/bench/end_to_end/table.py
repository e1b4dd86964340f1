"""The results as Markdown: measured beside predicted, ours over each other strategy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from .configurations import PUBLISHED, SCENARIOS, Configuration, paper
from .record import Record
from .strategies import CONTENDERS, NAMES

_TITLES = {
    "decode": "Decode: output tokens/s, the prompt's time included",
    "prefill": "Prefill: prompt tokens/s until the first token",
    "beam": "Beam search, 32 in, 64 out: tokens of the answer/s, the prompt's time included",
}
_PUBLISHED = {"decode": "single_batch_decode", "prefill": "long_prefill", "beam": "beam_search"}


def rate(wanted: Configuration, seconds: float) -> float:
    """Tokens per second, as the paper counts them."""
    return (wanted.prompt if wanted.scenario == "prefill" else wanted.new) / seconds


def configurations(record: Record) -> list[Configuration]:
    """Those with results: the paper's in its order, then others."""
    others = []
    for rounds in record.about.get("asked", []):
        others.append(Configuration(**rounds))
    every = dict.fromkeys([*paper(), *others])
    return [c for c in every if any(record.seconds(name, c) is not None for name in NAMES)]


def render(record: Record) -> str:
    """All tables; what was not measured is left out, and named where it is part of the paper's experiment."""
    about, found = record.about, configurations(record)
    names = [name for name in NAMES if record.runs.get(name)]
    lines = ["# End to end", "", *[f"- {line}" for line in about.get("lines", [])], ""]
    lines += [f"- **{c.name}**: {c.what}" for c in CONTENDERS if c.name in names]
    for scenario in SCENARIOS:
        rows = [c for c in found if c.scenario == scenario]
        if rows:
            lines += ["", f"## {_TITLES[scenario]}", "", *_table(record, names, rows)]
    lines += [
        "",
        "Measured (predicted). ours / x: how many times faster ours is, measured.",
        "",
        *_summary(record, found),
    ]
    missing = [c.label for c in paper() if any(record.seconds(name, c) is None for name in names)]
    if missing:
        lines += ["", f"Not measured yet, of the paper's configurations: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _table(record: Record, names: Sequence[str], rows: Sequence[Configuration]) -> list[str]:
    others = [name for name in names if name != "ours"]
    head = ["", *names, *(f"ours / {name}" for name in others if "ours" in names)]
    lines = []
    for wanted in rows:
        cells = [wanted.label.partition(":")[2]]
        for name in names:
            seconds, predicted = record.seconds(name, wanted), record.predicted.get(name, {}).get(wanted.label)
            cell = "–" if seconds is None else f"{rate(wanted, seconds):.3g}"
            cells.append(cell + ("" if predicted is None else f" ({rate(wanted, predicted):.3g})"))
        if "ours" in names:
            cells += [_times(record, wanted, name) for name in others]
        lines.append(cells)
    return markdown(head, lines)


def _times(record: Record, wanted: Configuration, other: str) -> str:
    ratio = times(record, wanted, other)
    return "–" if ratio is None else f"{ratio:.2f}"


def times(record: Record, wanted: Configuration, other: str) -> float | None:
    """How many times faster ours is."""
    mine, theirs = record.seconds("ours", wanted), record.seconds(other, wanted)
    return None if mine is None or theirs is None else theirs / mine


def _summary(record: Record, found: Sequence[Configuration]) -> list[str]:
    published = json.loads(PUBLISHED.read_text())["headline_speedup_over_best_baseline"]
    rows = []
    for scenario in SCENARIOS:
        part = [c for c in found if c.scenario == scenario]
        if not part:
            continue
        cells = [scenario]
        for other in NAMES[1:]:
            ratios = [ratio for c in part if (ratio := times(record, c, other)) is not None]
            cells.append(f"{statistics.fmean(ratios):.2f} ({len(ratios)})" if ratios else "–")
        cells.append(f"{published[_PUBLISHED[scenario]]}")
        rows.append(cells)
    head = ["ours over", *NAMES[1:], "Fiddler's paper: itself over its best baseline"]
    return [
        "Means over configurations, and how many:",
        "",
        *markdown(head, rows),
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
