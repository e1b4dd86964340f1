"""Tokens per second of our strategy and the literature's, on one plan."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fiddler_runtime.plan import Header
from fiddler_runtime.progress import Progress

from ..ir import CurveSummary, PolicyResult, Prediction, Scenario, Steps, Tables
from .caching import FreeToken, HybriMoE, MixtralOffloading
from .fiddler import Fiddler, FiddlerCode
from .ours import Ours
from .policy import Policy
from .setting import Setting, make_setting
from .whole_layers import KTransformers, LlamaCpp, ZeroInfinity
from .workload import Workload, beam_steps, decode_steps, heldout, prompt_steps

POLICIES: tuple[Policy, ...] = (
    Ours(),
    Fiddler(),
    FiddlerCode(),
    LlamaCpp(),
    ZeroInfinity(),
    MixtralOffloading(),
    MixtralOffloading(name="mixtral-offloading-code", swaps=True),
    KTransformers(),
    HybriMoE(),
    FreeToken(),
)
"""Ours first."""

_DIGITS = 4  # significant: more would claim what no model of a machine knows


def predict(
    header: Header,
    tables: Tables,
    steps: dict[Scenario, Steps],
    workload: Workload,
    progress: Progress | None = None,
    policies: tuple[Policy, ...] = POLICIES,
) -> Prediction:
    """Replays sampled steps (the held-out ones) under every strategy that the machine has the devices for.

    decode_tokens_per_s  output tokens over the time of their steps, the cache growing from the input on
    ttft_s               the prompt's steps;  beam_tokens_per_s: steps of the search per second, so tokens of one beam
    hit_rate             of the decode steps' choices

    With two memory regimes the results are those of the one seen most. `interval` are factors on our decode time with
    every latency curve at the lower, or upper, end of its interval at once: wider than 90 % if their errors are
    independent. An interval of sizes held out says nothing of what was never measured, so then there is none.
    """
    setting, steps = plan_setting(header, tables), {scenario: heldout(part) for scenario, part in steps.items()}
    usable = [policy for policy in policies if setting.has_accelerator or not policy.needs_accelerator]
    results = []
    for index, policy in enumerate(usable):
        if progress is not None:
            progress("predicting", index, len(usable))
        results.append(predict_policy(policy, steps, setting, workload))
    if progress is not None:
        progress("predicting", len(usable), len(usable))

    regimes = None
    if len(tables.regime_shares) > 1:
        fast, slow = (_decode(policies[0], steps, plan_setting(header, tables, row), workload)[0] for row in (0, 1))
        regimes = (_round(slow), _round(fast))
    unmeasured = _unmeasured(header)
    interval = None
    if not unmeasured:
        low, likely, high = (
            1.0 / _decode(policies[0], steps, plan_setting(header, scaled), workload)[0]
            for scaled in (_scaled(tables, header, "low"), tables, _scaled(tables, header, "high"))
        )
        interval = (_round(low / likely), _round(high / likely))
    return Prediction(tuple(results), regimes, interval, unmeasured)


def _unmeasured(header: Header) -> tuple[str, ...]:
    """Quantities that a step takes on this machine without samples of this model's own shapes."""
    needed = ["cpu_expert", "rest_of_step"]
    if header.hardware.machine.accelerator.kind != "none":
        needed[1:1] = ["gpu_expert", "host_to_device"]
    measured = {curve.quantity for curve in header.latency if curve.samples and curve.interpolated}
    return tuple(quantity for quantity in needed if quantity not in measured)


def plan_setting(header: Header, tables: Tables, regime: int | None = None) -> Setting:
    """A plan's setting with its features, in one regime."""
    on = [feature.name for feature in header.features if feature.on]
    return make_setting(header.model, tables, header.hardware.machine.accelerator.kind, on, regime)


def predict_policy(policy: Policy, steps: dict[Scenario, Steps], setting: Setting, workload: Workload) -> PolicyResult:
    """All three scenarios under one strategy."""
    rate, hit_rate = _decode(policy, steps, setting, workload)
    beams = beam_steps(steps["decode"], workload.beam_width, policy.beams_together)
    searched = len(beams.tokens) // (1 if policy.beams_together else workload.beam_width)
    return PolicyResult(
        policy=policy.name,
        kernels=policy.kernels,
        decode_tokens_per_s=_round(rate),
        ttft_s=_round(prefill_s(policy, steps, setting, workload.prefill_tokens)),
        prefill_tokens=workload.prefill_tokens,
        beam_tokens_per_s=_round(searched / _seconds(policy, beams, setting)),
        beam_width=workload.beam_width,
        hit_rate=_round(hit_rate),
    )


def prefill_s(policy: Policy, steps: dict[Scenario, Steps], setting: Setting, tokens: int) -> float:
    """Time to the first token of a prompt of so many tokens."""
    return _seconds(policy, prompt_steps(steps, tokens, policy.chunk_tokens), setting)


def _decode(policy: Policy, steps: dict[Scenario, Steps], setting: Setting, workload: Workload) -> tuple[float, float]:
    """Tokens per second and the hit rate."""
    replayed = decode_steps(steps["decode"], workload.input_tokens, workload.output_tokens)
    times = policy.replay(replayed, setting)
    seconds = math.fsum(times.us.tolist()) / 1e6
    return workload.output_tokens / seconds, int(times.hits.sum()) / int(replayed.counts.sum())


def _seconds(policy: Policy, steps: Steps, setting: Setting) -> float:
    return math.fsum(policy.replay(steps, setting).us.tolist()) / 1e6


def _scaled(tables: Tables, header: Header, end: str) -> Tables:
    """All latencies at one end of their intervals."""

    by_quantity: dict[str, CurveSummary] = {curve.quantity: curve for curve in header.latency}

    def factor(quantity: str) -> np.float32:
        curve = by_quantity.get(quantity)  # without an accelerator there are none of its
        return np.float32(1.0 if curve is None else curve.interval_low if end == "low" else curve.interval_high)

    rest = factor("rest_of_step")
    scalars = tables.scalars_us * np.array([1, 1, factor("host_to_device")], np.float32)
    return replace(
        tables,
        cpu_us=tables.cpu_us * factor("cpu_expert"),
        gpu_us=tables.gpu_us * factor("gpu_expert"),
        scalars_us=scalars,
        rest_us=tables.rest_us * rest,
        rest_kv_us=tables.rest_kv_us * rest,
    )


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
