"""Calibration + model -> latency curves on a grid of token counts: docs/calibration.md, Latency models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import packed_bytes

from ..ir import Calibration, CurveSummary, LatencyModel, ModelSpec, Regime, Sample
from . import roofline
from .candidates import copy_candidates, expert_candidates, transfer_candidates
from .heldout import MIN_SIZES, Choice, choose
from .points import Ceiling, Floats, copy_work, expert_work, join
from .rest import fit_rest

DENSE_TOKENS = 64
MAX_TOKENS = 16384
_PER_OCTAVE = 8

NEVER_US = 1e12
"""Streaming where there is nothing to stream to: eleven days, which no dispatch prefers, and finite in fp32."""

# Whatever the overheads subtracted from it, a call takes at least this part of its measured time.
_MIN_NET = 0.05
_US_DIGITS = 3

# Copies this many times smaller or larger say little about one: other caches serve them.
_NEAR = 8

ExpertQuantity = Literal["cpu_expert", "gpu_expert"]
CurveQuantity = Literal["cpu_expert", "gpu_expert", "host_to_device"]


@dataclass(frozen=True)
class _Curve:
    """A curve on its grid, and how it came about."""

    us: Floats
    summary: CurveSummary


def token_grid() -> npt.NDArray[np.int32]:
    """Token counts of the tables: every one up to DENSE_TOKENS, then eight per octave up to MAX_TOKENS."""
    octaves = np.log2(MAX_TOKENS / DENSE_TOKENS)
    steps = np.arange(1, int(octaves * _PER_OCTAVE) + 1)
    spaced = np.rint(DENSE_TOKENS * 2.0 ** (steps / _PER_OCTAVE))
    return np.concatenate([np.arange(DENSE_TOKENS + 1), spaced]).astype(np.int32)


def fit(calibration: Calibration, spec: ModelSpec) -> LatencyModel:
    """Latencies of `spec`'s expert on the calibrated machine, in microseconds, non-decreasing in tokens, 0 at none.

    A calibration with samples is regressed: on the spec's own shape where that was measured, else on other shapes in
    bytes and operations (CurveSummary.interpolated is False then). One without rests on the roofline of its limits.
    Raises FiddlerError if the samples are too few to hold any out.
    """
    if not calibration.samples:
        model = _from_limits(calibration, spec)
    else:
        model = _from_samples(calibration, spec)
    _verify(model)
    return model


def transfer_errors(
    calibration: Calibration, known: Sequence[tuple[int, int]], asked: Sequence[tuple[int, int]]
) -> dict[tuple[str, int, int], tuple[float, float]]:
    """How well samples of some expert shapes predict others: (quantity, H, I) -> (median, largest) relative error.

    calibration  has samples of all of them; the curves are fitted to those of `known` alone
    """
    errors = {}
    for quantity in get_args(ExpertQuantity):
        for hidden, intermediate in asked:
            measured = [s for s in calibration.samples if s.quantity == quantity and s.regime == "fast"]
            wanted = [s for s in measured if (s.hidden_size, s.intermediate_size) == (hidden, intermediate)]
            fitted = tuple(s for s in calibration.samples if (s.hidden_size, s.intermediate_size) in known)
            if not wanted:
                continue
            tokens = np.array([s.tokens for s in wanted], np.int32)
            only = replace(calibration, samples=fitted)
            predicted = _expert_curve(only, (hidden, intermediate), tokens, quantity, "fast").us
            entry = calibration.limits.cpu_entry_us if quantity == "cpu_expert" else 0.0
            ratios = np.abs(predicted / _net(wanted, entry) - 1.0)
            errors[quantity, hidden, intermediate] = (float(np.median(ratios)), float(ratios.max()))
    return errors


def _from_limits(calibration: Calibration, spec: ModelSpec) -> LatencyModel:
    limits, tokens = calibration.limits, token_grid()
    has_accelerator = calibration.machine.accelerator.kind != "none"
    shape = (spec.hidden_size, spec.intermediate_size)
    bandwidth = f"{roofline.BANDWIDTH_EFFICIENCY:g} x bandwidth"
    peak = f"{roofline.PEAK_EFFICIENCY:g} x peak"

    cpu = roofline.cpu_us(expert_work(*shape, tokens, roofline.cpu_ceiling(limits, True)))
    curves = [
        _Curve(cpu, _unmeasured("cpu_expert", f"max(bytes / ({bandwidth}), flops / ({peak}))")),
    ]
    stream = NEVER_US
    if has_accelerator:
        gpu = roofline.gpu_us(expert_work(*shape, tokens, roofline.gpu_ceiling(limits, True)))
        floor = f"max({roofline.GPU_LAUNCH_US:g} us, bytes / ({bandwidth}), flops / ({peak}))"
        curves.append(_Curve(gpu, _unmeasured("gpu_expert", floor)))
        nbytes = packed_bytes(*shape, spec.expert_bias)
        stream = float(copy_work([nbytes], roofline.copy_ceiling(limits, True)).read_us[0])
        curves.append(_Curve(np.array([stream]), _unmeasured("host_to_device", f"bytes / ({bandwidth})")))
    gamma = roofline.contention(limits) if has_accelerator else 0.0
    return _assemble(calibration, spec, tokens, cpu[None], np.ones(1), curves, stream, gamma)


def _from_samples(calibration: Calibration, spec: ModelSpec) -> LatencyModel:
    limits, tokens = calibration.limits, token_grid()
    shape = (spec.hidden_size, spec.intermediate_size)
    by_regime = {
        regime: _expert_curve(calibration, shape, tokens, "cpu_expert", regime)
        for regime in _regimes(calibration, shape)
    }
    fast = by_regime["fast"].us
    cpu_us = np.stack([fast, *(np.maximum(fast, curve.us) for regime, curve in by_regime.items() if regime == "slow")])
    slow = limits.cpu_slow_share if len(by_regime) > 1 else 0.0
    shares = np.array([1.0 - slow, slow]) if slow else np.ones(1)
    prevailing: Regime = "slow" if slow > 0.5 else "fast"
    curves = [by_regime[prevailing]]
    stream, gamma = NEVER_US, 0.0
    if calibration.machine.accelerator.kind != "none":
        # A simulated accelerator's also depends on the host's memory.
        curves.append(_expert_curve(calibration, shape, tokens, "gpu_expert", prevailing))
        copy = _copy_curve(calibration, packed_bytes(*shape, spec.expert_bias))
        curves.append(copy)
        stream, gamma = float(copy.us[0]), _contention(calibration, spec)
    return _assemble(calibration, spec, tokens, cpu_us, shares, curves, stream, gamma)


def _regimes(calibration: Calibration, shape: tuple[int, int]) -> tuple[Regime, ...]:
    """One on a machine with one, and for a shape that was measured and never in the slow one: it lies in a cache."""
    own = {
        s.regime
        for s in calibration.samples
        if s.quantity == "cpu_expert" and (s.hidden_size, s.intermediate_size) == shape
    }
    return ("fast", "slow") if calibration.limits.cpu_slow_share > 0 and own != {"fast"} else ("fast",)


def _assemble(
    calibration: Calibration,
    spec: ModelSpec,
    tokens: npt.NDArray[np.int32],
    cpu_us: Floats,
    regime_shares: Floats,
    curves: Sequence[_Curve],
    stream_us: float,
    gamma: float,
) -> LatencyModel:
    by_quantity = {curve.summary.quantity: curve for curve in curves}
    gpu = by_quantity.get("gpu_expert")
    rest = fit_rest(calibration, spec, tokens)
    return LatencyModel(
        tokens=tokens,
        cpu_us=np.stack([_table(tokens, regime) for regime in cpu_us]),
        regime_shares=np.round(regime_shares, 4),
        gpu_us=np.zeros(len(tokens)) if gpu is None else _table(tokens, gpu.us),
        rest_us=_table(tokens, rest.us),
        rest_kv_us=float(f"{rest.kv_us:.6g}"),
        cpu_overhead_us=round(calibration.limits.cpu_entry_us, _US_DIGITS),
        gpu_overhead_us=round(calibration.limits.gpu_entry_us, _US_DIGITS),
        stream_us=round(stream_us, _US_DIGITS),
        contention=round(gamma, 4),
        curves=(*(curve.summary for curve in curves), rest.summary),
    )


def _table(tokens: npt.NDArray[np.int32], us: Floats) -> Floats:
    """Rounded (the last bits differ between machines), positive, non-decreasing, and 0 for no tokens."""
    smallest = 10.0**-_US_DIGITS
    rounded = np.maximum.accumulate(np.maximum(np.round(us, _US_DIGITS), smallest))
    return np.where(tokens > 0, rounded, 0.0)


def _expert_curve(
    calibration: Calibration,
    shape: tuple[int, int],
    tokens: npt.NDArray[np.int32],
    quantity: ExpertQuantity,
    regime: Regime,
) -> _Curve:
    """c(n) or g(n): from samples of that very shape if there are enough, else from those of all shapes.

    A regime of which too little was seen is predicted by the other's samples, with its own bandwidth.
    """
    every = [s for s in calibration.samples if s.quantity == quantity and s.tokens > 0]
    samples = [s for s in every if s.regime == regime]
    seen = _distinct(s.tokens for s in samples) >= MIN_SIZES
    samples = samples if seen else every
    own = [s for s in samples if (s.hidden_size, s.intermediate_size) == shape]
    interpolated = seen and _distinct(s.tokens for s in own) >= MIN_SIZES
    used = own if interpolated else samples
    shapes = sorted({(s.hidden_size, s.intermediate_size) for s in used})
    _require(calibration, quantity, _distinct(s.tokens for s in used), "token counts")

    def ceiling(of: Regime) -> Ceiling:
        limits = calibration.limits
        return (
            roofline.gpu_ceiling(limits, False) if quantity == "gpu_expert" else roofline.cpu_ceiling(limits, False, of)
        )

    # A CPU sample is a whole call of the lane; an accelerator's is timed inside its queue.
    entry = calibration.limits.cpu_entry_us if quantity == "cpu_expert" else 0.0
    work = join([expert_work(s.hidden_size, s.intermediate_size, [s.tokens], ceiling(s.regime)) for s in used])
    groups = np.array([shapes.index((s.hidden_size, s.intermediate_size)) for s in used])
    chosen = choose(
        expert_candidates() if interpolated else transfer_candidates(len(shapes)),
        work,
        _net(used, entry),
        # What another shape will take is asked of shapes that the fit has not seen.
        None if interpolated or len(shapes) < 2 else groups,
    )
    grid = expert_work(*shape, tokens, ceiling(regime))
    return _Curve(chosen.fitted.predict(grid), _summary(quantity, chosen, len(used), interpolated))


def _summary(quantity: CurveQuantity, chosen: Choice, samples: int, interpolated: bool) -> CurveSummary:
    return CurveSummary(
        quantity=quantity,
        model=chosen.name,
        formula=chosen.fitted.formula,
        heldout_median_error=chosen.median_error,
        heldout_max_error=chosen.max_error,
        interval_low=chosen.interval[0],
        interval_high=chosen.interval[1],
        samples=samples,
        interpolated=interpolated,
        candidates=chosen.errors,
    )


def _copy_curve(calibration: Calibration, nbytes: int) -> _Curve:
    """w: copying one packed expert, as a curve of one point."""
    samples = [s for s in calibration.samples if s.quantity == "host_to_device"]
    near = [s for s in samples if nbytes / _NEAR <= s.bytes <= nbytes * _NEAR]
    if _distinct(s.bytes for s in near) >= MIN_SIZES:
        samples = near
    sizes = [s.bytes for s in samples]
    _require(calibration, "host_to_device", _distinct(sizes), "copy sizes")
    ceiling = roofline.copy_ceiling(calibration.limits, False)
    chosen = choose(copy_candidates(), copy_work(sizes, ceiling), _net(samples, 0.0))
    at = np.maximum(chosen.fitted.predict(copy_work([nbytes], ceiling)), 10.0**-_US_DIGITS)
    inside = min(sizes) <= nbytes <= max(sizes)
    return _Curve(at, _summary("host_to_device", chosen, len(samples), inside))


def _contention(calibration: Calibration, spec: ModelSpec) -> float:
    """gamma: median relative slow-down of a CPU expert while copies run, of the spec's shape if that was measured."""
    alone = {
        (s.hidden_size, s.intermediate_size, s.tokens, s.regime): s.median_us
        for s in calibration.samples
        if s.quantity == "cpu_expert"
    }
    pairs = [
        (s, alone[key])
        for s in calibration.samples
        if s.quantity == "cpu_expert_while_copying"
        and (key := (s.hidden_size, s.intermediate_size, s.tokens, s.regime)) in alone
    ]
    shape = (spec.hidden_size, spec.intermediate_size)
    own = [pair for pair in pairs if (pair[0].hidden_size, pair[0].intermediate_size) == shape]
    ratios = [sample.median_us / us for sample, us in own or pairs]
    return max(0.0, float(np.median(ratios)) - 1.0) if ratios else 0.0


