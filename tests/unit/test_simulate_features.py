"""What a plan switches on, where the answer is known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plan_samples import sample_model, sample_tables
from simulate_samples import sample_setting, steps_of

from fiddler_runtime.makespan import choose
from fiddlerc.ir import Scenario, Steps, Tables
from fiddlerc.simulate import features
from fiddlerc.simulate.ours import experts_us

SPEC = sample_model(intermediate_size=1024)
SCENARIOS: tuple[Scenario, ...] = ("decode", "prefill", "beam")


def everywhere(counts: Any) -> dict[Scenario, Steps]:
    return {scenario: steps_of(counts, scenario) for scenario in SCENARIOS}


def alternating(**changes: Any) -> Tables:
    """Nothing resident in the second layer, everything in the first; a short copy, a long time on the CPU."""
    grid = np.array([0, 1, 2, 4, 64], np.int32)
    tables = {
        "tokens": grid,
        "cpu_us": np.where(grid > 0, 100 + grid, 0).astype(np.float32)[None],
        "gpu_us": np.where(grid > 0, 5, 0).astype(np.float32),
        "rest_us": np.where(grid > 0, 600, 0).astype(np.float32),
        "scalars_us": np.array([1, 2, 80], np.float32),
        "resident": np.array([[1, 1, 1, 1], [0, 0, 0, 0]], np.uint8),
    }
    return sample_tables(**{**tables, **changes})


def always(successor: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    prefetch = np.full((2, 4, 2), -1, np.int16)
    prefetch[0, :, 0] = successor
    return prefetch


def test_nothing_is_gained_without_an_accelerator() -> None:
    assert all(f == type(f)(f.name, False, 0.0, 0.0, 0.0) for f in features(SPEC, alternating(), "none", {}, "decode"))


def test_one_miss_is_halved_where_a_copy_takes_as_long_as_the_cpu() -> None:
    split, prefetch = features(SPEC, alternating(), "cuda", everywhere([[[1, 1, 0, 0], [1, 0, 0, 0]]] * 8), "decode")
    # Layer 0: 2 + 10. Layer 1: 2 + 80 + 5 streamed whole; or x of it, where 1 + (1 + 0.1) (1 - x) 101 = 2 + 80 x + 5.
    whole, parted = 12 + 87, 12 + 2 + 80 * (105.1 / 191.1) + 5
    assert split.on and split.gain_decode == pytest.approx(1 - parted / whole, abs=0.03)
    assert not prefetch.on and prefetch.gain_decode == 0  # nobody knows what comes next


def test_prefetch_of_what_is_always_chosen_hides_the_copy() -> None:
    steps = everywhere([[[1, 1, 0, 0], [1, 0, 0, 0]]] * 8)
    _, prefetch = features(SPEC, alternating(prefetch=always(0)), "cuda", steps, "decode")
    assert prefetch.on and prefetch.gain_decode > 0.5


def test_prefetch_of_what_is_never_chosen_costs_nothing_when_the_link_is_idle() -> None:
    steps = everywhere([[[1, 1, 0, 0], [1, 0, 0, 0]]] * 8)
    _, prefetch = features(SPEC, alternating(prefetch=always(3)), "cuda", steps, "decode")
    assert not prefetch.on and prefetch.gain_decode == 0


def test_prefetch_that_comes_late_delays_what_waits_for_it() -> None:
    grid = np.array([0, 1, 2, 4, 64])
    no_attention = np.where(grid > 0, 1e-3, 0).astype(np.float32)
    tables = alternating(prefetch=always(0), rest_us=no_attention)
    steps = steps_of([[[1, 1, 0, 0], [1, 0, 0, 0]]])
    spec = sample_model()
    setting = sample_setting(features=("prefetch",), **{f: getattr(tables, f) for f in tables.__dataclass_fields__})
    (us,), (lent,) = experts_us(steps, setting)
    # The copy has layer 0's 12 us of its 80; the expert is computed when it is there: 2 + 5 + 68, after layer 0's.
    assert us == pytest.approx(12 + 75, rel=1e-3) and lent == 1
    assert spec.num_layers == 3


def test_contention_of_a_prefetch_slows_the_cpu_lane_once() -> None:
    tables = alternating(resident=np.array([[0, 0, 0, 0], [1, 1, 1, 1]], np.uint8), prefetch=always(0))
    fields = {f: getattr(tables, f) for f in tables.__dataclass_fields__}
    fields["scalars_us"] = np.array([1, 2, 500], np.float32)
    steps = steps_of([[[1, 1, 0, 0], [1, 0, 0, 0]]])
    (plain,), _ = experts_us(steps, sample_setting(**fields))
    (fetching,), _ = experts_us(steps, sample_setting(features=("prefetch",), **fields))
    # The whole lane (1 + 202 us) is beside the copy; the fetched expert, resident anyway, waits for what is left of it.
    late = 500 - (203 + 0.1 * 203 + 600 / 3)
    assert fetching - plain == pytest.approx(0.1 * 203 + late, rel=1e-3)


def test_the_gain_is_the_difference_of_whole_decisions() -> None:
    steps = everywhere([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [0, 2, 2, 0]]])
    tables = alternating()
    split, _ = features(SPEC, tables, "cuda", steps, "balanced")
    # There generated kernels compute, which know whole experts only.
    assert features(SPEC, tables, "simulated", steps, "balanced")[0] == type(split)("split", False, 0.0, 0.0, 0.0)
    totals = []
    for rows in (0, SPEC.intermediate_size):
        latencies = sample_setting(
            spec=SPEC,
            features=("split",) if rows else (),
            **{f: getattr(tables, f) for f in tables.__dataclass_fields__},
        ).latencies
        assert latencies.rows == rows
        spans = [
            choose(counts[at], tables.resident[at], latencies).makespan_us
            for counts in steps["decode"].counts
            for at in range(2)
        ]
        totals.append(sum(spans))
    assert split.gain_decode == pytest.approx(1 - totals[1] / totals[0], abs=1e-4)
    assert split.gain_decode == split.gain_prefill == split.gain_beam
    assert split.on == (split.gain_decode >= 0.02)
