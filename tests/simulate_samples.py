"""Settings and steps small enough to check a strategy by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from plan_samples import sample_model, sample_tables

from fiddlerc.ir import ModelSpec, Scenario, Steps, Tables
from fiddlerc.simulate import Setting, make_setting


def steps_of(counts: npt.ArrayLike, scenario: Scenario = "decode", kv: int = 0, top_k: int = 2) -> Steps:
    """Steps of one sequence with these counts [steps, layers, experts]; every token chooses top_k experts."""
    array = np.asarray(counts, np.int32)
    number = len(array)
    return Steps(
        scenario=scenario,
        counts=array,
        tokens=np.maximum(1, array[:, 0].sum(axis=1) // top_k).astype(np.int32),
        kv=np.full(number, kv, np.int32),
        heldout=np.zeros(number, np.bool_),
    )


def random_steps(rng: np.random.Generator, number: int, layers: int, experts: int, tokens: int) -> Steps:
    """Top-2 routing of `tokens` tokens a step."""
    counts = np.zeros((number, layers, experts), np.int32)
    for step in range(number):
        for layer in range(layers):
            chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :2]
            counts[step, layer] = np.bincount(chosen.ravel(), minlength=experts)
    return steps_of(counts, "decode" if tokens == 1 else "beam")


def sample_setting(
    accelerator: str = "cuda", features: tuple[str, ...] = (), spec: ModelSpec | None = None, **tables: Any
) -> Setting:
    """That of the sample plan: c(n) = 10 n, g(n) = 5 + n / 100, w = 25, c0 = 1, g0 = 2, gamma = 0.1; two layers."""
    return make_setting(spec or sample_model(), sample_tables(**tables), accelerator, features)


def random_tables(rng: np.random.Generator, layers: int, experts: int) -> Tables:
    """Increasing curves, any of the three places may be the best."""
    tokens = np.arange(66, dtype=np.int32)
    per_token = rng.uniform(0.1, 4, 2)
    popularity = rng.dirichlet(np.ones(experts), layers)
    return sample_tables(
        tokens=tokens,
        cpu_us=np.where(tokens > 0, rng.uniform(1, 60) + per_token[0] * tokens, 0).astype(np.float32)[None],
        gpu_us=np.where(tokens > 0, rng.uniform(1, 5) + 0.1 * per_token[1] * tokens, 0).astype(np.float32),
        rest_us=np.where(tokens > 0, 50 + tokens, 0).astype(np.float32),
        scalars_us=np.array([1, 2, rng.uniform(1, 120)], np.float32),
        contention=np.array([rng.uniform(0, 0.5)], np.float32),
        prefetch=rng.integers(-1, experts, (layers, experts, 2)).astype(np.int16),
        resident=(rng.random((layers, experts)) < 0.3).astype(np.uint8),
        popularity=popularity.astype(np.float32),
    )
