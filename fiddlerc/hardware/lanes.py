"""What is timed: the CPU's generated kernel, and the accelerator's compute queue and copy engine, as in the engine.

Weights are random and rotated, so that they come from where they will come from when a model runs.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from fiddler_runtime import arena
from fiddler_runtime.errors import FiddlerWarning
from fiddler_runtime.kernels import KernelLibrary, Kernels, make_pointers
from fiddler_runtime.lanes.accelerator import AcceleratorLanes
from fiddler_runtime.lanes.device import Device, UnpackedExpert
from fiddler_runtime.lanes.generated_kernels import SIMULATED, kernels_on
from fiddler_runtime.lanes.kernel_choice import DEFAULT, recorded
from fiddler_runtime.lanes.resident_kernels import ExpertKernels
from fiddler_runtime.lanes.routing import Share, route
from fiddler_runtime.lanes.streamed import StreamedLane
from fiddler_runtime.machine import Machine
from fiddler_runtime.makespan import CPU
from fiddler_runtime.plan import ExpertForm
from fiddler_runtime.store import ExpertStore

from .sampling import Timed

_BF16 = torch.bfloat16
_ATTENTION_S = 3e-4  # about a layer's attention of a small model
_NARROW = 64  # hidden size of a layer that stands for the Python of a model's
ATTENTION_BYTES = 8 << 20  # of a large model, as far as it matters
_TOGETHER = 4  # experts of a layer, where one of so many bytes at most is little work for all threads:
_SMALL_BYTES = 16 << 20
_LEAST_PROBE_BYTES = 256 << 20
_LAUNCHES = 100


def random_weights(nbytes: int, kernels: Kernels | None = None) -> torch.Tensor:
    """bf16 noise of a trained matrix's size, nbytes / 2 elements: a mebibyte of it, over and over (it is quick).

    In the memory that the engine keeps weights in: off huge pages they are read more slowly.
    kernels  whose packed experts these are to be
    """
    pattern = torch.empty(1 << 19).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).to(_BF16)
    out = arena.allocate(nbytes)
    if kernels is not None:
        for packed in out.view(-1, kernels.library.packed_bytes // 2):
            kernels.settle(packed)
    whole = out.numel() // pattern.numel() * pattern.numel()
    out[:whole].view(-1, pattern.numel()).copy_(pattern.expand(whole // pattern.numel(), -1))
    out[whole:].copy_(pattern[: out.numel() - whole])
    return out


def memory_probe(machine: Machine) -> torch.Tensor:
    """What the bandwidth of the host's memory is read off: a quarter of a gibibyte, or eight times the caches."""
    return random_weights(max(_LEAST_PROBE_BYTES, 8 * machine.l3_bytes))


class CpuExpert:
    """One expert in the CPU lane: its share of kernels.moe with a few that every token chose.

    Experts of one layer share threads: several small ones keep them busy where one does not, and layers have several.
    entry_us  of the lane, which a layer pays once
    """

    def __init__(self, kernels: Kernels, copies: int) -> None:
        self._kernels = kernels
        self.entry_us = 0.0
        self._hidden_size = kernels.library.spec.hidden_size
        nbytes = kernels.library.packed_bytes
        self._weights = random_weights(copies * nbytes, kernels)
        addresses = [self._weights.data_ptr() + index * nbytes for index in range(copies)]
        self._experts = _TOGETHER if nbytes <= _SMALL_BYTES else 1
        groups = range(0, max(1, copies - self._experts + 1), self._experts)
        self._pointers = [
            make_pointers([addresses[(first + i) % copies] for i in range(self._experts)]) for first in groups
        ]

    def on(self, kernels: Kernels) -> CpuExpert:
        """The same weights under another build of the same kernels."""
        other = copy.copy(self)
        other._kernels = kernels
        return other

    @property
    def together(self) -> int:
        """Experts that a call has at most."""
        return self._experts

    def timed(self, tokens: int) -> Timed:
        """One expert with that many tokens; microseconds, the lane's entry included."""
        count, entry_us = self._experts, self.entry_us
        layer = self.layer(tokens, count)
        if count == 1:
            return layer
        return lambda index: entry_us + max(0.0, layer(index) - entry_us) / count

    def layer(self, tokens: int, experts: int) -> Timed:
        """A call whose tokens all chose so many experts, `together` at most; 0: one that is not in this lane."""
        hidden = torch.randn(tokens, self._hidden_size).to(_BF16)
        ids = (torch.arange(experts) if experts else torch.tensor([-1])).repeat(tokens, 1)
        weights = torch.ones(ids.shape)
        out = torch.zeros(tokens, self._hidden_size)
        moe, pointers, strategy = self._kernels.moe, self._pointers, np.full(self._experts, CPU, np.uint8)

        def call(index: int) -> float:
            chosen = pointers[index % len(pointers)]
            started = time.perf_counter_ns()
            moe(hidden, ids, weights, chosen, out, strategy)
            return (time.perf_counter_ns() - started) / 1e3

        return call


