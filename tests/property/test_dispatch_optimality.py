"""The dispatch rule against brute force over all subsets, and the native dispatcher against the rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import library
from plan_samples import sample_tables

from fiddler_runtime import makespan
from fiddler_runtime.dispatch import Dispatcher
from fiddler_runtime.makespan import (
    ALL,
    CPU,
    IDLE,
    RESIDENT,
    SPLIT,
    STREAMED,
    Latencies,
    choose,
    dense,
    look_up,
    makespans,
)

MAX_TOKENS = 2048
TOKENS = np.arange(MAX_TOKENS + 2)
Counts = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Rng = np.random.Generator


def brute_force(counts: Counts, resident: Mask, latencies: Latencies) -> float:
    """The least makespan over every subset of the misses, microseconds.

    The accelerator is a two-stage flow shop without gaps that could be avoided: residents need no copy and go first,
    then the streamed experts in order of tokens (Johnson's rule for equal copies; a test below holds it
    against all orders).
    """
    at_home = (counts > 0) & resident
    misses = np.flatnonzero((counts > 0) & ~resident)
    misses = misses[np.argsort(-counts[misses], kind="stable")]
    c, g = look_up(latencies.cpu_us, counts[misses]), look_up(latencies.gpu_us, counts[misses])
    subsets = np.arange(1 << len(misses))
    finish = np.full(len(subsets), look_up(latencies.gpu_us, counts[at_home]).sum())
    copies, cpu = np.zeros(len(subsets)), np.zeros(len(subsets))
    for i in range(len(misses)):
        streamed = (subsets >> i) & 1 == 1
        copies += streamed
        finish = np.where(streamed, np.maximum(finish, copies * latencies.stream_us) + g[i], finish)
        cpu += np.where(streamed, 0.0, c[i])
    slow_down = 1 + latencies.contention * (subsets > 0)
    cpu = np.where(subsets == len(subsets) - 1, 0.0, latencies.cpu_overhead_us + slow_down * cpu)
    used = (subsets > 0) | bool(at_home.any())
    return float(np.maximum(cpu, np.where(used, finish + latencies.gpu_overhead_us, 0.0)).min())


def gpu_machine(rng: Rng) -> Latencies:
    """Rooflines of a random machine: its GPU is at least twice as fast as its CPU in every respect."""
    weights = 10 ** rng.uniform(6, 8.6)
    cpu_bytes_per_us = rng.uniform(20e3, 500e3)
    cpu_flops_per_us = cpu_bytes_per_us * rng.uniform(3, 30)
    gpu_bytes_per_us = cpu_bytes_per_us * rng.uniform(2, 40)
    gpu_flops_per_us = max(2 * cpu_flops_per_us, gpu_bytes_per_us * rng.uniform(20, 300))
    work = weights * TOKENS
    cpu = np.maximum(weights / cpu_bytes_per_us, work / cpu_flops_per_us) * rng.uniform(1, 1.4)
    gpu = np.maximum(weights / gpu_bytes_per_us, work / gpu_flops_per_us) + rng.uniform(5, 60)
    return _latencies(cpu, gpu, rng, weights / rng.uniform(6e3, 64e3))


def simulated_machine(rng: Rng) -> Latencies:
    """The accelerator is a part of the CPU: as slow, or slower, and copies are cheap."""
    cpu = gpu_machine(rng).cpu_us
    return _latencies(cpu, cpu * rng.uniform(0.5, 3), rng, float(cpu[1]) * rng.uniform(0.3, 2))


def _latencies(cpu: npt.NDArray[np.floating], gpu: npt.NDArray[np.floating], rng: Rng, stream_us: float) -> Latencies:
    cpu_us, gpu_us = (np.where(TOKENS > 0, table, 0).astype(np.float32) for table in (cpu, gpu))
    return Latencies(cpu_us, gpu_us, rng.uniform(0, 50), rng.uniform(0, 50), stream_us, rng.uniform(0, 0.6))


def random_layer(rng: Rng) -> tuple[Counts, Mask]:
    experts = int(rng.integers(1, 13))
    shares = rng.dirichlet(np.full(experts, 10 ** rng.uniform(-1, 1)))
    counts = rng.multinomial(int(2 ** rng.uniform(0, 11)), shares).astype(np.int32)
    return counts, rng.random(experts) < rng.choice([0.0, 0.3, 0.6])


def adversarial_machine(rng: Rng) -> Latencies:
    """Curves of steps and plateaus at random, either side the faster: nothing but monotone."""

    def curve() -> npt.NDArray[np.float64]:
        steps = rng.exponential(10 ** rng.uniform(-1, 2), MAX_TOKENS + 1) * (rng.random(MAX_TOKENS + 1) < rng.random())
        return np.concatenate([[0], 10 ** rng.uniform(-1, 3) + np.cumsum(steps)])

    return replace(_latencies(curve(), curve(), rng, 10 ** rng.uniform(-1, 4)), contention=rng.uniform(0, 2))


MACHINES = (gpu_machine, simulated_machine, adversarial_machine)


@pytest.mark.parametrize("machine", MACHINES)
def test_up_to_twelve_misses_the_choice_is_the_best_of_all_subsets(machine: Callable[[Rng], Latencies]) -> None:
    rng = np.random.default_rng(20260)
    ratios = []
    for _ in range(4000):
        latencies = machine(rng)
        counts, resident = random_layer(rng)
        best = brute_force(counts, resident, latencies)
        ratios.append(choose(counts, resident, latencies).makespan_us / best)
    print(f"{machine.__name__}: worst {max(ratios):.9f}, mean {np.mean(ratios):.9f} of {len(ratios)} layers")
    assert min(ratios) >= 1 - 1e-9 and max(ratios) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("machine", "worst", "mean"),
    # Measured with this seed: worst 1.0024, 1.0093, 1.0299; mean 1.000003, 1.000065, 1.000155.
    [(gpu_machine, 1.005, 1.0001), (simulated_machine, 1.02, 1.0005), (adversarial_machine, 1.05, 1.001)],
)
def test_beyond_twelve_misses_the_rule_is_close(
    machine: Callable[[Rng], Latencies], worst: float, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 256 experts are decided with, on layers small enough for brute force."""
    monkeypatch.setattr(makespan, "EXACT_MISSES", 0)
    rng = np.random.default_rng(20261)
    ratios = []
    while len(ratios) < 2000:
        latencies = machine(rng)
        counts, resident = random_layer(rng)
        if ((counts > 0) & ~resident).sum() > makespan.TOP_MISSES:
            ratios.append(choose(counts, resident, latencies).makespan_us / brute_force(counts, resident, latencies))
    print(f"{machine.__name__}: worst {max(ratios):.4f}, mean {np.mean(ratios):.6f} of {len(ratios)} layers")
    assert max(ratios) <= worst
    assert np.mean(ratios) <= mean


