"""The memory budget, which experts it buys, and the tables that follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import sample_model

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.makespan import Latencies, dense
from fiddler_runtime.plan import CurveSummary, packed_bytes
from fiddlerc.ir import LatencyModel, MemoryBudget, ModelSpec, Options, Placement
from fiddlerc.placement import count_memory, latencies, make_tables, place

MODEL = sample_model()
LATENCIES = Latencies(np.array([0, 10, 20], np.float32), np.array([0, 5, 5], np.float32), 1.0, 2.0, 25.0, 0.1)
MIXTRAL = sample_model(
    num_layers=32,
    moe_layers=tuple(range(32)),
    num_experts=8,
    hidden_size=4096,
    intermediate_size=14336,
    max_context=32768,
    non_expert_bytes=3_211_265_024,
    kv_bytes_per_token=131_072,
    workspace_bytes_per_token=364_000,
)


def budget(experts: int) -> MemoryBudget:
    return MemoryBudget(1, (), experts)


def popular(model: ModelSpec, popularity: npt.NDArray[np.float64], count: int) -> Placement:
    """A placement where nothing is known of any text."""
    return place(model, LATENCIES, None, popularity, budget(count), "decode", "made up")


def options(memory: int, context: int = 4096, batch: int = 1) -> Options:
    return Options("decode", context, batch, memory)


def test_every_item_is_counted() -> None:
    counted = count_memory(MIXTRAL, options(24 << 30))
    packed = packed_bytes(4096, 14336)
    items = {item.item: item.bytes for item in counted.items}
    assert items == {
        "non-expert weights": 3_211_265_024,
        "KV cache (1 x 4096 tokens)": 4096 * 131_072,
        "activations (2048 tokens)": 2048 * 364_000,
        "staging of streamed experts": 2 * MIXTRAL.expert_bytes + packed,
        "allocator slack": int((24 << 30) * 0.03),
    }
    # What Fiddler's paper fits into 24 GB is 56 of 256.
    assert counted.resident_experts == 55
    assert counted.total_bytes == 24 << 30


def test_context_and_batch_cost_memory() -> None:
    assert count_memory(MIXTRAL, options(24 << 30, batch=4)).resident_experts < 55
    assert count_memory(MIXTRAL, options(24 << 30, context=32768)).resident_experts < 55


def test_windows_states_and_latent_vectors_are_counted() -> None:
    """Short and beyond the window; a sequence's states once; a layer's keys and values made anew."""
    model = replace(MIXTRAL, window=512, window_kv_bytes_per_token=1000, state_bytes=7, expanded_bytes_per_token=50)
    for context, kept in ((128, 128), (512, 512), (4096, 512)):
        items = {i.item: i.bytes for i in count_memory(model, options(24 << 30, context, batch=3)).items}
        cache = 3 * (context * MIXTRAL.kv_bytes_per_token + kept * 1000 + 7)
        assert items[f"KV cache (3 x {context} tokens)"] == cache
        assert items[f"keys and values of a layer ({3 * context} tokens)"] == 3 * context * 50


def test_prefetching_takes_one_more_slot() -> None:
    without, ahead = (count_memory(MIXTRAL, options(24 << 30), prefetching=on) for on in (False, True))
    assert {i.item: i.bytes for i in ahead.items}["staging of prefetched experts"] == MIXTRAL.expert_bytes
    assert ahead.resident_experts == without.resident_experts - 1


def test_no_more_residents_than_experts() -> None:
    assert count_memory(MODEL, options(1 << 40, 128)).resident_experts == 8


@given(st.integers(0, 64 << 30))
def test_the_budget_is_kept_and_the_named_least_amount_works(memory: int) -> None:
    try:
        counted = count_memory(MIXTRAL, options(memory))
    except FiddlerError as error:
        assert error.hint is not None
        amount = error.hint.split()[1].rstrip(",")
        assert amount.endswith("GiB")
        enough = int(amount.removesuffix("GiB")) << 30
        assert memory < enough
        assert count_memory(MIXTRAL, options(enough)).resident_experts >= 0
        assert "GPU budget" in error.what
        return
    used = sum(item.bytes for item in counted.items) + counted.resident_experts * MIXTRAL.expert_bytes
    assert used <= memory
    assert counted.resident_experts == 256 or used + MIXTRAL.expert_bytes > memory


def test_the_most_popular_experts_of_all_layers_together() -> None:
    popularity = np.array([[0.7, 0.1, 0.1, 0.1], [0.3, 0.2, 0.25, 0.25]])
    placed = popular(MODEL, popularity, 3)
    assert placed.resident.tolist() == [[True, False, False, False], [True, False, True, False]]
    assert placed.summary.hit_rate == pytest.approx((0.7 + 0.3 + 0.25) / 2)
    assert placed.summary.random_hit_rate == 3 / 8
    assert placed.summary.basis == "made up"


def test_equal_experts_are_spread_over_the_layers() -> None:
    model = sample_model(num_layers=6, moe_layers=(0, 1, 2, 3, 4, 5), num_experts=8)
    for count in range(49):
        placed = popular(model, np.full((6, 8), 1 / 8), count)
        per_layer = placed.resident.sum(axis=1)
        assert per_layer.sum() == count
        assert per_layer.max() - per_layer.min() <= 1


@given(st.integers(0, 8), st.lists(st.integers(0, 9), min_size=8, max_size=8), st.randoms())
def test_popularity_maximises_the_hit_rate(count: int, weights: list[int], random: object) -> None:
    popularity = np.array(weights, float).reshape(2, 4) + 0.5
    popularity /= popularity.sum(axis=1, keepdims=True)
    placed = popular(MODEL, popularity, count)
    assert placed.summary.resident_experts == placed.resident.sum() == count
    best = np.sort(popularity.ravel())[::-1][:count].sum() / 2
    assert placed.summary.hit_rate == pytest.approx(best)
    assert placed.summary.hit_rate >= placed.summary.random_hit_rate - 1e-12


def latency(cpu_us: float, gpu_us: float, stream_us: float) -> LatencyModel:
    tokens = np.array([0, 1, 2, 4, 1000], np.int32)
    return LatencyModel(
        tokens=tokens,
        cpu_us=cpu_us * tokens[None],
        regime_shares=np.ones(1),
        gpu_us=gpu_us * (tokens > 0),
        rest_us=0.0 * tokens,
        rest_kv_us=0.0,
        cpu_overhead_us=1.0,
        gpu_overhead_us=2.0,
        stream_us=stream_us,
        contention=0.0,
        curves=(CurveSummary("cpu_expert", "m", "f", 0.0, 0.0, 1.0, 1.0, 0, False, {}),),
    )


def test_tables_are_what_the_plan_holds() -> None:
    placed = popular(MODEL, np.full((2, 4), 0.25), 3)
    tables = make_tables(MODEL, latency(10.0, 1.0, 5.0), placed)
    assert tables.cpu_us.dtype == tables.gpu_us.dtype == tables.scalars_us.dtype == np.float32
    assert tables.resident.dtype == np.uint8
    assert tables.scalars_us.tolist() == [1.0, 2.0, 5.0]
    assert tables.tokens[0] == 0
    assert (np.diff(tables.cpu_us) >= 0).all()


def test_decode_decisions_by_misses() -> None:
    model = replace(MODEL, top_k=4)
    placed = popular(model, np.full((2, 4), 0.25), 0)
    # A copy costs less than an expert on the CPU: some are streamed while the CPU works, more of more misses.
    cheap = make_tables(model, latency(10.0, 1.0, 5.0), placed).decode_streams
    assert cheap.tolist() == [0, 1, 1, 2, 3]
    # A copy costs more than all experts on the CPU: none is.
    dear = make_tables(model, latency(10.0, 1.0, 500.0), placed).decode_streams
    assert dear.tolist() == [0, 0, 0, 0, 0]


def test_decisions_of_the_compiler_see_what_the_plan_will_hold() -> None:
    fitted = latency(10.0, 1.0, 5.0)
    tables = make_tables(MODEL, fitted, popular(MODEL, np.full((2, 4), 0.25), 3))
    mine, theirs = latencies(fitted), dense(tables)
    for name in ("cpu_us", "gpu_us", "cpu_overhead_us", "gpu_overhead_us", "stream_us", "contention", "rows"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
