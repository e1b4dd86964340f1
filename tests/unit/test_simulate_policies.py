"""Each strategy against what its description gives on paper: figures worked out by hand, or a plain
re-implementation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan_samples import sample_model
from simulate_samples import random_steps, random_tables, sample_setting, steps_of

from fiddler_runtime.makespan import choose
from fiddlerc.simulate import POLICIES, Policy, make_setting
from fiddlerc.simulate.caching import FreeToken, HybriMoE, MixtralOffloading
from fiddlerc.simulate.fiddler import Fiddler, FiddlerCode
from fiddlerc.simulate.ours import Ours
from fiddlerc.simulate.policy import arrivals_us
from fiddlerc.simulate.whole_layers import KTransformers, LlamaCpp, ZeroInfinity

# One token; layer 0 chooses expert 0 (resident) and 1, layer 1 experts 0 and 3, neither resident.
ONE = steps_of([[[1, 1, 0, 0], [1, 0, 0, 1]]])
REST = 101.0  # of one token, no cache
G1, W, C0, G0 = 5.01, 25.0, 1.0, 2.0
POPULAR = np.array([[0.4, 0.2, 0.2, 0.2], [0.2, 0.4, 0.3, 0.1]], np.float32)  # the most popular three are the residents


def only(policy: Policy, **tables: object) -> float:
    (us,) = policy.replay(ONE, sample_setting(popularity=POPULAR, **tables)).us.tolist()  # type: ignore[arg-type]
    return float(us)


def test_ours_is_the_rest_and_the_makespan_of_every_layer() -> None:
    rng = np.random.default_rng(0)
    setting = make_setting(sample_model(), random_tables(rng, 3, 6), "cuda")
    steps = random_steps(rng, 20, 3, 6, 5)
    expected = [
        float(setting.rest_us(steps.tokens, steps.kv)[step])
        + sum(choose(steps.counts[step, at], setting.resident[at], setting.latencies).makespan_us for at in range(3))
        for step in range(20)
    ]
    assert Ours().replay(steps, setting).us == pytest.approx(expected, rel=1e-6)


def test_the_rest_of_a_step_grows_with_what_it_attends_to() -> None:
    setting = sample_setting()
    short, long = (Ours().replay(steps_of(ONE.counts, kv=kv), setting).us[0] for kv in (0, 1000))
    assert long - short == pytest.approx(10.0, rel=1e-5)  # 0.01 us each


def test_hits_are_choices_of_residents() -> None:
    setting = sample_setting()
    assert Ours().replay(ONE, setting).hits.tolist() == [1]
    assert KTransformers().replay(ONE, setting).hits.tolist() == [0]


def test_fiddler_runs_a_miss_where_it_takes_less_and_overlaps_the_lanes() -> None:
    # Layer 0: max(1 + 10, 2 + 5.01). Layer 1: both on the CPU, 1 + 20: a copy takes 25 + 5.01 each.
    assert only(Fiddler()) == pytest.approx(REST + 11 + 21, rel=1e-6)


def test_fiddler_copies_when_the_cpu_takes_longer_than_the_copy() -> None:
    # c(1) = 40 > 25 + 5.01. Layer 0: 2 + max(5.01, 25) + 5.01. Layer 1: two copies, 2 + 50 + 5.01.
    slow = sample_setting().cpu_us(np.arange(9)) * 4
    tables = {"cpu_us": np.float32(slow)[None], "tokens": np.arange(9, dtype=np.int32)}
    flat = np.where(np.arange(9) > 0, 5.01, 0).astype(np.float32)
    rest = np.where(np.arange(9) > 0, 101, 0).astype(np.float32)
    assert only(Fiddler(), gpu_us=flat, rest_us=rest, **tables) == pytest.approx(REST + 32.01 + 57.01, rel=1e-5)


def test_fiddlers_code_does_one_after_the_other_with_torchs_kernels() -> None:
    factor = 1.88  # of one token
    layers = (G0 + G1 + C0 + 10 * factor) + (C0 + 20 * factor)
    assert only(FiddlerCode()) == pytest.approx(REST + layers, rel=1e-5)


def test_fiddlers_code_copies_from_ten_tokens_on() -> None:
    nine, ten = (
        float(FiddlerCode().replay(steps_of([[[0, n, 0, 0], [0, 0, n, 0]]]), sample_setting()).us[0]) for n in (9, 10)
    )
    # Layer 0 misses, layer 1 hits: its CPU time 10 n (and more, by torch) against w + g.
    assert nine - ten > 90 * 1.4 - (W + 6)


def test_llama_cpp_puts_whole_layers_where_they_fit() -> None:
    everything = np.ones((2, 4), np.uint8)
    all_home = LlamaCpp().replay(ONE, sample_setting(resident=everything)).us[0]
    assert all_home == pytest.approx(REST + 2 * (G0 + 2 * G1), rel=1e-5)
    # No room for experts: both layers on the CPU, attention too.
    none = sample_setting(resident=np.zeros((2, 4), np.uint8), spec=sample_model(non_expert_bytes=36_864 // 4))
    expected = 10 * 0.25 + 2 * (C0 + 20)  # c(1) for an expert's 36,864 bytes
    assert LlamaCpp().replay(ONE, none).us[0] == pytest.approx(expected, rel=1e-5)


def test_llama_cpp_sends_a_layers_weights_for_32_tokens() -> None:
    nothing = np.zeros((2, 4), np.uint8)
    spec = sample_model(non_expert_bytes=2 * 36_864)  # one expert's worth a layer
    setting = sample_setting(resident=nothing, spec=spec)
    below, at = (steps_of([[[n, n, 0, 0], [n, n, 0, 0]]], "prefill") for n in (31, 32))
    gpu = 5 + 0.01 * 32
    rest = float(setting.rest_us(np.array([32]), np.array([0]))[0])
    sent = (4 + 1) * W + G0 + 2 * gpu
    # Two experts' worth of memory is what the non-expert part would have taken; no layer of five fits.
    assert LlamaCpp().replay(at, setting).us[0] == pytest.approx(rest + 2 * sent, rel=1e-5)
    assert LlamaCpp().replay(below, setting).us[0] > 2 * 2 * 310


def test_zero_infinity_sends_everything_always() -> None:
    spec = sample_model(non_expert_bytes=2 * 36_864)
    setting = sample_setting(spec=spec)
    # Ten experts' worth in two parts; the last layer's computing follows its copy.
    expected = 10 * W + REST / 2 + G0 + 2 * G1
    assert ZeroInfinity().replay(ONE, setting).us[0] == pytest.approx(expected, rel=1e-5)


def test_zero_infinity_is_bound_by_computing_where_that_takes_longer() -> None:
    setting = sample_setting(scalars_us=np.array([1, 2, 0.001], np.float32))
    assert ZeroInfinity().replay(ONE, setting).us[0] == pytest.approx(REST + 2 * (G0 + 2 * G1), rel=1e-2)


def test_ktransformers_adds_up_the_cpu() -> None:
    assert only(KTransformers()) == pytest.approx(REST + 2 * C0 + 4 * 10, rel=1e-6)


def test_mixtral_offloadings_cache_is_lru() -> None:
    rng = np.random.default_rng(3)
    tables = random_tables(rng, 2, 6)
    resident = np.zeros((2, 6), np.uint8)
    resident[:, :2] = 1
    setting = make_setting(sample_model(num_experts=6), replace(tables, resident=resident), "cuda")
    steps = random_steps(rng, 60, 2, 6, 1)
    found = MixtralOffloading(swaps=True).replay(steps, setting).hits
    held = [setting.cached(layer) for layer in range(2)]
    for step, counts in enumerate(steps.counts):
        hits = 0
        for layer in range(2):
            active = np.flatnonzero(counts[layer]).tolist()
            hits += sum(expert in held[layer] for expert in active)
            for expert in active:
                held[layer] = [*(other for other in held[layer] if other != expert), expert][-2:]
        assert found[step] == hits


def test_mixtral_offloadings_code_copies_out_as_much_as_in() -> None:
    spec = sample_model()
    nothing = sample_setting(resident=np.zeros((2, 4), np.uint8), spec=spec)
    us = MixtralOffloading(swaps=True).replay(ONE, nothing).us[0]
    # Two misses a layer, 50 us each, the second's computing after its copy.
    assert us == pytest.approx(REST + 2 * (100 + G1), rel=1e-5)


def test_guesses_hide_copies_behind_attention() -> None:
    nothing = np.zeros((2, 4), np.uint8)
    long_attention = np.where(np.arange(8) > 0, 1000, 0).astype(np.float32)
    setting = sample_setting(resident=nothing, rest_us=long_attention)
    without = replace(setting, latencies=replace(setting.latencies, stream_us=0.0))
    guessing, free = (MixtralOffloading().replay(ONE, s).us[0] for s in (setting, without))
    # The first layer has nobody to guess for it; the second one's guesses (the first two are right) came in time.
    assert guessing - free == pytest.approx(2 * W - G0 - G1, rel=1e-4)


def test_hybrimoe_uses_the_lane_that_is_done_first() -> None:
    # Two misses of 4 tokens: 40 us on the CPU, 25 + 5 by the link: one each.
    steps = steps_of([[[0, 4, 4, 0], [0, 0, 0, 0]]])
    setting = sample_setting(resident=np.array([[1, 0, 0, 0], [1, 0, 0, 0]], np.uint8))
    rest = float(setting.rest_us(steps.tokens, steps.kv)[0])
    us = HybriMoE().replay(steps_of(np.maximum(steps.counts, [[[0, 0, 0, 0], [1, 0, 0, 0]]])), setting).us[0]
    assert us == pytest.approx(rest + (1 + 40 * 1.1) + (G0 + G1), rel=1e-5)


def test_hybrimoe_keeps_what_was_chosen_of_late() -> None:
    # Experts 2 and 3 are always chosen and not popular; copies are cheap, so what is fetched once stays.
    popularity = np.array([[0.5, 0.3, 0.15, 0.05]] * 2, np.float32)
    steps = steps_of([[[0, 0, 1, 1], [0, 0, 1, 1]]] * 10)
    setting = sample_setting(
        popularity=popularity,
        resident=np.array([[1, 1, 0, 0], [1, 1, 0, 0]], np.uint8),
        scalars_us=np.array([1, 2, 0.5], np.float32),
    )
    hits = HybriMoE().replay(steps, setting).hits.tolist()
    assert hits[0] <= 1 and min(hits[1:]) >= 2  # of four; a lone miss is done sooner by the CPU


def test_freetoken_splits_misses_by_bandwidth() -> None:
    # w = 25, c(1) = 10: of 2 misses 2 * 10 / 35 = 0.57, so one is copied; of 1, 0.29: none.
    layer0 = max(C0 + 10, G0 + G1)
    layer1 = max(C0 + 10 * 1.1, G0 + W + G1)
    assert only(FreeToken()) == pytest.approx(REST + layer0 + layer1, rel=1e-5)


def test_freetoken_copies_every_miss_of_a_prompt() -> None:
    prompt = replace(ONE, scenario="prefill")
    us = FreeToken().replay(prompt, sample_setting(popularity=POPULAR)).us[0]
    assert us == pytest.approx(REST + (G0 + W + G1) + (G0 + 2 * W + G1), rel=1e-5)


def test_copies_are_computed_as_they_arrive() -> None:
    gpu = np.array([[10.0, 1.0, 1.0]])
    # Arrive at 5, 10, 15; computed 5-15, 15-16, 16-17.
    assert arrivals_us(gpu, np.ones((1, 3), bool), np.zeros(1), 5.0).tolist() == [17.0]
    # Other work until 100 comes first.
    assert arrivals_us(gpu, np.ones((1, 3), bool), np.array([100.0]), 5.0).tolist() == [112.0]


def test_names_are_distinct_and_ours_is_first() -> None:
    names = [policy.name for policy in POLICIES]
    assert names[0] == "ours" and len(set(names)) == len(names) == 10


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_the_same_steps_take_the_same_time(policy: Policy) -> None:
    rng = np.random.default_rng(1)
    setting = make_setting(sample_model(num_experts=6), random_tables(rng, 2, 6), "cuda")
    steps = random_steps(rng, 30, 2, 6, 3)
    first, second = policy.replay(steps, setting), policy.replay(steps, setting)
    assert (first.us == second.us).all() and (first.hits == second.hits).all()
    assert np.isfinite(first.us).all() and (first.us > 0).all()
    assert (first.hits >= 0).all() and (first.hits <= steps.counts.sum(axis=(1, 2))).all()