@pytest.mark.parametrize("machine", MACHINES)
def test_splitting_one_expert_is_close_to_the_best_of_all_splits(machine: Callable[[Rng], Latencies]) -> None:
    """Against every subset with every other miss split anywhere, copied last; never worse than no split."""
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(300):
        latencies = replace(machine(rng), rows=int(rng.integers(65, 400)))
        experts = int(rng.integers(1, 6))
        counts = rng.integers(1, 64, experts).astype(np.int32)
        resident = rng.random(experts) < 0.2
        whole = choose(counts, resident, replace(latencies, rows=0)).makespan_us
        found = choose(counts, resident, latencies)
        best = min(whole, best_split(counts, resident, latencies))
        assert best * (1 - 1e-9) <= found.makespan_us <= whole * (1 + 1e-12)
        assert makespans(counts[None], resident, latencies).makespan_us[0] == found.makespan_us
        ratios.append(found.makespan_us / best)
    print(f"{machine.__name__}: worst {max(ratios):.4f}, mean {np.mean(ratios):.6f} of the best split")
    # Measured with this seed: worst 1.0006, 1.0610, 1.0086; mean 1.000002, 1.000677, 1.000029.
    assert max(ratios) <= 1.1 and np.mean(ratios) <= 1.001


def best_split(counts: Counts, resident: Mask, latencies: Latencies) -> float:
    """The least makespan over subsets streamed whole, one other expert, and how many of its blocks are streamed."""
    at_home = (counts > 0) & resident
    misses = np.flatnonzero((counts > 0) & ~resident)
    c, g = look_up(latencies.cpu_us, counts), look_up(latencies.gpu_us, counts)
    best = float("inf")
    for subset in itertools.product((False, True), repeat=len(misses)):
        streamed = sorted(misses[list(subset)], key=lambda e: -counts[e])
        done = float(g[at_home].sum())
        for copies, expert in enumerate(streamed, 1):
            done = max(done, copies * latencies.stream_us) + g[expert]
        for split in set(misses) - set(streamed):
            share = np.arange(64, latencies.rows, 64) / latencies.rows
            others = sum(c[e] for e in misses if e != split and e not in streamed)
            cpu = latencies.cpu_overhead_us + (1 + latencies.contention) * (others + (1 - share) * c[split])
            gpu = np.maximum(done, (len(streamed) + share) * latencies.stream_us) + g[split]
            best = min(best, float(np.maximum(cpu, gpu + latencies.gpu_overhead_us).min()))
    return best


