"""One self-contained HTML page that says what a plan decided, from what, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import numpy.typing as npt

from fiddler_runtime.makespan import Decision, Latencies, choose, dense, makespans
from fiddler_runtime.plan import Header
from fiddler_runtime.text import PLACEMENTS, format_bytes

from ..ir import Calibration, LatencyModel, MemoryBudget, Placement, Prediction, Scenario, Steps, Tables
from .text import format_rate, format_us
from .timeline import ACCELERATOR_LANE, CPU_LANE, Timeline, layer_timeline, step_timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPT_TOKENS = (16, 128, 512, 2048)


@dataclass(frozen=True)
class Inputs:
    """Everything that the page tells of. steps are those that prediction and features were made from."""

    header: Header
    calibration: Calibration
    latency: LatencyModel
    placement: Placement
    budget: MemoryBudget
    tables: Tables
    steps: Mapping[Scenario, Steps]
    prediction: Prediction


def render(inputs: Inputs) -> bytes:
    """The page, UTF-8. The same arguments give the same bytes: nothing in it is dated, random or of this machine."""
    from . import figures  # matplotlib: only compiling needs it, and it takes a quarter of a second

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    environment.filters["time"] = format_us
    environment.filters["rate"] = format_rate
    header, tables = inputs.header, inputs.tables
    page = environment.get_template("page.html.j2").render(
        header=header,
        placements=PLACEMENTS,
        model=header.model,
        machine=inputs.calibration.machine,
        limits=inputs.calibration.limits,
        latency=inputs.latency,
        prediction=inputs.prediction,
        memory=[(name, size) for name, size in _memory(inputs) if inputs.budget.total_bytes],
        total_bytes=inputs.budget.total_bytes,
        decode=_decode_decisions(header, tables),
        prompts=_prompt_decisions(header, tables),
        crossover=_crossover(inputs),
        figures={name: figures.svg(figure) for name, figure in _figures(inputs).items()},
    )
    return page.encode()


def plots(inputs: Inputs) -> dict[str, bytes]:
    """The page's figures as PNG, by file name."""
    from . import figures

    return {f"{name}.png": figures.png(figure) for name, figure in _figures(inputs).items()}


def _figures(inputs: Inputs) -> dict[str, Figure]:
    """Every figure by its name; those that there is nothing to show in are left out."""
    from . import figures

    header, calibration, fitted = inputs.header, inputs.calibration, inputs.latency
    found = {
        "latency": figures.latency(header, calibration, fitted, _crossover(inputs)),
        "residuals": figures.residuals(header, calibration, fitted),
        "throughput": figures.throughput(inputs.prediction),
        "placement": figures.placement(inputs.placement),
        "decode-step": figures.gantt(_decode_step(inputs)),
        "prefill-layer": figures.gantt(_prefill_layer(inputs)),
        "memory": figures.memory(_memory(inputs), inputs.budget.total_bytes) if inputs.budget.total_bytes else None,
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _decode_step(inputs: Inputs) -> Timeline:
    """All layers of the held-out step of one token whose experts take the median time."""
    header, steps = inputs.header, inputs.steps["decode"]
    latencies, resident = _latencies(inputs), inputs.placement.resident
    counts = steps.counts[steps.heldout]
    layers = np.tile(resident, (len(counts), 1))
    spans = makespans(counts.reshape(-1, counts.shape[2]), layers, latencies).makespan_us
    middle = _median_index(spans.reshape(len(counts), -1).sum(axis=1))
    rest_us = float(np.interp(1, inputs.latency.tokens, inputs.latency.rest_us))
    rest_us += inputs.latency.rest_kv_us * int(steps.kv[steps.heldout][middle])
    moe = [layer in header.model.moe_layers for layer in range(header.model.num_layers)]
    # As in the simulation: without a GPU the CPU runs the rest of a step.
    lane = ACCELERATOR_LANE if inputs.calibration.machine.accelerator.kind == "cuda" else CPU_LANE
    return step_timeline(counts[middle], resident, latencies, moe, rest_us, lane)


def _prefill_layer(inputs: Inputs) -> Timeline:
    """The layer of median makespan among the longest held-out prompts."""
    steps, latencies, resident = inputs.steps["prefill"], _latencies(inputs), inputs.placement.resident
    longest = steps.tokens == steps.tokens[steps.heldout].max()
    counts = steps.counts[steps.heldout & longest]
    layers = np.tile(resident, (len(counts), 1))
    flat = counts.reshape(-1, counts.shape[2])
    middle = _median_index(makespans(flat, layers, latencies).makespan_us)
    return layer_timeline(flat[middle], layers[middle], latencies)


def _latencies(inputs: Inputs) -> Latencies:
    split = any(feature.name == "split" and feature.on for feature in inputs.header.features)
    return dense(inputs.tables, rows=inputs.header.model.intermediate_size if split else 0)


def _median_index(values: npt.NDArray[np.float64]) -> int:
    return int(np.argsort(values, kind="stable")[len(values) // 2])


def _memory(inputs: Inputs) -> list[tuple[str, int]]:
    experts = inputs.header.placement.resident_experts * inputs.header.model.expert_bytes
    return [*((item.item, item.bytes) for item in inputs.budget.items), ("resident experts", experts)]


def _crossover(inputs: Inputs) -> int | None:
    kind = inputs.header.hardware.machine.accelerator.kind
    return None if kind == "none" else crossover_tokens(inputs.latency)


def _decode_decisions(header: Header, tables: Tables) -> list[dict[str, Any]]:
    """What a step of one token does, by how many of its experts are not on the accelerator."""
    latencies, top_k = dense(tables), header.model.top_k
    counts = np.ones(top_k, np.int32)
    return [
        _row(misses, top_k - misses, misses, choose(counts, np.arange(top_k) >= misses, latencies))
        for misses in range(top_k + 1)
    ]


def _prompt_decisions(header: Header, tables: Tables) -> list[dict[str, Any]]:
    """What prompts do in a layer with an average number of residents, if they choose all experts equally often."""
    latencies, model = dense(tables), header.model
    residents = round(float(tables.resident.sum(axis=1).mean()))
    rows = []
    for tokens in PROMPT_TOKENS:
        choices = tokens * model.top_k
        counts = np.full(model.num_experts, choices // model.num_experts, np.int32)
        counts[: choices % model.num_experts] += 1
        # The popular ones are at home, but which counts are theirs is open: take the last.
        resident = np.arange(model.num_experts) >= model.num_experts - residents
        decision = choose(counts, resident, latencies)
        active = int((counts > 0).sum())
        hits = int((resident & (counts > 0)).sum())
        rows.append(_row(tokens, hits, active - hits, decision))
    return rows


def _row(label: int, hits: int, misses: int, decision: Decision) -> dict[str, Any]:
    return {
        "label": label,
        "resident": hits,
        "streamed": decision.streamed,
        "cpu": misses - decision.streamed,
        "cpu_us": decision.cpu_us,
        "accelerator_us": decision.accelerator_us,
        "makespan_us": decision.makespan_us,
    }


def crossover_tokens(latency: LatencyModel) -> int | None:
    """From how many tokens of one expert alone a copy and the accelerator beat the CPU; None if they never do."""
    cheaper = (
        latency.gpu_us + latency.stream_us + latency.gpu_overhead_us < latency.prevailing_us + latency.cpu_overhead_us
    )
    found = np.flatnonzero(cheaper & (latency.tokens > 0))
    return int(latency.tokens[found[0]]) if found.size else None
