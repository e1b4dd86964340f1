"""How a measurement is repeated, with clocks and probes that do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fiddler_runtime.machine import this_machine
from fiddlerc.hardware import calibrate
from fiddlerc.hardware.regimes import Regimes
from fiddlerc.hardware.sampling import ATTEMPTS, Guard, Point, contradictions, repeat, samples, sizes_within
from fiddlerc.ir import StepSample


class Clock:
    """Time that passes only when something is timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.calls: list[int] = []
        monkeypatch.setattr("fiddlerc.hardware.sampling.time.perf_counter", lambda: self.seconds)

    def timed(self, seconds: float) -> Callable[[int], float]:
        def call(index: int) -> float:
            self.calls.append(index)
            self.seconds += seconds
            return seconds * 1e6

        return call


ONE = Regimes(80.0)


def point(times: list[float], gbps: float | None = None, tokens: int = 1) -> Point:
    return Point("cpu_expert", (8, 16), tokens, 768, 2, "avx2", times, gbps)


def test_points_of_the_same_thing_are_one_sample() -> None:
    one, other = samples(
        [point([1.0, 2, 3, 4, 5, 6]), point([9.0], tokens=2), point([7.0, 8, 9, 10, 11])], Regimes(1.0)
    )
    assert (one.median_us, one.spread_us, one.repeats, one.regime) == (6.0, 8.0, 11, "fast")
    assert (other.tokens, other.median_us, other.repeats) == (2, 9.0, 1)


def test_points_are_of_the_regime_that_memory_was_in() -> None:
    two = Regimes(80.0, 40.0, 0.5)
    found = samples([point([1.0], 81.0), point([2.0], 42.0), point([3.0], 75.0), point([4.0])], two)
    assert [(sample.regime, sample.median_us) for sample in found] == [("fast", 3.0), ("slow", 2.0)]


class Memory:
    """Kernels that read memory at bandwidths as told."""

    def __init__(self, *gbps: float) -> None:
        self._gbps = iter(gbps)

    def read_gbps(self, _: object) -> float:
        return next(self._gbps)


@pytest.mark.parametrize(
    ("reads", "bandwidth", "times"),
    [
        ((80, 78), 79, [1.0]),
        ((80, 45, 46, 44), 45, [2.0]),
        ((80, 45, 80, 45, 80, 45), 62.5, [3.0]),  # it never stayed: the last attempt counts
    ],
)
def test_a_point_is_measured_again_if_memory_changed(
    monkeypatch: pytest.MonkeyPatch, reads: tuple[float, ...], bandwidth: float, times: list[float]
) -> None:
    monkeypatch.setattr(calibrate, "memory_probe", lambda _: None)
    session = calibrate._Session(calibrate.QUICK, this_machine("none"), 1, None)
    session.kernels = Memory(*reads)  # type: ignore[assignment]
    results = iter([[1.0], [2.0], [3.0]])
    assert session.at_one_bandwidth(lambda: next(results)) == (bandwidth, times)
    assert session.reads == list(reads)


def test_as_many_repetitions_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(repeat(clock.timed(0.125), seconds=1.0, least=2, most=100)) == 7
    assert clock.calls == list(range(8))


def test_a_slow_call_is_made_often_enough_and_a_quick_one_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(repeat(clock.timed(10.0), seconds=1.0, least=3, most=100)) == 3
    assert len(repeat(clock.timed(0.001), seconds=1.0, least=3, most=100)) == 100


def test_warming_up_takes_at_most_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(repeat(clock.timed(0.125), seconds=1.0, least=2, most=100, warm_up=50)) == 6
    assert len(repeat(clock.timed(0.001), seconds=1.0, least=2, most=100, warm_up=50)) == 100
    assert clock.calls[8 + 50] == 50


def test_sizes_stop_where_the_time_ends() -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64)
    assert sizes_within(sizes, lambda n: n * 1e5, 1000.0, 2) == sizes
    # 1 + 2 + 4 + 8 + 16 tenths of a second twice, and then 3.2 s twice would follow.
    assert sizes_within(sizes, lambda n: n * 1e5, 10.0, 2) == (1, 2, 4, 8, 16)
    assert sizes_within(sizes, lambda n: n * 1e5, 0.1, 2) == (1, 2, 4, 8)


def guard(levels: list[float]) -> Guard:
    """A guard whose machine has a peak of 100, and then the given probes."""
    script: Iterator[float] = iter([100.0] * 5 + levels)
    return Guard(lambda: next(script))


def test_an_undisturbed_point_is_measured_once() -> None:
    watch, results = guard([99.0, 98.0]), iter([[1.0]])
    assert watch(lambda: next(results)) == [1.0]
    assert (watch.points, watch.disturbed) == (1, 0)


def test_a_disturbed_point_is_measured_again() -> None:
    watch, results = guard([99.0, 60.0, 99.0, 99.0]), iter([[9.0], [1.0]])
    assert watch(lambda: next(results)) == [1.0]
    assert (watch.points, watch.disturbed) == (1, 0)


def test_a_machine_that_stays_disturbed_gives_its_best_and_says_so() -> None:
    watch, results = guard([50.0, 50.0, 80.0, 70.0, 99.0, 60.0]), iter([[5.0], [7.0], [6.0]])
    assert ATTEMPTS == 3
    assert watch(lambda: next(results)) == [7.0]
    assert (watch.points, watch.disturbed) == (1, 1)


def test_the_best_peak_may_be_seen_late() -> None:
    watch, results = guard([120.0, 120.0, 101.0, 101.0, 119.0, 119.0]), iter([[1.0], [2.0], [3.0]])
    assert watch(lambda: next(results)) == [1.0]
    assert watch(lambda: next(results)) == [3.0]
    assert (watch.points, watch.disturbed) == (2, 0)


def step(median_us: float, *, tokens: int = 1, context: int = 0, model: str = "m") -> StepSample:
    return StepSample(model, "f", 2, 100, 10, tokens, 1, context, median_us, 0.0, 8)


def test_a_step_that_takes_longer_than_one_with_more_to_do_is_a_contradiction() -> None:
    assert (
        contradictions([step(100, context=28), step(70, context=140), step(300, tokens=16), step(201, tokens=32)]) == []
    )
    (line,) = contradictions([step(291_748, context=28), step(291_794, context=140), step(46_021, context=524)])
    assert "140 tokens took 291.8 ms, 524 46.0" in line
    assert len(contradictions([step(200, tokens=16), step(100, tokens=32)])) == 1
    # Another model's, and a prompt beside a step that decodes, say nothing.
    assert contradictions([step(200, tokens=16), step(100, tokens=32, model="n"), step(50, context=64)]) == []
