"""Which of the runtime's abilities pay on this machine, with this placement: what a plan switches on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from fiddler_runtime.plan import Feature

from ..ir import ModelSpec, Objective, Scenario, Steps, Tables
from .ours import experts_us
from .setting import Setting, make_setting
from .workload import heldout

LEAST_GAIN = 0.02
"""A feature is switched on from this saving of expert time on."""


def features(
    spec: ModelSpec, tables: Tables, accelerator: str, steps: dict[Scenario, Steps], objective: Objective
) -> tuple[Feature, ...]:
    """The gain of splitting experts, and of prefetch on top of what was decided on splitting.

    accelerator  its kind; without one there is nothing to gain. The simulated one gets no parts of experts: the
                 generated kernels that compute there know whole ones only, so that a part is unpacked for torch first
    steps        of all scenarios; the held-out ones are replayed
    A gain is the share of the steps' expert time that is saved. The objective's scenario decides (balanced: their
    mean).
    """
    split = Feature("split", False, 0.0, 0.0, 0.0)
    if accelerator == "none":
        return split, replace(split, name="prefetch")
    setting = make_setting(spec, tables, accelerator)
    held = {scenario: heldout(sampled) for scenario, sampled in steps.items()}
    plain = {scenario: _total_us(sampled, setting) for scenario, sampled in held.items()}

    if accelerator != "simulated":
        splitting = make_setting(spec, tables, accelerator, ["split"])
        parted = {scenario: _total_us(sampled, splitting) for scenario, sampled in held.items()}
        split = _feature("split", plain, parted, objective)
        if split.on:
            setting, plain = splitting, parted
    fetching = replace(setting, prefetch=tables.prefetch)
    fetched = {scenario: _total_us(sampled, fetching) for scenario, sampled in held.items()}
    return split, _feature("prefetch", plain, fetched, objective)


def _feature(
    name: Literal["split", "prefetch"],
    before: dict[Scenario, float],
    after: dict[Scenario, float],
    objective: Objective,
) -> Feature:
    gains = {s: round(1.0 - after[s] / before[s], 4) if before[s] else 0.0 for s in before}
    weighed = math.fsum(gains.values()) / len(gains) if objective == "balanced" else gains[objective]
    return Feature(name, weighed >= LEAST_GAIN, gains["decode"], gains["prefill"], gains["beam"])


def _total_us(steps: Steps, setting: Setting) -> float:
    return math.fsum(experts_us(steps, setting)[0].tolist())
