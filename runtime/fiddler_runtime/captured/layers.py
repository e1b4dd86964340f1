"""The MoE layers of a captured step: resident experts in the stream, the others in the CPU lane that it enters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..dispatch import Dispatcher
from ..errors import FiddlerError
from ..kernels import Kernels
from ..lanes.accelerator import AcceleratorLanes
from ..lanes.device import CannotCapture, Device, Graph, Launched
from ..store import ExpertStore
from .entry import Entry, ThreadFlags
from .native import Mailbox, NativeStep

R = TypeVar("R")

MOST_TOKENS = 16
"""Of a captured step: a batch of one, and beams up to so many."""
STALL_MS = 30_000
_LOOK_S = 0.2
_GRACE_LOOKS = 25  # so often a step that was given up is waited for


class CapturedLayers:
    """Runs captured steps of one engine, one at a time; of those, `moe` is a layer.

    dispatcher  one that never streams
    resident    the engine's lanes, which compute the residents
    done        called after each step, with what it did
    entry       how the stream enters the CPU lane; default what the device has
    stall_ms    a step without progress for so long is given up, with a FiddlerError
    Raises FiddlerError if the device has no way into the CPU lane.
    """

    def __init__(
        self,
        hidden_size: int,
        top_k: int,
        device: Device,
        store: ExpertStore,
        kernels: Kernels,
        dispatcher: Dispatcher,
        resident: AcceleratorLanes,
        *,
        done: Callable[[NativeStep], None] = lambda _: None,
        entry: Entry | None = None,
        stall_ms: int = STALL_MS,
    ) -> None:
        self._device = device
        self._store = store
        self._top_k = top_k
        self._resident = resident
        self._done = done
        self.entry = _open_entry(device) if entry is None else entry
        mailbox = Mailbox(MOST_TOKENS, hidden_size, top_k)
        self.entry.prepare(mailbox)
        try:
            self.step = NativeStep(
                kernels, dispatcher, store.pointers, mailbox, polled=self.entry.polled, stall_ms=stall_ms
            )
        except BaseException:
            self.entry.close()
            raise
        self.entry.attach(self.step)
        self._within: int | None = None
        self._asked = 0  # layers of the step that is being captured
        self._on_its_way = False  # whether a step has begun that was neither ended nor abandoned
        self._launched: Launched | None = None

    def within(self) -> bool:
        """Whether the calling thread is capturing: its calls of Engine.moe belong here."""
        return self._within == threading.get_ident()

    def moe(self, row: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One layer, within captured work: fp32 [T, H] on the device. Shapes and dtypes as for Engine.moe."""
        tokens, box, device = hidden.shape[0], self.step.mailbox, self._device.torch_device
        if self._asked == 0:
            self.entry.start()
        if self._asked == len(self._store.packed):
            raise CannotCapture("more MoE layers in a step than the model has", found=f"another after {self._asked}")
        self._asked += 1
        there = hidden.to(device=device, dtype=torch.bfloat16).contiguous()
        scale = weights.to(device=device, dtype=torch.float32)
        box.hidden[:tokens].copy_(there, non_blocking=True)
        box.ids[:tokens].copy_(ids, non_blocking=True)
        box.weights[:tokens].copy_(scale, non_blocking=True)
        self.entry.ask(row)
        out = torch.zeros(there.shape, dtype=torch.float32, device=device)
        self._resident.run_masked(row, there, ids.to(device), scale, out)
        self.entry.answer(row)
        return out.add_(box.out[:tokens].to(device, non_blocking=True))

    def capture(self, tokens: int, forward: Callable[[], R]) -> Captured[R]:
        """Captures a step of so many tokens and runs it once.

        Raises CannotCapture for what `forward` may not do; then nothing is in the way of the plain path.
        """

        def work() -> R:
            self._within, self._asked = threading.get_ident(), 0
            try:
                return forward()
            finally:
                self._within = None

        if self._device.kind == "cuda":
            try:
                self._resident.prepare_masked(tokens, self._top_k)
            except torch.OutOfMemoryError as error:
                raise CannotCapture("there is no memory to capture in", found=str(error).splitlines()[0]) from error
        with self._running(tokens):
            graph, launched = self._device.capture(work)
            self._wait(launched)
        captured = Captured(tokens, self._asked, graph)
        self._end(captured)
        return captured

    def replay(self, captured: Captured[R]) -> R:
        """Runs a captured step again; its result is overwritten by the next run."""
        with self._running(captured.tokens):
            self._wait(captured.graph.launch())
        self._end(captured)
        return captured.graph.result

    def _end(self, captured: Captured[R]) -> None:
        self._on_its_way = False
        self.step.end(captured.layers)
        self._done(self.step)

    @contextlib.contextmanager
    def _running(self, tokens: int) -> Iterator[None]:
        self._settle()
        self.step.begin(tokens)
        self._on_its_way, self._launched = True, None
        try:
            yield
        except BaseException:
            # What the step's own status would say is less than this.
            self._settle()
            raise

    def _settle(self) -> None:
        """Serves a step that was broken off, by an interrupt say, to its end, for which its stream waits.

        That takes milliseconds, or until the step is given up. Interrupted again, it is left to the next call.
        """
        if not self._on_its_way:
            return
        if not self.step.failed:
            with contextlib.suppress(Exception):  # who broke it off is told of that, not of what comes of it
                if self._launched is None:  # interrupted while it was captured
                    self._device.synchronize()
                else:
                    self._wait(self._launched)
            self.step.abandon()
        self._on_its_way = False

    def _wait(self, launched: Launched) -> None:
        """Until the stream's end. Raises FiddlerError if the stream does not get there though the step was given up."""
        self._launched = launched
        looks = 0
        while not launched.wait(_LOOK_S):
            looks += self.step.failed
            if looks > _GRACE_LOOKS:
                raise FiddlerError(
                    "a captured step hangs on the accelerator",
                    found=f"no end {looks * _LOOK_S:.0f} s after it was given up",
                    hint="load the model without capture, and end this process: the accelerator's queue is blocked",
                )

    def close(self) -> None:
        """Ends the native threads, after a step that was broken off. Calling it again does nothing."""
        self._settle()
        self.step.close()
        self.entry.close()


@dataclass(frozen=True)
class Captured(Generic[R]):
    """A captured step of so many tokens and MoE layers."""

    tokens: int
    layers: int
    graph: Graph[R]


def _open_entry(device: Device) -> Entry:
    if device.kind == "simulated":
        return ThreadFlags()
    if device.kind == "cuda":
        from .cuda import open_entry

        return open_entry(device.torch_device)
    raise FiddlerError("nothing to capture steps on", found="device none", expected="cuda or simulated")
