"""What a step of a model takes without its routed experts: measured through the runtime.

A prompt's time has what `generate` does before its first step in it: that is what a user waits for.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fiddler_runtime import drift
from fiddler_runtime.plan import Plan
from fiddler_runtime.progress import Progress

from ..ir import StepSample
from .compare import timed

DECODED = 24
"""New tokens of a generation whose steps are timed one by one."""

_DECODE_CONTEXTS = (16, 128, 512, 1536)
_BEAMS, _BEAM_CONTEXT = 4, 64
_PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_SECONDS = 3.0  # a point that took longer is not timed again; prompts larger than one that took it at once are left out
_ROUNDS = 10


def measure_rest(plan: Plan, model_dir: Path, *, progress: Progress | None = None) -> tuple[StepSample, ...]:
    """Steps of the model as `generate` takes them, on the plan's device, every layer through the engine."""
    from fiddler_runtime import hf

    model = hf.load(model_dir, on_both_sides(plan))
    try:
        with drift.unheeded():
            return measure_rest_of(model, plan, progress=progress)
    finally:
        model.fiddler.close()


def on_both_sides(plan: Plan) -> Plan:
    """With experts on both sides, as in use: a step waits for its accelerator longer where that has all the work."""
    resident = plan.tables.resident.copy()
    resident[:, ::2] = 0
    return dataclasses.replace(plan, tables=dataclasses.replace(plan.tables, resident=resident))


def measure_rest_of(model: Any, plan: Plan, *, progress: Progress | None = None) -> tuple[StepSample, ...]:
    """The same of a model that is loaded, as hf.load makes them, best through such a plan.

    Decode steps at several lengths of the cache, with one sequence and with beams; prompts of several lengths. Experts
    run as ever, since threads that wake up and caches that were used cost the rest of the step something too, and each
    layer's longest lane is subtracted. On a GPU, which works on while the lane's time is over, they are left out.
    """
    import torch

    if model.fiddler.describe()["device"] == "cuda":
        _leave_out_experts(model)
    limit = min(model.config.max_position_embeddings, plan.header.options.context)
    points = list(_points(limit))
    times: dict[tuple[int, int, int], list[float]] = {}
    # In turns, so that a slow moment of the machine is no point's own.
    for turn in range(_ROUNDS):
        if progress is not None:
            progress("calibrating: the rest of a step", turn, _ROUNDS)
        for point in points:
            # Any tokens do: without experts nothing depends on what they say.
            tokens, beams, new = point
            ids = torch.arange(tokens, device=model.device).remainder(model.config.vocab_size)[None]
            if turn == 0:
                timed(model, ids, new, beams)  # buffers, caches and torch's own choices
            if sum(times.setdefault(point, [])) < _SECONDS:
                times[point] += _step_times(model, ids, beams, new)
            if new == 1 and times[point][0] > _SECONDS:
                points = points[: points.index(point) + 1]
                break
    samples = [_sample(plan, *point, times[point]) for point in points]
    if progress is not None:
        progress("calibrating: the rest of a step", _ROUNDS, _ROUNDS)
    return tuple(samples)


def _points(limit: int) -> Iterator[tuple[int, int, int]]:
    """(prompt tokens, beams, new tokens): decode steps, then prompts, the shortest first."""
    for context in _DECODE_CONTEXTS:
        if context + DECODED <= limit:
            yield context, 1, DECODED
    if limit >= _BEAM_CONTEXT + DECODED:
        yield _BEAM_CONTEXT, _BEAMS, DECODED
    for tokens in _PROMPTS:
        if tokens < limit:
            yield tokens, 1, 1


def _step_times(model: Any, ids: Any, beams: int, new: int) -> list[float]:
    """Seconds of each step of one generation, after the prompt's if there are any, less the lanes'."""
    model.fiddler.reset_counters()
    clock = timed(model, ids, new, beams)
    phase = model.fiddler.counters()["phases"]["prefill" if new == 1 else "decode"]
    experts = phase["makespan"]["actual_us"] / 1e6 / max(1, new - 1)
    if new == 1:
        return [clock.stamps[0] - clock.start - experts]
    return [after - before - experts for before, after in zip(clock.stamps[1:], clock.stamps[2:], strict=False)]


def _sample(plan: Plan, prompt: int, beams: int, new: int, seconds: list[float]) -> StepSample:
    spec = plan.header.model
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    decoding = new > 1
    return StepSample(
        model=spec.name,
        model_fingerprint=spec.fingerprint,
        num_layers=spec.num_layers,
        non_expert_bytes=spec.non_expert_bytes,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        tokens=beams if decoding else prompt,
        sequences=beams if decoding else 1,
        context=prompt + new // 2 if decoding else 0,
        median_us=round(median * 1e6, 3),
        spread_us=round((high - low) * 1e6, 3),
        repeats=len(seconds),
    )


def _leave_out_experts(model: Any) -> None:
    import torch

    engine = model.fiddler
    moe = engine.moe

    def nobody(layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
        return moe(layer, hidden, torch.full_like(ids, -1), weights)

    engine.moe = nobody
