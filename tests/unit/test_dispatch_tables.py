"""Dense tables, and what a dispatcher refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_samples import library
from plan_samples import EXPERTS, sample_tables

from fiddler_runtime.dispatch import Dispatcher
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.makespan import CPU, DENSE_TOKENS, IDLE, RESIDENT, STREAMED, choose, dense, look_up


def test_dense_tables_pass_through_the_grid() -> None:
    tables = sample_tables()
    latencies = dense(tables)
    assert len(latencies.cpu_us) == tables.tokens[-1] + 1
    np.testing.assert_allclose(latencies.cpu_us[tables.tokens], tables.cpu_us[0])
    assert latencies.cpu_us[36] == pytest.approx(360.0)
    assert (np.diff(latencies.gpu_us) >= 0).all()
    assert latencies.stream_us == 25.0


def test_long_grids_are_cut_and_continued_by_a_line() -> None:
    tokens = np.array([0, 1, 10, 100_000], np.int32)
    curve = tokens.astype(np.float32)
    latencies = dense(sample_tables(tokens=tokens, cpu_us=curve[None], gpu_us=curve))
    assert len(latencies.cpu_us) == DENSE_TOKENS + 1
    assert look_up(latencies.cpu_us, np.array([3, 50_000])).tolist() == pytest.approx([3, 50_000])


def test_the_regime_that_was_seen_most_decides() -> None:
    fast = sample_tables().cpu_us
    tables = sample_tables(cpu_us=np.concatenate([fast, 2 * fast]), regime_shares=np.array([0.4, 0.6], np.float32))
    assert dense(tables).cpu_us[1] == dense(tables, regime=1).cpu_us[1] == 2 * dense(tables, regime=0).cpu_us[1]


def test_a_lent_expert_is_resident_until_it_is_taken_back() -> None:
    dispatcher = Dispatcher(library(8, 24), sample_tables(), EXPERTS)
    ids = torch.tensor([[1, 2]])
    assert dispatcher.decide(0, ids).tolist() == [IDLE, CPU, CPU, IDLE]
    dispatcher.lend(0, 2)
    assert dispatcher.decide(0, ids).tolist() == [IDLE, CPU, RESIDENT, IDLE]
    dispatcher.take_back()
    assert dispatcher.decide(0, ids).tolist() == [IDLE, CPU, CPU, IDLE]


def test_a_layer_by_hand() -> None:
    # cpu 10 us a token and 1 to enter; accelerator 5.01 us a token and 2 to enter; a copy 25 us; contention 0.1.
    latencies = dense(sample_tables())
    resident = np.array([1, 0, 0, 0], bool)
    alone = choose(np.array([1, 1, 0, 0]), resident, latencies)
    assert alone.strategy.tolist() == [RESIDENT, CPU, IDLE, IDLE]
    assert (alone.cpu_us, alone.accelerator_us) == pytest.approx((11.0, 7.01))
    # Three misses of 4, 3 and 1 tokens, none streamed: 81; one: max(1 + 1.1 * 40, 2 + 25 + 5.04) = 45; two: max(12,
    # 2 + 50 + 5.03) = 57.03, as the second copy arrives at 50.
    shared = choose(np.array([1, 3, 4, 1]), resident, latencies)
    assert shared.strategy.tolist() == [RESIDENT, CPU, STREAMED, CPU]
    assert (shared.cpu_us, shared.accelerator_us) == pytest.approx((45.0, 32.04))
    assert shared.makespan_us == pytest.approx(45.0)
    assert choose(np.zeros(4, int), resident, latencies).makespan_us == 0.0


def test_restrictions_that_cannot_be_kept() -> None:
    with pytest.raises(FiddlerError, match="not every expert is on the accelerator"):
        Dispatcher(library(8, 24), sample_tables(), EXPERTS, allow=("resident",))
    for allow in ((), ("resident", "gpu")):
        with pytest.raises(FiddlerError, match="these strategies"):
            Dispatcher(library(8, 24), sample_tables(), EXPERTS, allow=allow)
    with pytest.raises(FiddlerError, match="another model"):
        Dispatcher(library(8, 24), sample_tables(), EXPERTS + 1)


@pytest.mark.parametrize("ids", [torch.zeros(2, 2, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.int64)[:, :2]])
def test_ids_of_another_kind(ids: torch.Tensor) -> None:
    with pytest.raises(FiddlerError, match="top-k ids"):
        Dispatcher(library(8, 24), sample_tables(), EXPERTS).decide(0, ids)


def test_decisions_do_not_allocate_new_results() -> None:
    dispatcher = Dispatcher(library(8, 24), sample_tables(), EXPERTS)
    ids = torch.tensor([[0, 1]])
    assert dispatcher.decide(0, ids) is dispatcher.decide(1, ids) is dispatcher.strategy
