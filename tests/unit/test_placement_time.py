"""Placement by expected time: against brute force, an exact solver, and text that it has not seen."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import sample_model
from scipy.optimize import Bounds, LinearConstraint, milp

from fiddler_runtime.makespan import Latencies, choose
from fiddlerc import frontend, trace
from fiddlerc.ir import SCENARIOS, MemoryBudget, ModelSpec, Objective, Options, Scenario, Steps
from fiddlerc.placement import place
from fiddlerc.placement.choice import allocate, by_popularity, by_time
from fiddlerc.placement.cost import make_cost

EXAMPLES = Path(__file__).parents[2] / "examples"
OBJECTIVES: tuple[Objective, ...] = ("decode", "prefill", "beam", "balanced")


def latencies(rng: np.random.Generator) -> Latencies:
    tokens = np.arange(600)
    cpu = np.maximum(rng.uniform(100, 1000), tokens * rng.uniform(5, 50))
    gpu = np.maximum(rng.uniform(10, 100), tokens * rng.uniform(0.1, 5))
    zero = tokens > 0
    return Latencies(
        (cpu * zero).astype(np.float32),
        (gpu * zero).astype(np.float32),
        10,
        30,
        rng.uniform(100, 5000),
        rng.uniform(0, 0.5),
    )


def random_steps(rng: np.random.Generator, layers: int, experts: int) -> dict[Scenario, Steps]:
    """Skewed choices, a few steps of each scenario."""
    steps = {}
    for scenario, size, number in (("decode", 1, 24), ("prefill", 60, 4), ("beam", 4, 8)):
        counts = np.zeros((number, layers, experts), np.int32)
        for step, layer in np.ndindex(number, layers):
            shares = rng.dirichlet(np.full(experts, 0.7))
            noisy = np.log(shares) + rng.gumbel(size=(size, experts))
            counts[step, layer] = np.bincount(np.argsort(-noisy, axis=1)[:, :2].ravel(), minlength=experts)
        steps[scenario] = Steps(
            scenario, counts, np.full(number, size, np.int32), np.zeros(number, np.int32),
            np.arange(number) >= number * 3 // 4,
        )  # fmt: skip
    return steps  # type: ignore[return-value]


def exact(costs: np.ndarray, sets: np.ndarray, count: int) -> float:  # type: ignore[type-arg]
    """HiGHS: one set per layer, `count` residents in all, least total of costs [layers, sets]."""
    layers, number = costs.shape
    one_each = np.kron(np.eye(layers), np.ones(number))
    size = np.tile(sets.sum(axis=1), layers)[None]
    solved = milp(
        costs.ravel(),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, count, count)],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
    )
    assert solved.success
    return float(solved.fun)


@pytest.mark.parametrize("exhaustive", [8, 0], ids=["all sets", "orders and exchanges"])
def test_close_to_the_exact_solver(exhaustive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the search for layers too large to try every set, on layers small enough to."""
    monkeypatch.setattr("fiddlerc.placement.choice.EXHAUSTIVE_EXPERTS", exhaustive)
    rng = np.random.default_rng(11)
    ratios = []
    for _trial in range(24):
        layers, experts = int(rng.integers(1, 4)), int(rng.integers(3, 7))
        steps, lat = random_steps(rng, layers, experts), latencies(rng)
        popularity = sum(part.counts.sum(axis=0) for part in steps.values()) + 0.5
        popularity = popularity / popularity.sum(axis=1, keepdims=True)
        count = int(rng.integers(1, layers * experts))
        cost = make_cost(steps, "balanced", lat, by_popularity(popularity, count), heldout=False)
        sets = np.array(list(itertools.product([False, True], repeat=experts)))
        best = exact(np.array([cost.of_layer(layer, sets) for layer in range(layers)]), sets, count)
        found = by_time(cost, popularity, count)
        assert found.sum() == count
        ratios.append(cost.of_placement(found) / best)
    print(f"worst {max(ratios):.5f}, mean {np.mean(ratios):.6f} of {len(ratios)}")
    assert min(ratios) >= 1 - 1e-9
    # Measured with this seed: 1.00000, and 1.00000 without all sets.
    assert max(ratios) <= (1.0001 if exhaustive else 1.005)


def test_the_cost_is_the_time_of_the_decisions() -> None:
    rng = np.random.default_rng(2)
    steps, lat = random_steps(rng, 2, 5), latencies(rng)
    reference = rng.random((2, 5)) < 0.5
    resident = rng.random((2, 5)) < 0.5
    for scenario in SCENARIOS:
        part = steps[scenario]

        def mean(home: np.ndarray, part: Steps = part) -> float:  # type: ignore[type-arg]
            fitted = part.counts[~part.heldout]
            return float(
                np.mean([sum(choose(n, r, lat).makespan_us for n, r in zip(s, home, strict=True)) for s in fitted])
            )

        cost = make_cost(steps, scenario, lat, reference, heldout=False)
        assert cost.of_placement(resident) == pytest.approx(mean(resident) / mean(reference), rel=1e-9)


@cache
def recorded(objective: Objective) -> tuple[ModelSpec, np.ndarray, dict[Scenario, Steps]]:  # type: ignore[type-arg]
    """The demo model, its popularity in the trace, and steps of it."""
    spec = frontend.load_model(str(EXAMPLES / "tiny-mixtral"))
    text = trace.read_trace(EXAMPLES / "tiny-mixtral-trace.safetensors", spec)
    popularity = trace.popularity(text, spec, objective)
    return spec, popularity, trace.sample_steps(text, popularity, spec, Options(objective, 1024, 4, 0))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("count", [7, 20, 36])
def test_never_worse_than_popularity_on_text_held_out(objective: Objective, count: int) -> None:
    spec, popularity, steps = recorded(objective)
    lat = latencies(np.random.default_rng(count))
    placed = place(spec, lat, steps, popularity, MemoryBudget(0, (), count), objective, "text")
    popular = by_popularity(popularity, count)
    heldout = make_cost(steps, objective, lat, popular, heldout=True)
    assert heldout.of_placement(placed.resident) <= 1 + 1e-9
    assert placed.summary.relative_time["placed"] <= 1.0 <= placed.summary.relative_time["popularity"]
    assert placed.summary.resident_experts == placed.resident.sum() == count
    if count == 20:
        again = place(spec, lat, steps, popularity, MemoryBudget(0, (), count), objective, "text")
        np.testing.assert_array_equal(placed.resident, again.resident)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_allocation_is_the_least_of_all(layers: int, experts: int, data: st.DataObject) -> None:
    number = st.floats(0, 100)
    row = st.lists(number, min_size=experts + 1, max_size=experts + 1)
    costs = np.array(data.draw(st.lists(row, min_size=layers, max_size=layers)))
    count = data.draw(st.integers(0, layers * experts))
    sizes = allocate(costs, count)
    assert sizes.sum() == count and (sizes >= 0).all() and (sizes <= experts).all()
    best = min(
        sum(costs[layer, size] for layer, size in enumerate(every))
        for every in itertools.product(range(experts + 1), repeat=layers)
        if sum(every) == count
    )
    assert costs[np.arange(layers), sizes].sum() == pytest.approx(best, abs=1e-9)


def test_nothing_to_choose() -> None:
    rng = np.random.default_rng(1)
    steps, lat = random_steps(rng, 2, 4), latencies(rng)
    model = sample_model(num_experts=4)
    for count in (0, 8):
        placed = place(model, lat, steps, np.full((2, 4), 0.25), MemoryBudget(0, (), count), "balanced", "made up")
        assert placed.resident.sum() == count and placed.summary.method == "popularity"