def _net(samples: Sequence[Sample], entry_us: float) -> Floats:
    """Times without the lane's entry cost, which dispatch adds once per layer."""
    medians = np.array([s.median_us for s in samples])
    return np.maximum(medians - entry_us, _MIN_NET * medians)


def _distinct(values: Iterable[object]) -> int:
    return len(set(values))


def _require(calibration: Calibration, quantity: str, sizes: int, what: str) -> None:
    if sizes < MIN_SIZES:
        raise FiddlerError(
            f"hardware file {calibration.name!r} has too few {quantity} samples for a latency model",
            found=f"{sizes} different {what}",
            expected=f"at least {MIN_SIZES}",
            hint="fiddlerc calibrate -o hw.json",
        )


def _unmeasured(quantity: CurveQuantity, formula: str) -> CurveSummary:
    return CurveSummary(quantity, "roofline of the limits", formula, 0.0, 0.0, 1.0, 1.0, 0, False, {})


def _verify(model: LatencyModel) -> None:
    """What every later stage relies on; a violation is a defect here, not a user's mistake."""
    assert model.tokens[0] == 0 and (np.diff(model.tokens) > 0).all()
    for table in (*model.cpu_us, model.gpu_us, model.rest_us):
        assert np.isfinite(table).all() and table[0] == 0 and (np.diff(table) >= 0).all()
    assert (model.cpu_us[:, 1:] > 0).all() and (model.cpu_us[-1] >= model.cpu_us[0]).all()
    assert model.stream_us > 0 and model.rest_kv_us >= 0 and model.contention >= 0
