"""Choosing among candidates by their error on sizes that they have not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .candidates import Candidate, Fitted
from .points import Floats, Work

MIN_SIZES = 4
"""Distinct sizes below which nothing can be held out."""
_ERROR_DIGITS = 4


@dataclass(frozen=True)
class Choice:
    """The best candidate, fitted to all points, and how each did on held-out sizes.

    median_error, max_error  relative errors of the chosen one over the held-out sizes
    errors                   mean relative error of every candidate
    """

    name: str
    fitted: Fitted
    median_error: float
    max_error: float
    errors: dict[str, float]


def choose(candidates: Sequence[Candidate], work: Work, us: Floats) -> Choice:
    """Cross-validates all candidates and takes the first (the simplest) that is not clearly worse than the best.

    Clearly worse: by more than one standard error of the difference, size by size (the one-standard-error rule). So
    noise does not buy steps and bends that the machine does not have.
    work and us hold the measured points, with at least MIN_SIZES distinct sizes.
    """
    held = {candidate.name: _heldout_errors(candidate, work, us) for candidate in candidates}
    means = {name: round(float(errors.mean()), _ERROR_DIGITS) for name, errors in held.items()}
    least = held[min(means, key=lambda name: means[name])]
    best = next(candidate for candidate in candidates if not _clearly_worse(held[candidate.name], least))
    errors = held[best.name]
    return Choice(
        name=best.name,
        fitted=best.fit(work, us),
        median_error=round(float(np.median(errors)), _ERROR_DIGITS),
        max_error=round(float(errors.max()), _ERROR_DIGITS),
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


def _heldout_errors(candidate: Candidate, work: Work, us: Floats) -> Floats:
    """Relative errors, one per point, each predicted by a fit that has not seen its size."""
    errors = np.zeros_like(us)
    for out in folds(work.size):
        predicted = candidate.fit(work[~out], us[~out]).predict(work[out])
        errors[out] = np.abs(predicted / us[out] - 1.0)
    return errors
