"""The report's figures, as SVG text that depends on its data only."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fiddler_runtime.plan import Header

from ..ir import Calibration, LatencyModel, Placement

CPU, GPU, COPY = "#c2571a", "#1f6f8b", "#6b6b6b"
_STYLE = {
    # Element ids are hashed with this instead of a random number; text stays text, drawn in the reader's font.
    "svg.hashsalt": "fiddlerc",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def latency(header: Header, calibration: Calibration, fitted: LatencyModel, crossover: int | None) -> str:
    """c(n), and g(n) with and without the copy, over tokens; measured samples of the model's own shape as dots.

    crossover  tokens from which streaming one expert beats the CPU, marked by a line
    """
    model = header.model
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.0))
        axes = figure.add_subplot()
        tokens = fitted.tokens[1:]
        axes.plot(tokens, fitted.prevailing_us[1:], color=CPU, label="(c) CPU, c(n)")
        if header.hardware.machine.accelerator.kind != "none":
            streamed = fitted.gpu_us[1:] + fitted.stream_us
            axes.plot(tokens, fitted.gpu_us[1:], color=GPU, label="(a) resident, g(n)")
            axes.plot(tokens, streamed, color=COPY, linestyle="--", label="(b) streamed, w + g(n)")
            if crossover is not None:
                axes.axvline(crossover, color=COPY, linewidth=0.8, linestyle=":")
                axes.text(
                    crossover,
                    0.02,
                    f" {crossover} tokens",
                    transform=axes.get_xaxis_transform(),
                    fontsize=8,
                    color=COPY,
                )
        for quantity, color, entry_us in (
            ("cpu_expert", CPU, fitted.cpu_overhead_us),
            ("gpu_expert", GPU, 0.0),
        ):
            own = [
                s
                for s in calibration.samples
                if s.quantity == quantity
                and (s.hidden_size, s.intermediate_size) == (model.hidden_size, model.intermediate_size)
            ]
            # Samples of the CPU include entering the lane once, which the curve does not; the accelerator's do not.
            times = [max(s.median_us - entry_us, 1e-3) for s in own]
            axes.plot([s.tokens for s in own], times, ".", color=color, markersize=5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of one expert")
        axes.set_ylabel("microseconds")
        axes.legend(frameon=False)
        return _svg(figure)


def placement(header: Header, placed: Placement) -> str:
    """Popularity by layer and expert; a dot marks an expert on the accelerator."""
    layers, experts = placed.popularity.shape
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7.2, min(7.0, max(2.2, 1.2 + 0.17 * layers))))
        axes = figure.add_subplot()
        shares = placed.popularity * experts
        # At least to twice the mean: a nearly uniform popularity should look like one.
        image = axes.imshow(
            shares,
            aspect="auto",
            cmap="YlOrBr",
            vmin=0.0,
            vmax=max(2.0, float(shares.max())),
            interpolation="nearest",
            rasterized=True,
        )
        rows, columns = np.nonzero(placed.resident)
        size = max(1.0, min(6.0, 300.0 / experts))
        axes.plot(columns, rows, "o", color=GPU, markersize=size, label="on the accelerator")
        axes.set_xlabel("expert")
        axes.set_ylabel("MoE layer")
        figure.colorbar(image, ax=axes, label="times the mean popularity")
        return _svg(figure)


def memory(used: Sequence[tuple[str, int]], total_bytes: int) -> str:
    """One bar: the accelerator's memory by use."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7.2, 1.6))
        axes = figure.add_subplot()
        left = 0.0
        colors = matplotlib.colormaps["tab10"]
        for index, (name, size) in enumerate(used):
            axes.barh(0, size / 2**30, left=left, color=colors(index), label=name)
            left += size / 2**30
        axes.set_xlim(0, max(left, total_bytes / 2**30))
        axes.set_yticks([])
        axes.set_xlabel(f"GiB of {total_bytes / 2**30:.4g}")
        axes.legend(ncols=3, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.7))
        return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}, transparent=True
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Width and height in points would fix the size; the view box alone lets the page decide.
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
