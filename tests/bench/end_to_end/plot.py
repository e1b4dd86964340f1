"""Measured and predicted rates, one panel a scenario."""

from __future__ import annotations

from pathlib import Path

from fiddler_runtime.errors import FiddlerError

from .configurations import SCENARIOS
from .record import Record
from .strategies import NAMES
from .table import configurations, rate


def draw(record: Record, path: Path) -> None:
    """Writes the plot. Raises FiddlerError if it cannot."""
    from matplotlib.figure import Figure

    found = configurations(record)
    scenarios = [scenario for scenario in SCENARIOS if any(c.scenario == scenario for c in found)]
    if not scenarios:
        return
    figure = Figure(figsize=(7.0 * len(scenarios), 4.8), layout="constrained")
    for number, scenario in enumerate(scenarios, 1):
        axes = figure.add_subplot(1, len(scenarios), number, yscale="log")
        rows = [c for c in found if c.scenario == scenario]
        for index, name in enumerate(NAMES):
            color = f"C{index}"
            measured = [(c, seconds) for c in rows if (seconds := record.seconds(name, c)) is not None]
            predicted = [(c, s) for c, _ in measured if (s := record.predicted.get(name, {}).get(c.label)) is not None]
            if measured:
                places, rates = zip(*((rows.index(c), rate(c, s)) for c, s in measured), strict=True)
                axes.plot(places, rates, marker="o", color=color, label=name, linewidth=2.2 if name == "ours" else 1.0)
            if predicted:
                places, rates = zip(*((rows.index(c), rate(c, s)) for c, s in predicted), strict=True)
                axes.plot(places, rates, marker="o", markerfacecolor="none", linestyle=":", color=color)
        axes.set_xticks(range(len(rows)), [c.label.partition(":")[2] for c in rows], rotation=60)
        axes.set_title(f"{scenario}: tokens/s, measured (predicted dotted)", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise FiddlerError(f"cannot write {path}", found=str(error), hint="--output OTHER_FOLDER") from None
