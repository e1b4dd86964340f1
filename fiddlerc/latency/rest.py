"""The rest of a step: all of it but the routed experts, for a whole model (docs/calibration.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..ir import Calibration, CurveSummary, ModelSpec, StepSample
from . import roofline
from .candidates import COMPUTE, READ, SIZE, isotonic, linear
from .heldout import MIN_SIZES, choose
from .points import Ceiling, Floats, Work, join


@dataclass(frozen=True)
class Rest:
    """us float64 [n]: steps of the grid's token counts with nothing in the cache; kv_us: what a cached token adds."""

    us: Floats
    kv_us: float
    summary: CurveSummary


def fit_rest(calibration: Calibration, spec: ModelSpec, tokens: npt.NDArray[np.int32]) -> Rest:
    """From steps of this model; else from other models' in layers, bytes and operations; else from the limits."""
    own = [step for step in calibration.steps if step.model_fingerprint == spec.fingerprint]
    if len({step.tokens for step in own}) >= MIN_SIZES:
        return _measured(own, tokens)
    if len({step.tokens for step in calibration.steps}) >= MIN_SIZES:
        return _transferred(calibration.steps, spec, tokens, _ceiling(calibration))
    return _from_limits(calibration, spec, tokens)


def _measured(steps: Sequence[StepSample], tokens: npt.NDArray[np.int32]) -> Rest:
    kv_us = _kv_us(steps) or 0.0
    us = _without_cache(steps, kv_us)
    work = Work(np.array([float(step.tokens) for step in steps]), np.ones(len(steps)), np.ones(len(steps)))
    # Not a line: from one token to beams to a prompt `generate` does more for the first few tokens than for later ones.
    chosen = choose([isotonic()], work, us)
    grid = Work(tokens.astype(np.float64), np.ones(len(tokens)), np.ones(len(tokens)))
    formula = f"{chosen.fitted.formula} + {kv_us:.4g} us x cached tokens"
    summary = CurveSummary(
        "rest_of_step", chosen.name, formula, chosen.median_error, chosen.max_error, *chosen.interval, len(steps), True,
        chosen.errors,
    )  # fmt: skip
    return Rest(chosen.fitted.predict(grid), kv_us, summary)


def _transferred(steps: Sequence[StepSample], spec: ModelSpec, tokens: npt.NDArray[np.int32], ceiling: Ceiling) -> Rest:
    """Time by layers (launches and Python), bytes and operations; the cache by its bytes."""
    models: dict[str, list[StepSample]] = {}
    for step in steps:
        models.setdefault(step.model_fingerprint, []).append(step)
    slopes = [(_kv_us(own), max(1, own[0].kv_bytes_per_token)) for own in models.values()]
    kv_us_per_byte = float(np.median([us / nbytes for us, nbytes in slopes if us is not None] or [0.0]))

    def work(layers: int, nbytes: int, counts: npt.ArrayLike) -> Work:
        count = np.asarray(counts, np.float64)
        # A weight is two bytes, and two operations for every token.
        return Work(
            np.full_like(count, layers),
            np.full_like(count, nbytes / ceiling.bytes_per_us),
            nbytes * count / ceiling.flops_per_us,
        )

    measured = join([work(step.num_layers, step.non_expert_bytes, [step.tokens]) for step in steps])
    sizes = np.array([step.tokens for step in steps])
    candidate = linear("layers, bytes and operations", [SIZE, READ, COMPUTE], transfers=True)
    kv_us = np.array([kv_us_per_byte * step.kv_bytes_per_token for step in steps])
    chosen = choose([candidate], measured, _without_cache(steps, kv_us), groups=sizes)
    formula = chosen.fitted.formula.replace("x n", "x layers")
    summary = CurveSummary(
        "rest_of_step", chosen.name, formula, chosen.median_error, chosen.max_error, *chosen.interval, len(steps),
        False, chosen.errors,
    )  # fmt: skip
    us = chosen.fitted.predict(work(spec.num_layers, spec.non_expert_bytes, tokens))
    return Rest(us, kv_us_per_byte * spec.kv_bytes_per_token, summary)


def _from_limits(calibration: Calibration, spec: ModelSpec, tokens: npt.NDArray[np.int32]) -> Rest:
    on_gpu = calibration.machine.accelerator.kind == "cuda"
    ceiling = _ceiling(calibration, efficiency=True)
    read = spec.non_expert_bytes / ceiling.bytes_per_us
    compute = spec.non_expert_bytes * tokens.astype(np.float64) / ceiling.flops_per_us
    computing = np.maximum(read, compute)
    if on_gpu:
        measured = [sample.median_us for sample in calibration.samples if sample.quantity == "launch"]
        launch_us = measured[0] if measured else roofline.GPU_OPERATION_US
        launches = roofline.GPU_LAYER_OPERATIONS * launch_us * spec.num_layers
        us, formula = np.maximum(launches, computing), f"max({launches:g} us, bytes / bandwidth, operations / peak)"
    else:
        launches = roofline.CPU_LAYER_US * spec.num_layers
        us, formula = launches + computing, f"{launches:g} us + max(bytes / bandwidth, operations / peak)"
    formula += ", as much of either as an expert reaches"
    summary = CurveSummary("rest_of_step", "roofline of the limits", formula, 0.0, 0.0, 1.0, 1.0, 0, False, {})
    return Rest(us, spec.kv_bytes_per_token / ceiling.bytes_per_us, summary)


def _ceiling(calibration: Calibration, *, efficiency: bool = False) -> Ceiling:
    """Of the device that runs the rest: the GPU, or without one the CPU."""
    on_gpu = calibration.machine.accelerator.kind == "cuda"
    of = roofline.gpu_ceiling if on_gpu else roofline.cpu_ceiling
    return of(calibration.limits, efficiency)


def _kv_us(steps: Sequence[StepSample]) -> float | None:
    """The slope of one model's one-token steps over the length of their cache, least squares, at least 0. None for one
    length."""
    lengths = np.array([float(step.context) for step in steps if step.tokens == 1])
    times = np.array([step.median_us for step in steps if step.tokens == 1])
    if len(set(lengths.tolist())) < 2:
        return None
    return max(0.0, float(np.polyfit(lengths, times, 1)[0]))


def _without_cache(steps: Sequence[StepSample], kv_us: float | Floats) -> Floats:
    """The steps' times less what their caches add, kv_us a token; at least half of each is left."""
    times = np.array([step.median_us for step in steps])
    cached = np.array([step.sequences * step.context for step in steps])
    return np.maximum(times - kv_us * cached, 0.5 * times)
