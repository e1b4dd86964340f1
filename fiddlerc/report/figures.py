"""The report's figures, as SVG text that depends on its data only."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fiddler_runtime.plan import Header

from ..ir import Calibration, CurveSummary, LatencyModel, Placement, Prediction
from .text import format_rate
from .timeline import LANES, Timeline

_WIDTH = 5.0  # inches, or 360 points: about the pixels of a phone's page, where a point is a pixel then
_LABEL_WIDTH = 0.013  # of one character in a bar, as part of the axis
CPU, SLOW, GPU, COPY = "#c2571a", "#e3a06f", "#1f6f8b", "#6b6b6b"
_STYLE = {
    # Element ids are hashed with this instead of a random number; text stays text, drawn in the reader's font.
    "svg.hashsalt": "fiddlerc",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def latency(header: Header, calibration: Calibration, fitted: LatencyModel, crossover: int | None) -> Figure:
    """c(n) in each regime, and g(n) with and without the copy, over tokens; dots are samples of the model's own shape.

    Bands are 90 % prediction intervals. A line marks `crossover`: tokens from which streaming one expert beats the CPU.
    """
    summaries = _summaries(fitted)
    tokens = fitted.tokens[1:]
    figure, axes = _plot(4.0)

    def curve(values: npt.NDArray[np.float64], quantity: str, label: str, color: str, line: str = "-") -> None:
        axes.plot(tokens, values, line, color=color, label=label)
        summary = summaries[quantity]
        low, high = values * summary.interval_low, values * summary.interval_high
        axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)

    two = len(fitted.cpu_us) > 1
    for row, line, name in zip(fitted.cpu_us, ("-", ":"), (", fast memory", ", slow memory"), strict=False):
        curve(row[1:], "cpu_expert", "(c) CPU, c(n)" + (name if two else ""), CPU, line)
    if header.hardware.machine.accelerator.kind != "none":
        curve(fitted.gpu_us[1:], "gpu_expert", "(a) resident, g(n)", GPU)
        axes.plot(tokens, fitted.gpu_us[1:] + fitted.stream_us, "--", color=COPY, label="(b) streamed, w + g(n)")
        if crossover is not None:
            axes.axvline(crossover, color=COPY, linewidth=0.8, linestyle=":")
            at = axes.get_xaxis_transform()
            axes.text(crossover, 0.02, f" {crossover} tokens", transform=at, fontsize=8, color=COPY)
    for _, color, measured, times in _own_samples(header, calibration, fitted):
        axes.plot(measured, times, ".", color=color, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of one expert")
    axes.set_ylabel("microseconds")
    axes.legend(frameon=False)
    return figure


def residuals(header: Header, calibration: Calibration, fitted: LatencyModel) -> Figure | None:
    """Measured over fitted, by tokens, with the 90 % intervals of held-out sizes; None without samples of the shape."""
    own = _own_samples(header, calibration, fitted)
    if not own:
        return None
    summaries = _summaries(fitted)
    figure, axes = _plot(2.4)
    for quantity, color, tokens, times in own:
        row = fitted.cpu_us[-1 if quantity.endswith("slow") else 0] if quantity.startswith("cpu") else fitted.gpu_us
        predicted = np.interp(tokens, fitted.tokens, row)
        axes.plot(tokens, times / predicted, "o", color=color, markersize=4, label=quantity)
        summary = summaries["cpu_expert" if quantity.startswith("cpu") else "gpu_expert"]
        axes.axhspan(summary.interval_low, summary.interval_high, color=color, alpha=0.08, linewidth=0)
    axes.axhline(1.0, color="#222", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of one expert")
    axes.set_ylabel("measured / fitted")
    axes.legend(frameon=False, ncols=3, fontsize=8)
    return figure


def _summaries(fitted: LatencyModel) -> dict[str, CurveSummary]:
    return {curve.quantity: curve for curve in fitted.curves}


_Own = tuple[str, str, npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _own_samples(header: Header, calibration: Calibration, fitted: LatencyModel) -> list[_Own]:
    """(name, colour, tokens, microseconds) of the samples of the model's own shape, by quantity and regime."""
    shape = (header.model.hidden_size, header.model.intermediate_size)
    found: list[_Own] = []
    for quantity, regime, color, entry_us in (
        ("cpu_expert", "fast", CPU, fitted.cpu_overhead_us),
        ("cpu_expert", "slow", SLOW, fitted.cpu_overhead_us),
        ("gpu_expert", "fast", GPU, 0.0),
    ):
        own = [
            s
            for s in calibration.samples
            if (s.quantity, s.regime, s.hidden_size, s.intermediate_size) == (quantity, regime, *shape)
        ]
        if own:
            name = quantity.replace("_expert", "").replace("gpu", "accelerator") + (" slow" if regime == "slow" else "")
            # Samples of the CPU include entering the lane once, which the curve does not; the accelerator's do not.
            times = np.maximum(np.array([s.median_us for s in own]) - entry_us, 1e-3)
            found.append((name, color, np.array([float(s.tokens) for s in own]), times))
    return found


