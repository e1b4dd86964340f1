"""One self-contained HTML page that says what a plan decided, from what, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fiddler_runtime.makespan import Decision, choose, dense
from fiddler_runtime.plan import Header

from ..ir import Calibration, LatencyModel, MemoryBudget, Placement, Tables

PROMPT_TOKENS = (16, 128, 512, 2048)


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
    environment.filters["time"] = format_us
    crossover = None if header.hardware.machine.accelerator.kind == "none" else crossover_tokens(latency)
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
        decode=_decode_decisions(header, tables),
        prompts=_prompt_decisions(header, tables),
        crossover=crossover,
        latency_figure=figures.latency(header, calibration, latency, crossover),
        placement_figure=figures.placement(header, placement),
        memory_figure=figures.memory(used, budget.total_bytes) if budget.total_bytes else "",
    )
    return page.encode()


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
    cheaper = latency.gpu_us + latency.stream_us + latency.gpu_overhead_us < latency.prevailing_us + latency.cpu_overhead_us
    found = np.flatnonzero(cheaper & (latency.tokens > 0))
    return int(latency.tokens[found[0]]) if found.size else None


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_us(microseconds: float) -> str:
    """1234.5 -> '1.23 ms'."""
    if microseconds < 1000:
        return f"{microseconds:.0f} µs" if microseconds >= 10 or microseconds == 0 else f"{microseconds:.1f} µs"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"