def test_largest_first_is_the_best_order() -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        g = np.sort(rng.exponential(size=rng.integers(1, 6)) * 10 ** rng.uniform(-1, 1))[::-1]
        resident_us, stream_us = rng.exponential(), rng.exponential()

        def finish(order: tuple[float, ...], at: float = resident_us, w: float = stream_us) -> float:
            for copies, each in enumerate(order, 1):
                at = max(at, copies * w) + each
            return at

        assert finish(tuple(g)) <= min(finish(order) for order in itertools.permutations(g)) + 1e-12


# Any tables at all, as long as more tokens never take less time.
steps = st.lists(st.floats(0, 1000, width=32), min_size=12, max_size=12)
tables_of_any_kind = st.builds(
    lambda cpu, gpu, c0, g0, w, gamma: Latencies(
        np.concatenate([[0], np.cumsum(cpu)]).astype(np.float32),
        np.concatenate([[0], np.cumsum(gpu)]).astype(np.float32),
        *(c0, g0, w, gamma),
    ),
    *(steps, steps),
    *[
        st.floats(0, 100, width=32),
        st.floats(0, 100, width=32),
        st.floats(0, 5000, width=32),
        st.floats(0, 2, width=32),
    ],
)
layers = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=9)


def unzip(layer: list[tuple[int, bool]]) -> tuple[Counts, Mask]:
    return np.array([n for n, _ in layer], np.int32), np.array([home for _, home in layer])


@given(layers, tables_of_any_kind)
def test_never_worse_than_all_on_the_cpu_or_all_streamed(layer: list[tuple[int, bool]], latencies: Latencies) -> None:
    counts, resident = unzip(layer)
    chosen = choose(counts, resident, latencies).makespan_us
    for allow in (("resident", "cpu"), ("resident", "streamed")):
        assert chosen <= choose(counts, resident, latencies, allow).makespan_us * (1 + 1e-12)


@given(layers, tables_of_any_kind, st.data())
def test_fewer_tokens_never_take_longer(
    layer: list[tuple[int, bool]], latencies: Latencies, data: st.DataObject
) -> None:
    """It holds for the rule and not only for the optimum: what it tries are ranks, and sorted, the smaller counts are
    smaller rank by rank."""
    counts, resident = unzip(layer)
    latencies = replace(latencies, rows=data.draw(st.sampled_from([0, 64, 100, 640])))
    fewer = np.array([data.draw(st.integers(0, int(n))) for n in counts], np.int32)
    before, after = (choose(n, resident, latencies).makespan_us for n in (counts, fewer))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("machine", MACHINES)
