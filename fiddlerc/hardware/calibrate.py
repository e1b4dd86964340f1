"""Measuring this machine: docs/calibration.md says what is measured and how."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import numpy as np
import torch

from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.kernels import KernelLibrary, Kernels, warn_of_far_memory
from fiddler_runtime.lanes.device import Device, open_device
from fiddler_runtime.machine import Machine, cpu_lane_threads, lane_cpus, this_machine
from fiddler_runtime.plan import packed_bytes
from fiddler_runtime.progress import Progress

from ..ir import Calibration, Limits, Quantity
from .catalog import SCHEMA
from .lanes import (
    ATTENTION_BYTES,
    AcceleratorExpert,
    Copies,
    CpuExpert,
    accelerator_peak_gflops,
    accelerator_read_gbps,
    after_attention,
    beside,
    launches,
    mean,
    memory_probe,
    queue_entry,
)
from .regimes import same_regime, split_regimes
from .sampling import ATTEMPTS, Guard, Point, Timed, repeat, samples, sizes_within

Shape = tuple[int, int]
ByTokens = Callable[[int], Timed]

_MIB = 1 << 20
_UNKNOWN_CACHE = 32 * _MIB  # taken for the last-level cache where the system does not tell its size
# One-token experts of 9 MB read at 52 GB/s when rotated over twice a 32 MB cache, and at 39 over four times it:
# replacement is not least-recently-used, so part of them was still there.
_BEYOND = 4
# Beyond the second-level caches of GPUs to date (A100 40 MB, H100 50 MB, RTX 4090 72 MB).
_GPU_CACHE = 160 * _MIB
_COPY_BYTES = 64 * _MIB  # enough for a link's full rate
PROBE_MS = 2.0
_TORCH_SPINS_S = 0.02  # longer than torch's threads spin after their last work: they would look like other load
_WARM_UP = 1000  # more than any number of rotated experts that are small enough for this to matter
_COPY_HIDDEN = 512  # hidden size of the made-up experts that copies of other sizes are measured with
_BUSY_TOKENS = 16  # work of a lane that only has to be busy: calls long enough not to compete for Python's lock
_CONTENTION_TOKENS = 3  # how many token counts, the smallest, are measured again while copies run


@dataclass(frozen=True)
class ModelBytes:
    """Where a model's weights lie when it runs: experts, all of them; attention, what is not experts of one layer."""

    experts: int
    attention: int


@dataclass(frozen=True)
class Effort:
    """How much is measured. seconds are for each quantity of each shape, shared by its sizes."""

    tokens: tuple[int, ...]
    copy_widths: tuple[int, ...]
    seconds: float
    rounds: int
    least: int
    most: int


