"""The candidate models of a curve, and their regressions (the only use of scikit-learn in the project).

Every candidate minimises relative errors: a microsecond matters at one token and not at a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .points import Floats, Work

Predict = Callable[[Work], Floats]
_DIGITS = 6  # significant digits of a coefficient: fewer than what differs between BLAS libraries


@dataclass(frozen=True)
class Fitted:
    """A fitted candidate: microseconds for any work, and the same in words."""

    predict: Predict
    formula: str


@dataclass(frozen=True)
class Candidate:
    """A model that can be fitted to measured times. transfers: it also speaks of shapes that were not measured."""

    name: str
    fit: Callable[[Work, Floats], Fitted]
    transfers: bool


@dataclass(frozen=True)
class Feature:
    """A column of a linear model: what it is called in a formula, and its value in microseconds or as a number."""

    label: str
    column: Callable[[Work], Floats]


def _after(knot: int) -> Feature:
    return Feature(f"max(0, n - {knot})", lambda work: np.maximum(0.0, work.size - knot))


def _passes(tile: int) -> Feature:
    # A kernel with a register tile of that many tokens goes over an expert's weights once per tile; after the first
    # time they come from a cache, so the coefficient is the cache's time relative to the memory's.
    return Feature(f"ceil(n / {tile}) x bytes/bandwidth", lambda work: np.ceil(work.size / tile) * work.read_us)


def _bent(ratio: float) -> Feature:
    label = f"max(bytes/bandwidth, {ratio:.4g} x flops/peak)"
    return Feature(label, lambda work: np.maximum(work.read_us, ratio * work.compute_us))


ONE = Feature("", lambda work: np.ones_like(work.size))
SIZE = Feature("n", lambda work: work.size)
READ = Feature("bytes/bandwidth", lambda work: work.read_us)
COMPUTE = Feature("flops/peak", lambda work: work.compute_us)
ROOFLINE = Feature("max(bytes/bandwidth, flops/peak)", lambda work: work.roofline_us)
# Steps of so many tokens, as register tiles make them; regression picks the ones that show.
TILES = tuple(_passes(tile) for tile in (4, 6, 8))
KNOTS = tuple(_after(knot) for knot in (2, 4, 8, 16, 32, 64, 128, 256))


def linear(name: str, features: Sequence[Feature], *, transfers: bool = False) -> Candidate:
    """A sum of features with non-negative coefficients; monotone in n, as every feature is."""
    return Candidate(name, lambda work, us: _fit_linear(features, work, us), transfers)


def bent_roofline(constant: Sequence[Feature]) -> Candidate:
    """A roofline that reaches other shares of the bandwidth and of the peak, so that it bends at another size.

    max(a x bytes/bandwidth, b x flops/peak) is linear in its scale once b/a is given. That ratio is searched between
    1/4 and 16 (weights that stay in a cache are read faster than the memory's limit), halving the step from half an
    octave to 1/64.
    """

    def fit(work: Work, us: Floats) -> Fitted:
        tried: dict[float, Fitted] = {}

        def loss(octave: float) -> float:
            if octave not in tried:
                tried[octave] = _fit_linear([*constant, _bent(2.0**octave)], work, us)
            return round(float(np.sum((tried[octave].predict(work) / us - 1.0) ** 2)), 12)

        best = min(np.arange(-2.0, 4.5, 0.5).tolist(), key=loss)
        for step in 2.0 ** np.arange(-2.0, -7.0, -1.0):
            best = min((best, best - step, best + step), key=loss)
        return tried[best]

    return Candidate("bent roofline", fit, True)


def expert_candidates() -> tuple[Candidate, ...]:
    """Models of an expert's time over tokens, the simplest first."""
    return (
        linear("constant", [ONE]),  # Fiddler's model of the GPU
        linear("linear", [ONE, SIZE]),  # Fiddler's model of the CPU
        linear("roofline", [ONE, ROOFLINE], transfers=True),
        bent_roofline([ONE]),
        linear("roofline sum", [ONE, READ, COMPUTE, ROOFLINE], transfers=True),
        linear("roofline sum with token tiles", [ONE, READ, COMPUTE, ROOFLINE, *TILES], transfers=True),
        linear("piecewise linear", [ONE, SIZE, *KNOTS]),
        isotonic(),
    )


def transfer_candidates(shapes: int) -> tuple[Candidate, ...]:
    """Models for a shape that was not measured, from samples of that many other shapes.

    With one shape a constant cannot be told from a part that grows with the expert's bytes; leaving it out makes all
    of the time scale with the work.
    """
    constant = [ONE] if shapes > 1 else []
    return (
        linear("roofline", [*constant, ROOFLINE], transfers=True),
        bent_roofline(constant),
        linear("roofline sum", [*constant, READ, COMPUTE, ROOFLINE], transfers=True),
        linear("roofline sum with token tiles", [*constant, READ, COMPUTE, ROOFLINE, *TILES], transfers=True),
    )


def copy_candidates() -> tuple[Candidate, ...]:
    """Models of a copy's time over bytes.

    First the curve through the measured sizes: caches make a copy's rate depend on its size by no simple law.
    """
    return (
        isotonic(),
        linear("bandwidth", [READ], transfers=True),
        linear("bandwidth and a fixed cost", [ONE, READ], transfers=True),
    )


def isotonic() -> Candidate:
    """A non-decreasing curve through the measured sizes, linear in log-log between them.

    Below the first size it is flat; above the last it goes on along the line through the last three sizes.
    """
    return Candidate("isotonic", _fit_isotonic, False)


def _fit_linear(features: Sequence[Feature], work: Work, us: Floats) -> Fitted:
    from sklearn.linear_model import LinearRegression  # slow to import

    columns = np.stack([feature.column(work) for feature in features], axis=1)
    # Dividing each row by its measured time turns absolute errors into relative ones. Scaling the columns keeps the
    # solver's stopping rule meaningful for features that differ by orders of magnitude.
    relative = columns / us[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    model = LinearRegression(fit_intercept=False, positive=True).fit(relative / scale, np.ones_like(us))
    coefficients = [float(f"{value:.{_DIGITS}g}") for value in model.coef_ / scale]
    used = [(value, feature) for value, feature in zip(coefficients, features, strict=True) if value > 0]

    def predict(at: Work) -> Floats:
        total = np.zeros_like(at.size)
        for value, feature in used:
            total += value * feature.column(at)
        return total

    terms = [f"{value:.4g} us" if not feature.label else f"{value:.4g} x {feature.label}" for value, feature in used]
    return Fitted(predict, " + ".join(terms) or "0")


def _fit_isotonic(work: Work, us: Floats) -> Fitted:
    from sklearn.isotonic import IsotonicRegression  # slow to import

    sizes, logs = np.log(work.size), np.log(us)
    model = IsotonicRegression(increasing=True, out_of_bounds="clip").fit(sizes, logs)
    knots = np.unique(work.size)
    levels = np.exp(model.predict(np.log(knots)))
    tail = min(3, len(knots))
    slope = max(0.0, float(np.polyfit(knots[-tail:], levels[-tail:], 1)[0])) if tail > 1 else 0.0
    last, top = float(knots[-1]), float(levels[-1])

    def predict(at: Work) -> Floats:
        inside = np.exp(model.predict(np.log(np.maximum(at.size, 1.0))))
        return np.where(at.size > last, top + slope * (at.size - last), inside)

    return Fitted(predict, f"monotone through {len(knots)} measured sizes, then {slope:.4g} us each")