def test_fewer_tokens_never_take_longer_beyond_twelve_misses(machine: Callable[[Rng], Latencies]) -> None:
    """Where not all subsets are tried, and across the border to where they are, since some experts lose all tokens."""
    rng = np.random.default_rng(20262)
    crossed = beyond = 0
    for _ in range(1500):
        experts = int(rng.integers(13, 65))
        latencies = replace(machine(rng), rows=int(rng.choice([0, 100, 640])))
        counts = rng.multinomial(int(2 ** rng.uniform(4, 11)), rng.dirichlet(np.ones(experts))).astype(np.int32)
        resident = rng.random(experts) < rng.choice([0.0, 0.3])
        fewer = rng.binomial(counts, rng.choice([0.1, 0.5, 0.9], experts)).astype(np.int32)
        if rng.random() < 0.5:  # one token less, in one expert
            fewer = counts - (np.arange(experts) == rng.choice(np.flatnonzero(counts)))
        before, after = ((n > 0) & ~resident for n in (counts, fewer))
        beyond += before.sum() > makespan.EXACT_MISSES
        crossed += before.sum() > makespan.EXACT_MISSES >= after.sum()
        least = choose(counts, resident, latencies).makespan_us
        assert choose(fewer, resident, latencies).makespan_us <= least * (1 + 1e-9)
    print(f"{machine.__name__}: {beyond} layers beyond {makespan.EXACT_MISSES} misses, {crossed} of them across")
    assert beyond > 1000 and crossed > 50


@given(layers, tables_of_any_kind, st.sets(st.sampled_from(ALL), min_size=1))
def test_only_allowed_strategies_are_chosen(
    layer: list[tuple[int, bool]], latencies: Latencies, allow: set[str]
) -> None:
    counts, resident = unzip(layer)
    if allow == {"resident"} and ((counts > 0) & ~resident).any():
        with pytest.raises(ValueError, match="not resident"):
            choose(counts, resident, latencies, tuple(allow))  # type: ignore[arg-type]
        return
    decision = choose(counts, resident, latencies, tuple(allow))  # type: ignore[arg-type]
    names = {RESIDENT: "resident", STREAMED: "streamed", CPU: "cpu"}
    for count, home, strategy in zip(counts, resident, decision.strategy, strict=True):
        assert (strategy == IDLE) == (count == 0)
        assert strategy == IDLE or names[int(strategy)] in allow
        assert strategy != RESIDENT or home
        if count and home and "resident" in allow:
            assert strategy == RESIDENT


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 8),
    st.integers(0, 40),
    st.sets(st.sampled_from(ALL), min_size=1),
    st.integers(0, 2**32 - 1),
)
def test_the_native_dispatcher_follows_the_rule(
    experts: int, top_k: int, tokens: int, allow: set[str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grid = np.array([0, 1, 2, 3, 5, 9, 17], np.int32)

    def curve() -> npt.NDArray[np.float32]:
        return np.concatenate([[0], np.cumsum(rng.exponential(10, size=len(grid) - 1))]).astype(np.float32)

    rows = int(rng.choice([0, 24, 130, 1408]))
    tables = sample_tables(
        tokens=grid,
        cpu_us=curve()[None],
        rest_us=np.zeros(len(grid), np.float32),
        gpu_us=curve(),
        scalars_us=rng.exponential([5, 5, 30]).astype(np.float32),
        contention=rng.random(1).astype(np.float32),
        resident=(rng.random((2, experts)) < (1 if allow == {"resident"} else 0.4)).astype(np.uint8),
    )
    dispatcher = Dispatcher(library(8, 24), tables, experts, allow=tuple(allow), rows=rows)
    # Skewed, so that some counts lie beyond the grid; and some ids that belong to no expert.
    ids = torch.from_numpy((experts * rng.random((tokens, top_k)) ** 3).astype(np.int64))
    ids[rng.random((tokens, top_k)) < 0.05] = -1
    ids[rng.random((tokens, top_k)) < 0.05] = experts
    counts = np.bincount(ids[(ids >= 0) & (ids < experts)].numpy(), minlength=experts)
    for layer in (0, 1, 0):
        strategy = dispatcher.decide(layer, ids)
        expected = choose(counts, tables.resident[layer], dense(tables, rows=rows), tuple(allow))  # type: ignore[arg-type]
        np.testing.assert_array_equal(dispatcher.counts, counts)
        np.testing.assert_allclose(dispatcher.lane_us, [expected.cpu_us, expected.accelerator_us], rtol=1e-6)
        np.testing.assert_array_equal(strategy, expected.strategy)
        assert tuple(dispatcher.split) == (expected.split or (-1, 0))
        assert (strategy == SPLIT).sum() == (expected.split is not None)