QUICK = Effort((1, 2, 4, 8, 16, 32, 64, 128, 256), (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 2.5, 2, 2, 4000)
FULL = Effort(
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    20.0,
    4,
    2,
    20000,
)


def measure(
    kernels_by_shape: Mapping[Shape, KernelLibrary],
    *,
    quick: bool,
    accelerator: Literal["auto", "cuda", "simulated", "none"] = "auto",
    models: Mapping[Shape, ModelBytes] | None = None,
    name: str,
    source: str,
    progress: Progress | None = None,
) -> Calibration:
    """Measures this machine with the generated kernels of the given (hidden_size, intermediate_size) shapes.

    accelerator  "auto" is the GPU, or where there is none the simulated one
    models       the model that a shape is of: weights rotate over as many bytes as it has, at most four times the
                 last-level caches, beyond which little changes, and its attention displaces as many from them, at
                 most 8 MiB. A shape without one is a large model's: weights come from memory
    source       who measured, when and how; a sentence about disturbed points is added to it
    Nothing is written; interrupting it leaves nothing behind.
    Raises FiddlerError if no shape is given or the accelerator asked for is absent.
    """
    if not kernels_by_shape:
        raise FiddlerError("no expert shape to measure", expected="one or more", hint="fiddlerc calibrate -o hw.json")
    # The smallest experts first: the lanes' entries, which are measured with them, matter there.
    kernels_by_shape = dict(sorted(kernels_by_shape.items(), key=lambda item: packed_bytes(*item[0])))
    machine = this_machine(accelerator)
    effort = QUICK if quick else FULL
    session = _Session(effort, machine, len(kernels_by_shape), progress)
    threads = cpu_lane_threads(machine.cores, machine.accelerator.kind)
    cache = rotated_bytes(machine)

    with open_device(machine.accelerator.kind) as device:
        where = device.torch_device
        first = next(iter(kernels_by_shape.values()))
        limits = _limits(session, first, threads, device, cache, quick)
        call_us = 0.0  # of the accelerator's entry: that of its call
        session.step("limits")
        copied: set[int] = set()
        for shape, library in kernels_by_shape.items():
            model = (models or {}).get(shape, ModelBytes(cache, ATTENTION_BYTES))
            rotated = min(cache, model.experts)
            session.displaced = displaced_bytes(model, machine)
            with library.open(None, threads, cpus=lane_cpus(threads), beside_torch=device.kind == "none") as kernels:
                session.watch(kernels)
                # Weights that lie in a cache are read at the same rate whatever the memory does.
                session.kernels = kernels if rotated > machine.l3_bytes else None
                cpu = CpuExpert(kernels, rotated_copies(packed_bytes(*shape), rotated, machine))
                if library is first:
                    limits = replace(limits, cpu_entry_us=_cpu_entry(session, cpu, shape[0], where))
                cpu.entry_us = limits.cpu_entry_us
                if device.kind == "none":
                    session.experts("cpu_expert", shape, cpu.timed, threads, kernels.isa, where)
                    continue
                gpu = AcceleratorExpert(
                    device,
                    library,
                    rotated_copies(packed_bytes(*shape), _rotated_there(device, rotated), machine),
                )
                if library is first:
                    call_us = _gpu_entry(session, gpu, shape[0], where)
                    limits = replace(limits, gpu_entry_us=round(limits.gpu_entry_us + call_us, 3))
                gpu.entry_us = call_us
                lanes: tuple[ByTokens, ByTokens] = cpu.timed, gpu.timed
                if device.kind == "simulated" and session.kernels is not None:
                    lanes = _shared(cpu, gpu)
                on_cpu, on_gpu = lanes
                tokens = session.experts("cpu_expert", shape, on_cpu, threads, kernels.isa, where)
                _contention(session, device, shape, on_cpu, cache, tokens, kernels)
                if device.kind == "cuda":  # whose own memory has one bandwidth
                    session.kernels = None
                session.experts("gpu_expert", shape, on_gpu, 1, gpu.isa, where)
                session.kernels = None
                if library is first:
                    _launch(session, device)
                # The simulated copy engine is one thread more on those cores.
                busy = device.kind == "simulated"
                with (
                    beside(cpu.timed(_BUSY_TOKENS) if busy else None),
                    beside(gpu.timed(_BUSY_TOKENS) if busy else None),
                ):
                    _copies(session, device, shape, rotated, copied)
                del cpu, gpu, lanes, on_cpu, on_gpu
    regimes = split_regimes(session.reads)
    limits = replace(
        limits,
        cpu_read_gbps=regimes.fast_gbps,
        cpu_read_slow_gbps=regimes.slow_gbps,
        cpu_slow_share=regimes.slow_share,
    )
    if session.disturbed:
        disturbed = f"other load disturbed {session.disturbed} of {session.points} points"
        warnings.warn(f"{disturbed}: they may be too slow", FiddlerWarning, stacklevel=2)
        source += f"; {disturbed}"
    return Calibration(SCHEMA, name, "measured", source, machine, limits, samples(session.taken, regimes), ())


class _Session:
    """What every measurement shares: the effort, guards against other load, what was measured so far, and progress.

    taken       the points, in the order of their measurement
    reads       the memory's bandwidth, GB/s, again and again
    kernels     whose measurements depend on the memory's bandwidth, or None
    displaced   bytes that attention displaces from caches
    """

    def __init__(self, effort: Effort, machine: Machine, shapes: int, progress: Progress | None) -> None:
        self.effort = effort
        self.points = self.disturbed = 0
        self.taken: list[Point] = []
        self.reads: list[float] = []
        self.kernels: Kernels | None = None
        self.displaced = ATTENTION_BYTES
        self._guard: Guard | None = None
        self.probed = memory_probe(machine)
        self._progress = progress
        self._done = 0
        # Contention and copies count as one step each; experts as one per round.
        accelerator = machine.accelerator.kind != "none"
        self._total = 1 + shapes * (effort.rounds * (2 if accelerator else 1) + (2 if accelerator else 0))

    def watch(self, kernels: Kernels) -> None:
        """Takes these kernels' peak as the sign of an undisturbed machine."""
        self._count()

        def probe() -> float:
            time.sleep(_TORCH_SPINS_S)
            return kernels.peak_gflops(PROBE_MS)

        self._guard = Guard(probe)

    def read_memory(self, kernels: Kernels) -> float:
        """The memory's bandwidth now, GB/s."""
        self.reads.append(kernels.read_gbps(self.probed))
        return self.reads[-1]

    def at_one_bandwidth(self, measure: Callable[[], list[float]]) -> tuple[float | None, list[float]]:
        """Times of a measurement, and the memory's bandwidth around it; again if that changed meanwhile.

        None where the times do not depend on host memory.
        """
        if self.kernels is None:
            return None, measure()
        for _ in range(ATTEMPTS):
            before = self.read_memory(self.kernels)
            times = measure()
            after = self.read_memory(self.kernels)
            if same_regime(before, after):
                break
        return (before + after) / 2, times

    def _count(self) -> None:
        if self._guard is not None:
            self.points += self._guard.points
            self.disturbed += self._guard.disturbed
            self._guard.points = self._guard.disturbed = 0

    def guarded(self, measure: Callable[[], list[float]]) -> list[float]:
        """Times of a measurement, repeated while other load disturbs it."""
        assert self._guard is not None
        times = self._guard(measure)
        self._count()
        return times

    def step(self, label: str) -> None:
        """Tells that a step is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(f"calibrating: {label}", self._done, self._total)

    def experts(
        self,
        quantity: Quantity,
        shape: Shape,
        timed: ByTokens,
        threads: int,
        isa: str,
        where: torch.device,
    ) -> tuple[int, ...]:
        """One expert over token counts; returns the counts that fitted into the time.

        Sizes take turns over several rounds, so that a machine's slow drift touches all of them alike.
        """
        effort = self.effort
        label = f"{quantity.replace('_', ' ')} {shape[0]} x {shape[1]}"
        calls: dict[int, Timed] = {}

        def once(tokens: int) -> float:
            calls[tokens] = after_attention(timed(tokens), tokens, shape[0], where, self.displaced)
            calls[tokens](0)  # touches its buffers
            return calls[tokens](1)

        tokens = sizes_within(effort.tokens, once, effort.seconds, effort.rounds * effort.least)
        slot = effort.seconds / effort.rounds / len(tokens)
        most = -(-effort.most // effort.rounds)
        nbytes = packed_bytes(*shape)
        for _ in range(effort.rounds):
            for n in tokens:
                # One turn through the rotated weights first: what fits into a cache is then there.
                repetition = partial(repeat, calls[n], seconds=slot, least=effort.least, most=most, warm_up=_WARM_UP)
                gbps, times = self.at_one_bandwidth(partial(self.guarded, repetition))
                self.taken.append(Point(quantity, shape, n, nbytes, threads, isa, times, gbps))
            self.step(label)
        return tokens


def _limits(session: _Session, library: KernelLibrary, threads: int, device: Device, cache: int, quick: bool) -> Limits:
    """The machine's ceilings. Each is the best of several probes: what it can do, not what it did on average.

    The host memory's is known in the end, when it has been read often, and the CPU lane's entry with its experts.
    """
    probes = 5 if quick else 20
    read = 0.0, 0.0, 0.0
    with library.open(None, threads, cpus=lane_cpus(threads), beside_torch=device.kind == "none") as kernels:
        if not kernels.settle_probed(session.probed):
            warn_of_far_memory("the bytes that are read to learn the bandwidth")
        for _ in range(probes):
            session.read_memory(kernels)
        peak = max(kernels.peak_gflops(4 * PROBE_MS) for _ in range(probes))
        hidden = library.spec.hidden_size
        lane = CpuExpert(kernels, 1)
        if device.kind != "none":
            entry = queue_entry(device, library, lane.timed(1))
            gpu_entry = _median(after_attention(entry, 1, hidden, device.torch_device))
    if device.kind == "none":
        return Limits(threads, *read, peak, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if device.kind == "simulated":
        with library.open(None, 1) as kernels:
            gpu_read = max(kernels.read_gbps(session.probed) for _ in range(probes))
            gpu_peak = max(kernels.peak_gflops(4 * PROBE_MS) for _ in range(probes))
    else:
        gpu_read, gpu_peak = accelerator_read_gbps(device, 1 << 30), accelerator_peak_gflops(device, 8192)
    copies = Copies(device, _COPY_BYTES, cache)
    try:
        to_device, to_host = copies.to_device(_COPY_BYTES), copies.to_host(_COPY_BYTES)
        down = _COPY_BYTES / 1e3 / min(repeat(to_device, seconds=0.2, least=5, most=50))
        up = _COPY_BYTES / 1e3 / min(repeat(to_host, seconds=0.2, least=5, most=50))
    finally:
        copies.close()
    return Limits(threads, *read, peak, gpu_read, gpu_peak, down, up, 0.0, gpu_entry)


def _shared(cpu: CpuExpert, gpu: AcceleratorExpert) -> tuple[ByTokens, ByTokens]:
    """One expert in the CPU lane, and one on an accelerator that reads the same memory: these slow each other down.

    Half of the repetitions while the other lane has an expert, too, half alone: layers have work for both, or for one.
    """

    def on_cpu(tokens: int) -> Timed:
        return mean(gpu.meanwhile(cpu.timed, tokens), cpu.timed(tokens))

    def on_gpu(tokens: int) -> Timed:
        return mean(gpu.timed(tokens, cpu.timed), gpu.timed(tokens))

    return on_cpu, on_gpu


def _cpu_entry(session: _Session, cpu: CpuExpert, hidden_size: int, where: torch.device) -> float:
    """What a layer of one token pays once: where a line through its times with one, two, ... experts begins.

    At least a call without any, in which no thread has to wake up; that alone for experts beside which it is nothing.
    """
    none, *some = _by_experts(
        session, cpu.layer, range(cpu.together + 1 if cpu.together > 1 else 1), hidden_size, where
    )
    return round(max(none, _begin(some) if some else none), 3)


def _gpu_entry(session: _Session, gpu: AcceleratorExpert, hidden_size: int, where: torch.device) -> float:
    """The same of the accelerator's own call, where several experts are one."""
    if gpu.together == 1:
        return 0.0
    return max(0.0, _begin(_by_experts(session, gpu.layer, range(1, gpu.together + 1), hidden_size, where)))


def _begin(layers_us: list[float]) -> float:
    """Where a line through layers with one, two, ... experts begins."""
    return float(np.polyfit(range(1, len(layers_us) + 1), layers_us, 1)[1])


def _by_experts(
    session: _Session, layer: Callable[[int, int], Timed], counts: range, hidden_size: int, where: torch.device
) -> list[float]:
    """Microseconds of a layer of one token with so many experts, which take turns."""
    calls = [after_attention(layer(1, count), 1, hidden_size, where, session.displaced) for count in counts]
    times: list[list[float]] = [[] for _ in counts]

    def turn(index: int) -> float:
        for call, found in zip(calls, times, strict=True):
            found.append(call(index))
        return 0.0

    repeat(turn, seconds=0.2 * len(calls), least=20, most=500, warm_up=5)
    return [statistics.median(found) for found in times]


def _contention(
    session: _Session,
    device: Device,
    shape: Shape,
    timed: ByTokens,
    cache: int,
    tokens: tuple[int, ...],
    kernels: Kernels,
) -> None:
    """The CPU's expert again, at its smallest sizes, where it is bound by memory, while the copy engine is busy.

    The peak probe does not guard it: on a machine whose cores are all in use the copies themselves lower the peak.
    """
    effort, tokens = session.effort, tokens[:_CONTENTION_TOKENS]
    nbytes = packed_bytes(*shape)
    slot = effort.seconds / 4 / effort.rounds / len(tokens)
    calls = {n: after_attention(timed(n), n, shape[0], device.torch_device, session.displaced) for n in tokens}
    copies = Copies(device, nbytes, cache)

    def while_copying(n: int) -> list[float]:
        with beside(copies.expert(*shape)):
            return repeat(calls[n], seconds=slot, least=effort.least, most=effort.most, warm_up=_WARM_UP)

    try:
        for _ in range(effort.rounds):
            for n in tokens:
                gbps, times = session.at_one_bandwidth(partial(while_copying, n))
                session.taken.append(
                    Point("cpu_expert_while_copying", shape, n, nbytes, kernels.threads, kernels.isa, times, gbps)
                )
    finally:
        copies.close()
    session.step("CPU while copying")


def _copies(session: _Session, device: Device, shape: Shape, rotated: int, copied: set[int]) -> None:
    """Copies of this shape's packed expert and of other sizes, and activations back. `copied`: sizes that are done.

    An expert's copy includes unpacking it, as in the streamed lane's copy engine.
    """
    hidden, intermediate = shape
    # Down to an eighth of the shape's own expert: a copy's rate depends on its size, and w is wanted at this one.
    widths = (max(1, intermediate // part) for part in (1, 2, 4, 8))
    sizes = {packed_bytes(hidden, width): (hidden, width) for width in widths}
    for width in session.effort.copy_widths:
        sizes.setdefault(packed_bytes(_COPY_HIDDEN, width), (_COPY_HIDDEN, width))
    sizes = {nbytes: of for nbytes, of in sorted(sizes.items()) if nbytes not in copied}
    copied.update(sizes)
    slot = session.effort.seconds / 2 / max(1, len(sizes))
    for nbytes, of in sizes.items():
        copies, slow = Copies(device, nbytes, rotated), None
        try:
            ways = [("host_to_device", copies.expert(*of)), ("device_to_host", copies.to_host(nbytes))]
            if device.kind == "cuda":  # elsewhere no memory is locked for copies
                slow = Copies(device, nbytes, rotated, pageable=True)
                ways.append(("host_to_device_pageable", slow.expert(*of)))
            for quantity, timed in ways:
                repetition = partial(repeat, timed, seconds=slot / 2, least=3, most=session.effort.most)
                times = session.guarded(repetition)
                session.taken.append(Point(cast(Quantity, quantity), (0, 0), 0, nbytes, 1, "", times))
        finally:
            for opened in (copies, slow):
                if opened is not None:
                    opened.close()
    session.step("copies")


def _launch(session: _Session, device: Device) -> None:
    """What is paid for an operation given to the accelerator."""
    times = session.guarded(partial(repeat, launches(device), seconds=0.2, least=20, most=500, warm_up=5))
    session.taken.append(Point("launch", (0, 0), 0, 4, 1, "", times))


def rotated_bytes(machine: Machine) -> int:
    """Bytes that weights rotate over, so that they come from memory."""
    return _BEYOND * (machine.l3_bytes or _UNKNOWN_CACHE)


def displaced_bytes(model: ModelBytes, machine: Machine) -> int:
    """Bytes that a layer's attention displaces from caches: its weights, and always what cores' own caches hold."""
    return min(ATTENTION_BYTES, max(model.attention, machine.l2_bytes * machine.cores))


def rotated_copies(nbytes: int, rotate_bytes: int, machine: Machine) -> int:
    """How many experts of that size to rotate over: `rotate_bytes` of them, in at most a quarter of the memory."""
    return max(1, min(-(-rotate_bytes // nbytes), machine.memory_bytes // 4 // nbytes))


def _rotated_there(device: Device, rotated: int) -> int:
    """Bytes that weights rotate over on the accelerator. A GPU's cache is its own; a simulated one's is the CPU's."""
    return max(rotated, _GPU_CACHE) if device.kind == "cuda" else rotated


def _median(timed: Timed) -> float:
    return round(statistics.median(repeat(timed, seconds=0.2, least=20, most=500, warm_up=5)), 3)
