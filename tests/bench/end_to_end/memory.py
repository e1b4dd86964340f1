"""Whether it fits, before anything large begins; and how much a model of fewer layers gets of the accelerator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import AcceleratorKind, available_bytes
from fiddler_runtime.plan import Options
from fiddler_runtime.reading import BUFFERS
from fiddler_runtime.text import format_bytes
from fiddlerc import placement
from fiddlerc.placement.budget import SLACK

from .models import Model
from .strategies import Contender

_REST_TWICE = 1.2  # transformers' part while it is made, and Python with torch


def budget(model: Model, options: Options, kind: AcceleratorKind) -> tuple[Options, int]:
    """The options and the residents of `model.spec` that correspond to that much memory for the whole model.

    With fewer layers the same share of the experts is resident, not the same number of bytes. Raises FiddlerError if
    the whole model does not fit beside its own other parts.
    """
    if kind == "none":
        return options, 0
    whole = placement.count_memory(model.full, options)
    if model.spec.moe_layers == model.full.moe_layers:
        return options, whole.resident_experts
    share = whole.resident_experts / model.full.total_experts
    wanted = round(share * model.spec.total_experts)
    roomy = placement.count_memory(model.spec, dataclasses.replace(options, gpu_memory_bytes=1 << 50))
    used = sum(item.bytes for item in roomy.items[:-1])  # all but the slack, which is a share of the whole
    least = math.ceil((used + wanted * model.spec.expert_bytes) / (1 - SLACK)) + 2
    scaled = dataclasses.replace(options, gpu_memory_bytes=least)
    found = placement.count_memory(model.spec, scaled).resident_experts
    assert found == wanted, (found, wanted)
    return scaled, wanted


def check(
    model: Model, residents: int, options: Options, contenders: Sequence[Contender], kind: AcceleratorKind
) -> None:
    """Raises FiddlerError, naming the strategy that needs most and how many layers would fit."""
    free = available_bytes()
    spec = model.spec
    if free <= 0:
        return

    def needed(contender: Contender) -> int:
        device = contender.device(spec, residents) if kind != "cuda" else 0
        fixed = _REST_TWICE * spec.non_expert_bytes + options.batch * spec.cache_bytes(options.context)
        return int(contender.host(spec, residents) + device + fixed) + BUFFERS * spec.expert_bytes

    worst = max(contenders, key=needed)
    if needed(worst) <= free:
        return
    fitting = int(free / needed(worst) * spec.num_layers)
    others = [contender.name for contender in contenders if needed(contender) <= free]
    hint = f"--layers {fitting}" if model.random and fitting else "run it on a machine with more memory"
    if others:
        hint += f"; or --only {','.join(others)}"
    raise FiddlerError(
        f"not enough host memory for {spec.name} under the strategy {worst.name}",
        found=f"{format_bytes(free)} free",
        expected=f"{format_bytes(needed(worst))}, most of it its {spec.total_experts} experts in 16 bit",
        hint=hint,
    )
