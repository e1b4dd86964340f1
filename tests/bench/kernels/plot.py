"""The roofline plot of measured rows: GFLOP/s over operations per byte of weights, one panel for each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from fiddler_runtime.errors import FiddlerError

from .statistics import spread
from .table import cases

_COLUMNS = 2
_COLORS = tuple(f"tab:{name}" for name in ("blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan"))


def require_matplotlib() -> None:
    """Raises FiddlerError before anything is measured for a plot that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FiddlerError("cannot draw: no matplotlib in this environment", hint="pip install matplotlib") from None


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the plot to `path`, in the format that its ending names.

    The limits change from row to row, so a point is the share of the roofline that was reached there, at the height
    that this share has under the panel's median limits.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    panels = cases(rows)
    lines = -(-len(panels) // _COLUMNS)
    names = dict.fromkeys(name for row in rows for name in row["figures"])
    colors = dict(zip((name for name in names if name != "ours"), cycle(_COLORS), strict=False))
    figure = Figure(figsize=(6.5 * min(len(panels), _COLUMNS), 4.5 * lines), layout="constrained")
    for at, (title, members) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, min(len(panels), _COLUMNS), at, xscale="log", yscale="log")
        read = spread([f["read_gbps"] for m in members for f in m["figures"].values()]).median
        peak = spread([f["peak_gflops"] for m in members for f in m["figures"].values()]).median
        intensities = [next(iter(m["figures"].values()))["flop_per_byte"] for m in members]
        xs = sorted({*intensities, peak / read})
        axes.plot(
            xs, [min(peak, read * x) for x in xs], color="black", label=f"limit: {read:.0f} GB/s, {peak:.0f} GFLOP/s"
        )
        for name in dict.fromkeys(name for m in members for name in m["figures"]):
            points = [
                (x, m["figures"][name]["roofline"]["median"] * min(peak, read * x))
                for x, m in zip(intensities, members, strict=True)
                if name in m["figures"]
            ]
            ours = name == "ours"
            bold = {"linewidth": 2.2, "color": "tab:red", "zorder": 3} if ours else {"color": colors[name]}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **{"linewidth": 1.0, **bold})
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("flop per byte of weights")
        axes.set_ylabel("GFLOP/s")
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise FiddlerError(f"cannot write {path}", found=str(error)) from None
