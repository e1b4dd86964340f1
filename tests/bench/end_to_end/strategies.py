"""The strategies that are measured: who computes a layer's experts, what that takes of memory, who predicts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fiddler_runtime import Engine
from fiddler_runtime.lanes.device import open_device
from fiddler_runtime.machine import AcceleratorKind
from fiddler_runtime.makespan import priced
from fiddler_runtime.plan import ModelSpec, Plan
from fiddler_runtime.progress import Progress
from fiddlerc.ir import Steps
from fiddlerc.simulate.fiddler import Fiddler
from fiddlerc.simulate.fiddler import FiddlerCode as FiddlerCodePolicy
from fiddlerc.simulate.ours import Ours
from fiddlerc.simulate.policy import Policy, StepTimes, Strategy
from fiddlerc.simulate.predict import plan_setting
from fiddlerc.simulate.setting import Setting
from fiddlerc.simulate.whole_layers import KTransformers

from .algorithm1 import Algorithm1
from .fiddler_code import FiddlerCode
from .models import Model
from .transformers_streamed import SLOTS, TransformersStreamed


@dataclass(frozen=True)
class Machine:
    """Where strategies run. threads: of every CPU lane, whatever else the strategy uses."""

    kind: AcceleratorKind
    threads: int


@dataclass(frozen=True)
class Contender:
    """One strategy.

    open    (model, plan, machine, progress) -> what has moe(), counters(), reset_counters() and close() as an Engine
    policy  its simulation
    host    (spec, residents) -> bytes of experts in host memory;  device: on the accelerator
    capture decode steps are captured
    """

    name: str
    what: str
    open: Callable[[Model, Plan, Machine, Progress | None], Any]
    policy: Policy
    host: Callable[[ModelSpec, int], int]
    device: Callable[[ModelSpec, int], int]
    needs_accelerator: bool = True
    capture: bool = False


def _engine(model: Model, plan: Plan, machine: Machine, progress: Progress | None, **options: Any) -> Engine:
    options = {"device": machine.kind, **options}
    return Engine(plan, model.weights(), threads=machine.threads, progress=progress, **options)


def _ours(model: Model, plan: Plan, machine: Machine, progress: Progress | None) -> Engine:
    return _engine(model, plan, machine, progress)


def _fiddler(model: Model, plan: Plan, machine: Machine, progress: Progress | None) -> Engine:
    """Placed by popularity, without what our plan adds."""
    tables = dataclasses.replace(plan.tables, resident=_popular(plan).astype(np.uint8))
    header = dataclasses.replace(plan.header, features=())
    theirs = dataclasses.replace(plan, header=header, tables=tables)
    return _engine(model, theirs, machine, progress, dispatcher=Algorithm1)


def _fiddler_code(model: Model, plan: Plan, machine: Machine, progress: Progress | None) -> FiddlerCode:
    device = open_device(machine.kind)
    return FiddlerCode(model.spec, _popular(plan), model.weights(), device, machine.threads, progress)


def _transformers(model: Model, plan: Plan, machine: Machine, progress: Progress | None) -> TransformersStreamed:
    module = model.their_experts()
    return TransformersStreamed(model.spec, model.weights(), open_device(machine.kind), module, progress)


def _streamed(model: Model, plan: Plan, machine: Machine, progress: Progress | None) -> Engine:
    return _engine(model, plan, machine, progress, strategies=("streamed",))


def _cpu(model: Model, plan: Plan, machine: Machine, progress: Progress | None) -> Engine:
    return _engine(model, plan, machine, progress, device="none", strategies=("cpu",))


def _popular(plan: Plan) -> Any:
    return plan_setting(plan.header, plan.tables).popular


@dataclass(frozen=True)
class AllCopied(Strategy):
    """All experts of every layer, chosen or not, are copied ahead of the computing."""

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        lat = setting.latencies
        gpu = np.where(steps.counts > 0, setting.gpu_us(steps.counts), 0.0).sum(axis=2) + lat.gpu_overhead_us
        attention = setting.rest_us(steps.tokens, steps.kv) / setting.layers
        sent, finish = setting.spec.num_experts * lat.stream_us, np.zeros(len(steps.tokens))
        for layer in range(setting.layers):
            finish = np.maximum(finish + attention, (layer + 1) * sent) + gpu[:, layer]
        return StepTimes(finish, np.zeros(len(finish), np.int64))


@dataclass(frozen=True)
class ChosenCopied(Strategy):
    """Ours, allowed nothing but copying."""

    def replay(self, steps: Steps, setting: Setting) -> StepTimes:
        """See StepTimes."""
        nobody = np.zeros_like(setting.resident)
        forced = priced(dataclasses.replace(setting.latencies, rows=0), ("streamed",))
        return Ours().replay(steps, dataclasses.replace(setting, latencies=forced, resident=nobody, prefetch=None))


def _packed_misses(spec: ModelSpec, residents: int) -> int:
    return (spec.total_experts - residents) * spec.expert.packed_bytes


def _staged(spec: ModelSpec, residents: int) -> int:
    return residents * spec.expert_bytes + spec.staging_bytes()


CONTENDERS: tuple[Contender, ...] = (
    Contender(
        "ours", "this project: dispatch by makespan", _ours, Ours(), _packed_misses, _staged, needs_accelerator=False
    ),
    Contender(
        "captured",
        "the same, decode steps captured, in which nothing is streamed",
        _ours,
        Ours(),
        _packed_misses,
        _staged,
        capture=True,
    ),
    Contender("fiddler", "Fiddler's Algorithm 1, our kernels and lanes", _fiddler, Fiddler(), _packed_misses, _staged),
    Contender(
        "fiddler-code",
        "Fiddler as published: its rule, torch's CPU kernels, one expert after another",
        _fiddler_code,
        FiddlerCodePolicy(),
        lambda spec, residents: (spec.total_experts - residents) * spec.expert_bytes,
        lambda spec, residents: (residents + 1) * spec.expert_bytes,
    ),
    Contender(
        "transformers",
        "transformers' own experts, all weights of a layer streamed",
        _transformers,
        AllCopied("transformers"),
        lambda spec, residents: spec.total_experts * spec.expert_bytes,
        lambda spec, residents: min(SLOTS, len(spec.moe_layers)) * spec.num_experts * spec.expert_bytes,
    ),
    Contender(
        "streamed",
        "the chosen experts streamed, our lanes",
        _streamed,
        ChosenCopied("streamed"),
        lambda spec, residents: _packed_misses(spec, 0),
        lambda spec, residents: _staged(spec, 0),
    ),
    Contender(
        "cpu",
        "all experts on the CPU, our kernels",
        _cpu,
        KTransformers(),
        lambda spec, residents: _packed_misses(spec, 0),
        lambda spec, residents: 0,
        needs_accelerator=False,
    ),
)
"""Ours first."""
NAMES = tuple(contender.name for contender in CONTENDERS)


def usable(names: Sequence[str], kind: AcceleratorKind) -> tuple[list[Contender], list[str]]:
    """Those asked for that this machine has the devices for, and the names of the others."""
    asked = [contender for contender in CONTENDERS if contender.name in names]
    found = [contender for contender in asked if kind != "none" or not contender.needs_accelerator]
    return found, [contender.name for contender in asked if contender not in found]
