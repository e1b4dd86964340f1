"""One self-contained HTML page that says what a plan decided, from what, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fiddler_runtime.makespan import choose, dense
from fiddler_runtime.plan import Header

from ..ir import Calibration, LatencyModel, MemoryBudget, Placement, Tables

PREFILL_TOKENS = (16, 128, 512, 2048)


def render(
    header: Header,
    calibration: Calibration,
    latency: LatencyModel,
    placement: Placement,
    budget: MemoryBudget,
    tables: Tables,
) -> bytes:
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
    experts_bytes = header.placement.resident_experts * header.model.expert_bytes
    used = [*((item.item, item.bytes) for item in budget.items), ("resident experts", experts_bytes)]
    page = environment.get_template("page.html.j2").render(
        header=header,
        model=header.model,
        machine=calibration.machine,
        limits=calibration.limits,
        latency=latency,
        memory=[(name, size) for name, size in used if budget.total_bytes],
        total_bytes=budget.total_bytes,
        decisions=_decisions(header, tables),
        latency_figure=figures.latency(header, calibration, latency),
        placement_figure=figures.placement(header, placement),
        memory_figure=figures.memory(used, budget.total_bytes) if budget.total_bytes else "",
    )
    return page.encode()


def _decisions(header: Header, tables: Tables) -> list[dict[str, Any]]:
    """What the tables decide for a layer with an average number of residents: one token, then prompts."""
    latencies, model = dense(tables), header.model
    residents = round(float(tables.resident.sum(axis=1).mean()))
    rows = []
    for tokens in (1, *PREFILL_TOKENS):
        # Uniform routing: one token has top-k experts with one row each; a prompt spreads over all.
        active = min(model.num_experts, tokens * model.top_k)
        counts = np.full(active, -(-tokens * model.top_k // active), np.int32)
        hits = round(active * residents / model.num_experts)
        decision = choose(counts, np.arange(active) >= active - hits, latencies)
        rows.append(
            {
                "tokens": tokens,
                "resident": hits,
                "streamed": decision.streamed,
                "cpu": active - hits - decision.streamed,
                "cpu_us": decision.cpu_us,
                "accelerator_us": decision.accelerator_us,
            }
        )
    return rows


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
