"""Seconds of each configuration under each strategy, as `fiddlerc predict` would have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fiddler_runtime.plan import Plan
from fiddlerc import trace as tracing
from fiddlerc.ir import Scenario, Steps, Trace
from fiddlerc.simulate.policy import Policy
from fiddlerc.simulate.predict import plan_setting
from fiddlerc.simulate.setting import Setting
from fiddlerc.simulate.workload import beam_steps, decode_steps, heldout, prompt_steps

from .configurations import Configuration
from .strategies import Contender

Predicted = dict[str, dict[str, float]]
"""Seconds of the whole configuration, the prompt included, by strategy and label."""


def predict(
    plan: Plan, trace: Trace | None, contenders: Sequence[Contender], wanted: Sequence[Configuration]
) -> Predicted:
    """Replays the trace; without one, tokens drawn from the plan's popularity (uniform, as random routers choose)."""
    header, tables = plan.header, plan.tables
    popularity = tables.popularity.astype(np.float64)
    sampled = tracing.sample_steps(trace, popularity, header.model, header.options)
    steps = {scenario: heldout(part) for scenario, part in sampled.items()}
    setting = plan_setting(header, tables)
    return {
        contender.name: {c.label: _seconds(contender.policy, c, steps, setting) for c in wanted}
        for contender in contenders
    }


def _seconds(policy: Policy, wanted: Configuration, steps: dict[Scenario, Steps], setting: Setting) -> float:
    prompt = prompt_steps(steps, wanted.prompt, policy.chunk_tokens)
    if wanted.scenario == "beam":  # transformers computes the prompt once for every beam
        prompt = dataclasses.replace(
            prompt, counts=prompt.counts * wanted.beams, tokens=prompt.tokens * wanted.beams, kv=prompt.kv
        )
        rest = beam_steps(steps["decode"], wanted.beams, policy.beams_together)
    else:
        rest = decode_steps(steps["decode"], wanted.prompt, max(1, wanted.new - 1))
    us = policy.replay(prompt, setting).us.sum()
    if wanted.new > 1:  # the prompt's step gives the first token
        us += policy.replay(rest, setting).us[: wanted.new - 1].sum()
    return float(us) / 1e6