def throughput(prediction: Prediction) -> Figure:
    """Predicted decode, time to the first token and beam search, ours beside the literature's strategies."""
    results = prediction.results
    names = [result.policy for result in results]
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.26 * len(names)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, title, values in (
            (panels[0], "decode,\ntokens/s", [r.decode_tokens_per_s for r in results]),
            (panels[1], f"first token\nof {results[0].prefill_tokens}, s", [r.ttft_s for r in results]),
            (panels[2], f"{results[0].beam_width} beams,\ntokens/s", [r.beam_tokens_per_s for r in results]),
        ):
            bars = axes.barh(names, values, color=[GPU if name == "ours" else "#b8c4cc" for name in names])
            axes.bar_label(bars, labels=[format_rate(value) for value in values], fontsize=7, padding=2)
            axes.set_xlim(0, 1.25 * max(values))
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        panels[0].invert_yaxis()
        return figure


_KINDS = {
    "rest": ("attention and the like", "#b9b4a6"),
    "entry": ("entering a lane", "#dcdcdc"),
    "copy": ("copy", COPY),
    "resident": ("(a) resident", GPU),
    "streamed": ("(b) streamed", "#5aa7bf"),
    "cpu": ("(c) CPU", CPU),
}


def gantt(timeline: Timeline) -> Figure:
    """What each lane does when, in one layer or a whole step; of a step, layers are numbered above."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 2.3), layout="constrained")
        axes = figure.add_subplot()
        unit, name = (1e3, "milliseconds") if timeline.end_us >= 2000 else (1.0, "microseconds")
        layers = [bar for bar in timeline.bars if bar.kind == "rest"]
        line = 0.0 if layers else 0.5  # a step's bars are thinner than lines between them
        for kind, (label, color) in _KINDS.items():
            for lane in range(len(LANES)):
                bars = [bar for bar in timeline.bars if (bar.kind, bar.lane) == (kind, lane)]
                if bars:
                    spans = [(bar.start_us / unit, (bar.end_us - bar.start_us) / unit) for bar in bars]
                    axes.broken_barh(
                        spans, (lane - 0.4, 0.8), facecolor=color, edgecolor="white", linewidth=line, label=label
                    )
                    label = "_"  # once in the legend
        for bar in [] if layers else timeline.bars:
            length = bar.end_us - bar.start_us
            if length > _LABEL_WIDTH * len(bar.label) * timeline.end_us:
                middle = (bar.start_us + length / 2) / unit
                axes.text(middle, bar.lane, bar.label, ha="center", va="center", fontsize=7, color="white")
        axes.axvline(timeline.end_us / unit, color="#222", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(LANES)), LANES)
        axes.set_ylim(len(LANES) - 0.5, -0.5)
        axes.set_xlim(0, 1.02 * timeline.end_us / unit)
        axes.set_xlabel(name)
        if layers:
            shown = layers[:: max(1, len(layers) // 8)]
            above = axes.secondary_xaxis("top")
            names = [f"layer {shown[0].label}", *(bar.label for bar in shown[1:])]
            above.set_xticks([bar.start_us / unit for bar in shown], names, fontsize=8)
        figure.legend(frameon=False, ncols=3, fontsize=8, loc="outside upper left")
        return figure


def placement(placed: Placement) -> Figure:
    """Popularity by layer and expert; a dot marks an expert on the accelerator."""
    layers, experts = placed.popularity.shape
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, min(7.0, max(2.2, 1.2 + 0.17 * layers))))
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
        return figure


def memory(used: Sequence[tuple[str, int]], total_bytes: int) -> Figure:
    """One bar: the accelerator's memory by use."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 1.2))
        axes = figure.add_subplot()
        unit, name = (2**30, "GiB") if total_bytes >= 2**30 else (2**20, "MiB")
        left = 0.0
        colors = matplotlib.colormaps["tab10"]
        for index, (item, size) in enumerate(used):
            axes.barh(0, size / unit, left=left, color=colors(index), label=item)
            left += size / unit
        axes.set_xlim(0, max(left, total_bytes / unit))
        axes.set_yticks([])
        axes.set_xlabel(f"{name} of {total_bytes / unit:.4g}")
        axes.legend(ncols=2, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}, transparent=True
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Width and height in points would fix the size; the view box alone lets the page decide.
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))


def png(figure: Figure) -> bytes:
    """The figure as a picture, 2 x for screens."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _plot(height: float) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        return figure, figure.add_subplot()
