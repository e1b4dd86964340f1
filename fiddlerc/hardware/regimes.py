"""Memory that switches between two bandwidths every few seconds, as shared machines' does: telling them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..ir import Regime

LEAST_SHARE = 0.10
LEAST_RATIO = 1.15
LEAST_SEPARATION = 3.3
"""Distance of the two centres in standard deviations within them. Cutting one normal distribution in two gives 2.65."""


@dataclass(frozen=True)
class Regimes:
    """fast_gbps; slow_gbps and slow_share, both 0 where there is one regime."""

    fast_gbps: float
    slow_gbps: float = 0.0
    slow_share: float = 0.0

    def of(self, gbps: float) -> Regime:
        """Which regime a probe was in."""
        return "slow" if self.slow_share > 0 and gbps * gbps < self.fast_gbps * self.slow_gbps else "fast"


def same_regime(a_gbps: float, b_gbps: float) -> bool:
    """Whether two probes are nearer to each other than two regimes would be."""
    return max(a_gbps, b_gbps) < LEAST_RATIO * min(a_gbps, b_gbps)


def split_regimes(gbps: Sequence[float]) -> Regimes:
    """Two clusters of probes, if they are two: each a tenth of the time, apart by 15 % and by what they spread.

    The cut is the one that leaves least variance within the two sides (Otsu, 1979). With one regime the fastest probe
    is what the memory can do; with two, each one's median.
    """
    ordered = np.sort(np.asarray(gbps, np.float64))
    n = len(ordered)
    whole = Regimes(float(ordered[-1]))
    if n < 20:
        return whole
    below = np.arange(1, n)
    sums, squares = np.cumsum(ordered), np.cumsum(ordered**2)
    within = (
        squares[:-1] - sums[:-1] ** 2 / below + (squares[-1] - squares[:-1]) - (sums[-1] - sums[:-1]) ** 2 / (n - below)
    )
    cut = int(within.argmin()) + 1
    slow, fast = ordered[:cut], ordered[cut:]
    share = cut / n
    spread = float(np.sqrt(max(within[cut - 1], 0.0) / n))
    apart = fast.mean() - slow.mean() >= LEAST_SEPARATION * spread and np.median(fast) >= LEAST_RATIO * np.median(slow)
    if not apart or not LEAST_SHARE <= share <= 1 - LEAST_SHARE:
        return whole
    return Regimes(float(np.median(fast)), float(np.median(slow)), round(share, 3))