class AcceleratorExpert:
    """One expert in the accelerator's compute queue: gather, expert, weighting and scatter, as the lanes do it.

    On a GPU each repetition runs `batch` experts and waits once, as a layer does. On a simulated one small experts of a
    layer are one call.
    entry_us  of that call, which a layer pays once
    """

    def __init__(self, device: Device, library: KernelLibrary, copies: int) -> None:
        form = library.spec.expert
        self._device = device
        self._hidden_size = form.hidden_size
        self._batch = 8 if device.kind == "cuda" else 1
        self._experts = _TOGETHER if device.kind == "simulated" and form.packed_bytes <= _SMALL_BYTES else 1
        self.entry_us = 0.0
        where = device.torch_device
        # Those that will run: on a GPU that has not been seen before they are measured here.
        self._kernels = kernels_on(device, library)
        experts = {index: UnpackedExpert.empty(form, where) for index in range(copies)}
        noise = random_weights(form.packed_bytes)
        for expert in experts.values():
            for part in (*expert.matrices, *expert.biases):
                part.view(-1).copy_(noise[: part.numel()])
        self._held = self._kernels.hold(experts)

    @property
    def isa(self) -> str:
        """Of the kernels; torch on a GPU."""
        return self._kernels.isa

    @property
    def together(self) -> int:
        """Experts that a call has at most."""
        return self._experts

    def timed(self, tokens: int, meanwhile: Callable[[int], Timed] | None = None) -> Timed:
        """One expert with that many tokens; microseconds without the lane's entry.

        Meanwhile the calling thread does something else with as many, as it has the CPU lane's work in a layer.
        """
        layer, count, entry_us = self.layer(tokens, self._experts, meanwhile), self._experts, self.entry_us

        def call(index: int) -> float:
            us = layer(index)
            # Entries are measured at another moment: on a busy machine a call may be shorter than one.
            return max(us - entry_us, 0.1 * us) / count

        return call

    def layer(self, tokens: int, experts: int, meanwhile: Callable[[int], Timed] | None = None) -> Timed:
        """A call whose tokens all chose so many experts, `together` at most."""
        run, other = self._repetition(tokens, experts), None if meanwhile is None else meanwhile(tokens)

        def call(index: int) -> float:
            future = self._device.submit(run, index)
            if other is not None:
                other(index)
            return self._device.join(future)

        return call

    def meanwhile(self, timed: Callable[[int], Timed], tokens: int) -> Timed:
        """What the calling thread does with so many tokens while this expert works on as many."""
        run, other = self._repetition(tokens, self._experts), timed(tokens)

        def call(index: int) -> float:
            future = self._device.submit(run, index)
            us = other(index)
            self._device.join(future)
            return us

        return call

    def _repetition(self, tokens: int, experts: int) -> Timed:
        """On the compute queue."""
        where = self._device.torch_device
        hidden = torch.randn(tokens, self._hidden_size).to(_BF16).to(where)
        rows = torch.arange(tokens, device=where)
        scale = torch.ones(tokens, device=where)
        out = torch.zeros(tokens, self._hidden_size, device=where)

        def run(index: int) -> float:
            settle(self._device)
            started = time.perf_counter_ns()
            for step in range(self._batch):
                first = (index * self._batch + step) * experts
                shares = [Share((first + i) % len(self._held.experts), 0, tokens) for i in range(experts)]
                self._kernels.run(hidden, rows, scale, self._held, shares, out)
            settle(self._device)
            return (time.perf_counter_ns() - started) / 1e3 / self._batch

        return run


