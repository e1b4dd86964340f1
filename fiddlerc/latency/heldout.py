"""Choosing among candidates by their error on sizes that they have not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .candidates import Candidate, Fitted
from .points import Floats, Work

MIN_SIZES = 4
"""Distinct sizes below which nothing can be held out."""
_ERROR_DIGITS = 4
_INTERVAL_DIGITS = 4
_TAIL = 0.05


@dataclass(frozen=True)
class Choice:
    """The best candidate, fitted to all points, and how each did on held-out sizes.

    median_error, max_error  relative errors of the chosen one over the held-out points
    interval                 factors on its predictions between which 90 % of held-out times lie
    errors                   mean relative error of every candidate
    """

    name: str
    fitted: Fitted
    median_error: float
    max_error: float
    interval: tuple[float, float]
    errors: dict[str, float]


def choose(
    candidates: Sequence[Candidate], work: Work, us: Floats, groups: npt.NDArray[np.integer] | None = None
) -> Choice:
    """Cross-validates all candidates and takes the first (the simplest) that is not clearly worse than the best.

    Clearly worse: by more than one standard error of the difference, size by size (the one-standard-error rule). So
    noise does not buy steps and bends that the machine does not have.
    work and us hold the measured points, with at least MIN_SIZES distinct sizes. groups [points]: points of one group
    are held out together (a shape, where the question is how well other shapes predict it); without it sizes are.
    """
    masks = list(folds(work.size)) if groups is None else [groups == group for group in np.unique(groups)]
    ratios = {candidate.name: _heldout_ratios(candidate, work, us, masks) for candidate in candidates}
    held = {name: np.abs(1.0 / ratio - 1.0) for name, ratio in ratios.items()}
    means = {name: round(float(errors.mean()), _ERROR_DIGITS) for name, errors in held.items()}
    least = held[min(means, key=lambda name: means[name])]
    best = next(candidate for candidate in candidates if not _clearly_worse(held[candidate.name], least))
    errors = held[best.name]
    return Choice(
        name=best.name,
        fitted=best.fit(work, us),
        median_error=round(float(np.median(errors)), _ERROR_DIGITS),
        max_error=round(float(errors.max()), _ERROR_DIGITS),
        interval=_interval(ratios[best.name]),
        errors=means,
    )


def _clearly_worse(errors: Floats, least: Floats) -> bool:
    differences = errors - least
    standard_error = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return bool(round(float(differences.mean()) - standard_error, _ERROR_DIGITS) > 0)


def folds(sizes: Floats) -> Iterator[npt.NDArray[np.bool_]]:
    """Masks of the points to hold out: each size on its own (an interpolation), then the two largest together.

    The last fold asks for what a table needs beyond the largest measured size. The smallest size is held out as well:
    a candidate then has to say what one token costs without having seen it.
    """
    distinct = np.unique(sizes)
    for size in distinct[:-2]:
        yield sizes == size
    yield sizes >= distinct[-2]


def _heldout_ratios(candidate: Candidate, work: Work, us: Floats, masks: Sequence[npt.NDArray[np.bool_]]) -> Floats:
    """Measured over predicted, one per point, each predicted by a fit that has not seen its fold."""
    ratios = np.ones_like(us)
    for out in masks:
        predicted = candidate.fit(work[~out], us[~out]).predict(work[out])
        ratios[out] = us[out] / np.maximum(predicted, 1e-9 * us[out])
    return ratios


def _interval(ratios: Floats) -> tuple[float, float]:
    """Split-conformal: of n held-out ratios, the ones of rank floor(0.05 (n + 1)) and ceil(0.95 (n + 1)).

    With fewer than 19 points that is the smallest and the largest. (Lei et al., JASA 2018, section 2.)
    """
    n = len(ratios)
    ordered = np.sort(ratios)
    low = max(1, math.floor(_TAIL * (n + 1))) - 1
    high = min(n, math.ceil((1 - _TAIL) * (n + 1))) - 1
    return float(f"{ordered[low]:.{_INTERVAL_DIGITS}g}"), float(f"{ordered[high]:.{_INTERVAL_DIGITS}g}")
