"""Telling two bandwidths of a memory apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddlerc.hardware.regimes import Regimes, split_regimes

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.floats(0.25, 0.75), st.floats(1.25, 2.5), st.integers(200, 2000))
def test_two_regimes_are_found(seed: int, share: float, ratio: float, n: int) -> None:
    rng = np.random.default_rng(seed)
    slow = rng.random(n) < share
    # Within four deviations: one of five, once in some ten million, lies nearer to the other regime.
    gbps = np.where(slow, 30.0, 30.0 * ratio) * rng.normal(1.0, 0.02, n).clip(0.92, 1.08)
    found = split_regimes(gbps.tolist())
    assert found.slow_gbps == pytest.approx(30.0, rel=0.02)
    assert found.fast_gbps == pytest.approx(30.0 * ratio, rel=0.02)
    assert found.slow_share == pytest.approx(slow.mean(), abs=0.001)
    assert [found.of(value) == "slow" for value in gbps] == slow.tolist()


@given(seeds, st.floats(0.001, 0.3), st.integers(1, 2000))
def test_one_regime_is_not_cut_in_two(seed: int, spread: float, n: int) -> None:
    gbps = np.abs(40.0 * np.random.default_rng(seed).normal(1.0, spread, n)) + 0.1
    found = split_regimes(gbps.tolist())
    assert found == Regimes(float(gbps.max())) or (n < 300 and spread > 0.05), found
    if found.slow_share == 0:
        assert found.of(0.001) == "fast"


def test_a_few_slow_moments_are_no_regime() -> None:
    """Other load for a twentieth of the time; what is left is one bandwidth."""
    rng = np.random.default_rng(0)
    gbps = np.concatenate([rng.normal(50, 1, 950), rng.normal(25, 1, 50)])
    assert split_regimes(gbps.tolist()) == Regimes(float(gbps.max()))


def test_a_machine_that_switches() -> None:
    """Read with one thread on a shared Zen 4 machine: around 26 and around 34 GB/s, with some in between."""
    rng = np.random.default_rng(1)
    gbps = np.concatenate([rng.normal(26.3, 0.8, 400), rng.normal(33.5, 1.4, 500), rng.uniform(27, 32, 40)])
    found = split_regimes(gbps.tolist())
    assert found.slow_gbps == pytest.approx(26.3, rel=0.03)
    assert found.fast_gbps == pytest.approx(33.5, rel=0.03)
