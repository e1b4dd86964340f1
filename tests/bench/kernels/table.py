"""Rows of figures from samples, and how they are printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .measure import Peaks
from .statistics import Sample, paired, spread

NO_PEERS = ("against", "both")
"""Contenders that are this project's own."""


def row(samples: Mapping[str, Sequence[Sample]], peaks: Peaks) -> dict[str, Any]:
    """The figures of one row: for each contender, the first being ours.

    roofline            share of the limit: median, low and high quartile
    us, gbps, gflops    of one call (median), and what that is in weights read and operations done
    read_gbps, peak_gflops  the limits around it (median)
    ours_times_faster   paired by round: median and quartiles; absent for ours
    rounds, rejected    how many samples, and how many were disturbed. If all were, the figures are of all of them.
    """
    kept = {name: [s if peaks.steady(s) else None for s in all_] for name, all_ in samples.items()}
    for name, all_ in samples.items():
        if not any(kept[name]):
            kept[name] = list(all_)
    ours = kept[next(iter(samples))]
    figures: dict[str, Any] = {}
    for name, all_ in samples.items():
        good = [s for s in kept[name] if s is not None]
        figures[name] = {
            "roofline": dataclasses.asdict(spread([s.roofline for s in good])),
            "us": spread([1e6 * s.seconds / len(s.work) for s in good]).median,
            "gbps": spread([sum(w.bytes for w in s.work) / s.seconds / 1e9 for s in good]).median,
            "gflops": spread([sum(w.flops for w in s.work) / s.seconds / 1e9 for s in good]).median,
            "flop_per_byte": good[0].work[0].flops / good[0].work[0].bytes,
            "read_gbps": spread([s.bandwidth for s in good]).median,
            "peak_gflops": spread([s.peak for s in good]).median,
            "rounds": len(all_),
            "rejected": sum(not peaks.steady(s) for s in all_),
        }
        if kept[name] is not ours:
            ratios = paired(ours, kept[name])
            figures[name]["ours_times_faster"] = dataclasses.asdict(spread(ratios)) if ratios else None
    return {"figures": figures}


def line(row: Mapping[str, Any]) -> str:
    """One row for the terminal."""
    parts = []
    for name, f in row["figures"].items():
        r = f["roofline"]
        text = f"{name} {r['median']:4.0%} ({r['low']:.0%}-{r['high']:.0%})"
        if "ours_times_faster" not in f:
            text += f" {f['us']:.0f} us, {f['gbps']:.1f}/{f['read_gbps']:.1f} GB/s"
            text += f", {f['gflops']:.0f}/{f['peak_gflops']:.0f} GFLOP/s"
        elif f["ours_times_faster"]:
            text += f" x{f['ours_times_faster']['median']:.2f}"
        if f["rejected"] == f["rounds"]:
            text += " DISTURBED"
        parts.append(text)
    rounds = max(f["rounds"] for f in row["figures"].values())
    rejected = "/".join(str(f["rejected"]) for f in row["figures"].values())
    return f"{row['tokens']:6} tokens: " + " | ".join(parts) + f" | {rounds} rounds, rejected {rejected}"


def cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each shape, mode, thread count and instruction set, by a title that says so, tokens ascending."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        shape = row["shape"]
        what = f"layer of {shape['num_experts']} experts, top-{shape['top_k']}" if row["mode"] == "layer" else "expert"
        title = f"{shape['name']} {shape['hidden_size']}x{shape['intermediate_size']}, {what}"
        found.setdefault(f"{title}, {row['threads']} threads, {row['isa']}", []).append(row)
    return found


def pivot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one table for each shape, mode and thread count; percent of roofline, contenders by tokens."""
    out = []
    for title, members in cases(rows).items():
        out.append(f"\n{title}\n")
        out.append("| % of roofline, tokens | " + " | ".join(str(m["tokens"]) for m in members) + " |")
        out.append("| --- " * (len(members) + 1) + "|")
        contenders = list(dict.fromkeys(name for m in members for name in m["figures"]))
        for contender in contenders:
            cells = [_cell(m["figures"].get(contender)) for m in members]
            out.append(f"| {contender} | " + " | ".join(cells) + " |")
        for contender in contenders[1:]:
            ratios = [(m["figures"].get(contender) or {}).get("ours_times_faster") for m in members]
            out.append(
                f"| times {contender} | " + " | ".join(f"{r['median']:.2f}" if r else "-" for r in ratios) + " |"
            )
    return "\n".join(out)


def best_peers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how many times as fast as the fastest peer ours is, and which that is; one line for each case."""
    counts = sorted({row["tokens"] for row in rows})
    out = ["| times the best peer, tokens | " + " | ".join(map(str, counts)) + " |"]
    out.append("| --- " * (len(counts) + 1) + "|")
    for title, members in cases(rows).items():
        cells = []
        for count in counts:
            peers = [(n, f) for m in members if m["tokens"] == count for n, f in m["figures"].items()]
            ratios = [
                (f["ours_times_faster"]["median"], name)
                for name, f in peers
                if f.get("ours_times_faster") and name not in NO_PEERS
            ]
            cells.append("{:.2f} {}".format(*min(ratios)) if ratios else "-")
        out.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    mark = "?" if figures["rejected"] == figures["rounds"] else ""
    return f"{100 * figures['roofline']['median']:.0f}{mark}"
