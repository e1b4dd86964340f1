"""What holds between strategies on any machine: an exact choice is never behind a rule that had the same options."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import sample_model
from simulate_samples import random_steps, random_tables

from fiddlerc.simulate import make_setting
from fiddlerc.simulate.caching import FreeToken, HybriMoE
from fiddlerc.simulate.fiddler import Fiddler, FiddlerCode
from fiddlerc.simulate.ours import Ours
from fiddlerc.simulate.whole_layers import KTransformers, ZeroInfinity

SLACK = 1 + 1e-6  # tables are float32

seeds = st.integers(0, 2**32 - 1)
experts = st.integers(2, 8)
tokens = st.integers(1, 24)


@settings(max_examples=60)
@given(seeds, experts, tokens)
def test_ours_is_never_behind_a_rule_with_the_same_residents(seed: int, experts: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    setting = make_setting(sample_model(num_experts=experts), random_tables(rng, 2, experts), "cuda")
    setting = replace(setting, resident=setting.popular)
    steps = random_steps(rng, 4, 2, experts, tokens)
    ours = Ours().replay(steps, setting)
    for policy in (Fiddler(), FiddlerCode(), FreeToken()):
        other = policy.replay(steps, setting)
        assert (ours.us <= other.us * SLACK).all(), policy.name
        assert (ours.hits == other.hits).all()


@settings(max_examples=60)
@given(seeds, experts, tokens)
def test_splitting_never_costs(seed: int, experts: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    spec, tables = sample_model(num_experts=experts, intermediate_size=512), random_tables(rng, 2, experts)
    steps = random_steps(rng, 4, 2, experts, tokens)
    whole, parted = (Ours().replay(steps, make_setting(spec, tables, "cuda", on)).us for on in ((), ("split",)))
    assert (parted <= whole * SLACK).all()


@settings(max_examples=60)
@given(seeds, experts, tokens)
def test_more_memory_never_costs_those_who_place_by_popularity(seed: int, experts: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    setting = make_setting(sample_model(num_experts=experts), random_tables(rng, 2, experts), "cuda")
    everything = replace(setting, resident=np.ones_like(setting.resident))
    steps = random_steps(rng, 4, 2, experts, tokens)
    # A resident expert is never slower than a copied one; by how much it beats the CPU depends on the machine.
    gpu_is_faster = (setting.latencies.gpu_us <= setting.latencies.cpu_us).all()
    for policy in (FiddlerCode(), ZeroInfinity()):
        before, after = policy.replay(steps, setting).us, policy.replay(steps, everything).us
        if gpu_is_faster or policy.name == "deepspeed-mii":
            entries = 2 * (setting.latencies.gpu_overhead_us - setting.latencies.cpu_overhead_us)
            assert (after <= before * SLACK + max(0.0, entries)).all(), policy.name


@settings(max_examples=60)
@given(seeds, experts, tokens)
def test_hybrimoes_greedy_lanes_are_within_all_on_one_side(seed: int, experts: int, tokens: int) -> None:
    """With nothing cached at the start, a layer takes no longer than all on a CPU that copies slow down."""
    rng = np.random.default_rng(seed)
    tables = replace(random_tables(rng, 2, experts), resident=np.zeros((2, experts), np.uint8))
    setting = make_setting(sample_model(num_experts=experts), tables, "cuda")
    steps = random_steps(rng, 1, 2, experts, tokens)
    rest = setting.rest_us(steps.tokens, steps.kv)
    greedy, cpu = HybriMoE().replay(steps, setting).us - rest, KTransformers().replay(steps, setting).us - rest
    assert (greedy <= cpu * (1 + setting.latencies.contention) * SLACK).all()


@settings(max_examples=30)
@given(seeds)
def test_the_popular_are_as_many_as_the_budget_and_none_left_out_is_more_popular(seed: int) -> None:
    rng = np.random.default_rng(seed)
    setting = make_setting(sample_model(num_experts=7), random_tables(rng, 4, 7), "cuda")
    chosen = setting.popular
    assert chosen.sum() == setting.resident.sum() == setting.slots.sum()
    if chosen.any() and not chosen.all():
        assert setting.popularity[chosen].min() >= setting.popularity[~chosen].max()