class Copies:
    """Copies between the host and the accelerator, on its copy engine.

    An expert's copy ends with unpacking, which the copy engine does too; source rotates over at least `rotate_bytes`.
    pageable: the host's memory is not locked for the copies.
    """

    def __init__(self, device: Device, largest_bytes: int, rotate_bytes: int, *, pageable: bool = False) -> None:
        self._device = device
        self._source = random_weights(max(largest_bytes, rotate_bytes))
        self._pin = None if pageable else device.pin(self._source)
        if self._pin is not None and self._pin.bytes < self._source.nbytes:
            warnings.warn(
                "memory may not be locked here: copies to the GPU are measured as slow as the runtime will make them; "
                "hint: ulimit -l unlimited",
                FiddlerWarning,
                stacklevel=3,
            )
            self._pin.undo()

    def close(self) -> None:
        """Lets the host memory go."""
        self._device.synchronize()
        if self._pin is not None:
            self._pin.undo()

    def expert(self, hidden_size: int, intermediate_size: int) -> Timed:
        """Copying one packed expert of that shape to the accelerator, and unpacking it where kernels want that; us."""
        where = self._device.torch_device
        form = ExpertForm(hidden_size, intermediate_size)  # what else there may be to it hardly adds bytes
        elements = form.packed_bytes // 2
        choice = SIMULATED if self._device.kind == "simulated" else recorded(form, where) or DEFAULT
        kernels = ExpertKernels(form, where, choice)
        slot = kernels.slot()
        landing = kernels.landing(slot)
        places = max(1, self._source.numel() // elements)

        def copy(index: int) -> None:
            start = index % places * elements
            landing.copy_(self._source[start : start + elements], non_blocking=True)
            kernels.landed(landing, slot)

        return self._timed(copy)

    def to_device(self, nbytes: int) -> Timed:
        """A plain copy of that many bytes."""
        target = torch.empty(nbytes // 2, dtype=_BF16, device=self._device.torch_device)
        places = max(1, self._source.numel() // target.numel())

        def copy(index: int) -> None:
            start = index % places * target.numel()
            target.copy_(self._source[start : start + target.numel()], non_blocking=True)

        return self._timed(copy)

    def to_host(self, nbytes: int) -> Timed:
        """A plain copy of that many bytes back."""
        source = torch.ones(nbytes // 2, dtype=_BF16, device=self._device.torch_device)
        places = max(1, self._source.numel() // source.numel())

        def copy(index: int) -> None:
            start = index % places * source.numel()
            self._source[start : start + source.numel()].copy_(source, non_blocking=True)

        return self._timed(copy)

    def _timed(self, copy: Callable[[int], None]) -> Timed:
        def run(index: int, times: list[float]) -> None:
            started = time.perf_counter_ns()
            copy(index)
            settle(self._device)
            times.append((time.perf_counter_ns() - started) / 1e3)

        def call(index: int) -> float:
            times: list[float] = []
            started = time.perf_counter_ns()
            ticket = self._device.on_copy_engine(run, index, times)
            if self._device.kind != "simulated":
                return times[0]
            # A thread of its own, which has to wake up and then wakes who waits: that is the lane's time, too.
            ticket.result()
            return (time.perf_counter_ns() - started) / 1e3

        return call


def queue_entry(device: Device, library: KernelLibrary, meanwhile: Timed) -> Timed:
    """What a layer pays once for the accelerator: sorting a token's choices, the hand-off, the lanes without an expert.

    The calling thread goes on to the CPU lane's work meanwhile.
    """
    ids, weights = torch.tensor([[0, 1]]), torch.ones(1, 2)
    counts, strategy = np.ones(2, np.int32), np.full(2, CPU, np.uint8)
    hidden = torch.zeros(1, library.spec.hidden_size, dtype=_BF16)
    kernels = kernels_on(device, library)
    nothing = ExpertStore(({},), ({},), (), [])
    lanes = AcceleratorLanes(device, nothing, kernels, StreamedLane(device, kernels, prefetch=False))

    def call(index: int) -> float:
        started = time.perf_counter_ns()
        routing = route(ids, weights, counts, strategy, device.send)
        future = lanes.submit(0, hidden.to(device.torch_device).contiguous(), routing)
        meanwhile(index)
        came = time.perf_counter_ns()
        _, done = lanes.join(future)
        settle(device)
        return ((time.perf_counter_ns() if done > came else done) - started) / 1e3

    return call


def launches(device: Device) -> Timed:
    """Giving the compute queue one operation on four bytes, of a hundred in a row; then the queue is waited for."""
    target = torch.zeros(1, device=device.torch_device)

    def run(_: int) -> float:
        settle(device)
        started = time.perf_counter_ns()
        for _ in range(_LAUNCHES):
            target.add_(1.0)
        return (time.perf_counter_ns() - started) / 1e3 / _LAUNCHES

    return lambda index: device.join(device.submit(run, index))


def after_attention(
    timed: Timed, tokens: int, hidden_size: int, where: torch.device, displaced: int = ATTENTION_BYTES
) -> Timed:
    """The same, each time after what a layer's attention over so many tokens leaves behind.

    `displaced` bytes of the caches are others', a lane's threads are asleep, and where attention runs on the CPU,
    torch's threads spin: for some milliseconds each keeps a CPU that a lane's thread would like to wake up on. The
    lanes' own instructions have left the caches, too, for those of torch's modules.
    """
    others = np.zeros(displaced // 4, np.float32)
    hidden = torch.randn(tokens, hidden_size).to(where, _BF16)
    projection = torch.randn(hidden_size, hidden_size).to(where, _BF16)
    layer = torch.nn.TransformerDecoderLayer(_NARROW, 4, 2 * _NARROW, dropout=0.0).to(where, _BF16)
    router = torch.nn.Linear(_NARROW, 8).to(where, _BF16)
    narrow = torch.randn(tokens, _NARROW).to(where, _BF16)

    @torch.no_grad()
    def call(index: int) -> float:
        np.add(others, 1.0, out=others)
        until = time.perf_counter() + _ATTENTION_S
        while True:
            torch.softmax(router(layer(narrow, narrow)).float(), dim=-1).topk(2)
            F.linear(hidden, projection)[0, 0].item()  # on a GPU: until it is done
            if time.perf_counter() >= until:
                break
        return timed(index)

    return call


@contextmanager
def beside(timed: Timed | None) -> Iterator[None]:
    """While something else is measured, does that again and again in a thread of its own; nothing if None."""
    if timed is None:
        yield
        return
    stop = threading.Event()

    def work() -> None:
        index = 0
        while not stop.is_set():
            timed(index)
            index += 1

    thread = threading.Thread(target=work, name="fiddler-other-lane", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def mean(one: Timed, other: Timed) -> Timed:
    """Both in turn: the mean of their microseconds."""
    return lambda index: (one(index) + other(index)) / 2


def settle(device: Device) -> None:
    """Waits for what the current queue was given. On the CPU everything has happened already."""
    if device.kind == "cuda":
        torch.cuda.current_stream(device.torch_device).synchronize()


def accelerator_read_gbps(device: Device, nbytes: int) -> float:
    """Memory bandwidth of a GPU: the best of copies within its memory, which read and write each byte once."""
    source = torch.ones(nbytes // 2, dtype=_BF16, device=device.torch_device)
    target = torch.empty_like(source)

    def run() -> float:
        started = time.perf_counter_ns()
        target.copy_(source)
        settle(device)
        return 2 * nbytes / (time.perf_counter_ns() - started)

    return max(device.join(device.submit(run)) for _ in range(10))


def accelerator_peak_gflops(device: Device, size: int) -> float:
    """The best rate of a bf16 matrix product of that size, in the compute queue."""
    a = torch.randn(size, size).to(_BF16).to(device.torch_device)
    b, out = a.t().contiguous(), torch.empty_like(a)

    def run() -> float:
        started = time.perf_counter_ns()
        torch.matmul(a, b, out=out)
        settle(device)
        return 2 * size**3 / (time.perf_counter_ns() - started)

    return max(device.join(device.submit(run)) for _ in range(10))
