"""What an engine asks of a system with several memory nodes. What comes of it: tests/kernels/test_memory_nodes.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import runtime_samples
import torch

from fiddler_runtime import Engine, ExpertWeights, FiddlerWarning
from fiddler_runtime.kernels import Kernels
from fiddler_runtime.machine import NodeCpus, refuses_placement
from fiddler_runtime.plan import Plan

SPEC = runtime_samples.small_spec()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "small", SPEC)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(address, present) of what is settled."""
    calls: list[tuple[int, bool]] = []
    settle = Kernels.settle

    def noted(self: Kernels, packed: torch.Tensor, *, present: bool = False) -> bool:
        calls.append((packed.data_ptr(), present))
        return settle(self, packed, present=present)

    monkeypatch.setattr(Kernels, "settle", noted)
    return calls


def put_on_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: int) -> None:
    def lane_cpus(threads: int) -> tuple[NodeCpus, ...]:
        assert threads == len(nodes)
        return tuple(NodeCpus(node, (0,)) for node in nodes)

    monkeypatch.setattr("fiddler_runtime.engine.lane_cpus", lane_cpus)


def hold(engine: Engine) -> list[int]:
    """Addresses of the packed experts, as the kernels get them."""
    return sorted(address for row in engine._store.pointers for address in row if address)


@pytest.mark.skipif(bool(refuses_placement()), reason=f"mbind is refused: {refuses_placement()}")
@pytest.mark.parametrize("cached", [False, True])
def test_every_packed_expert_is_settled(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: list[tuple[int, bool]], cached: bool
) -> None:
    put_on_nodes(monkeypatch, 0, 0)
    cache = tmp_path / "cache" if cached else None
    with Engine(plan, ExpertWeights.random(), threads=2, packed_cache=cache) as engine:
        assert engine.describe()["memory_nodes"] == [0, 0]
        assert sorted(settled) == [(address, cached) for address in hold(engine)]
        before = len(settled)
        place = next((row, expert) for row, here in enumerate(engine._store.resident) for expert in here)
        engine._give_up(place)
        assert settled[before:] == [(engine._store.packed[place[0]][place[1]].data_ptr(), False)]


def test_experts_that_do_not_fit_into_memory_stay_where_they_are(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: list[tuple[int, bool]]
) -> None:
    put_on_nodes(monkeypatch, 0, 0)
    monkeypatch.setattr("fiddler_runtime.store.available_bytes", lambda: 1000)
    with Engine(plan, ExpertWeights.random(), threads=2, packed_cache=tmp_path / "cache"):
        assert settled == []


@pytest.mark.parametrize("cached", [False, True])
def test_a_refusal_is_told_once(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    put_on_nodes(monkeypatch, 0, 1023)
    cache = tmp_path / "cache" if cached else None
    with pytest.warns(FiddlerWarning, match=r"lie on other memory nodes .*; hint: ") as told:
        Engine(plan, ExpertWeights.random(), threads=2, packed_cache=cache).close()
    assert len(told) == 1
    assert told[0].filename == __file__


def test_on_one_node_nobody_speaks_of_nodes(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler_runtime.engine.lane_cpus", lambda threads: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Engine(plan, ExpertWeights.random(), threads=2) as engine:
            assert engine.describe()["memory_nodes"] == []
