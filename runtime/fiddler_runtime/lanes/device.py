"""The accelerator as the lanes see it: a compute queue and a copy engine that run beside the caller.

Three kinds. `cuda` is an NVIDIA GPU: two streams. `simulated` is one core of the CPU, in threads of its own: the
same decisions, data movement and waiting without a GPU; nothing timed on it is a GPU figure. `none` has no queue.
"""

from __future__ import annotations

import concurrent.futures
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeVar

import torch

from ..errors import FiddlerError, FiddlerWarning
from ..machine import AcceleratorKind, require_cuda
from ..plan import ExpertForm
from .driver import Driver
from .expert import UnpackedExpert, run_expert, unpack_expert, unpack_expert_into
from .pinning import Pin, lock
from .recording import CannotCapture, Recording
from .transfers import HostBuffers
from .worker import Worker

__all__ = [
    "CannotCapture",
    "Device",
    "Ticket",
    "UnpackedExpert",
    "open_device",
    "run_expert",
    "unpack_expert",
    "unpack_expert_into",
]

R = TypeVar("R")
Ticket = Any
"""A moment in a queue that another queue can wait for: a Future, a CUDA event, or None (already past)."""


class Launched(ABC):
    """Captured work on its way."""

    @abstractmethod
    def wait(self, seconds: float) -> bool:
        """Whether it is done, after waiting for it for at most so long. Raises what it raised."""


class Graph(ABC, Generic[R]):
    """Work that was captured once and is launched again without Python: on the same memory, with the same shapes.

    result  what the captured function returned; each launch overwrites its tensors
    """

    result: R

    @abstractmethod
    def launch(self) -> Launched:
        """Starts it, after what the caller's current stream has been given; returns at once."""


class Device(ABC):
    """A compute queue and a copy engine, each in order, concurrent with each other and with the caller.

    Work on the compute queue is a function given to `submit`. It may call `copy`, `on_copy_engine`, `wait` and `mark`;
    the caller may call `submit`, `join`, `copy` and `synchronize`.
    """

    kind: AcceleratorKind
    torch_device: torch.device

    @abstractmethod
    def submit(self, fn: Callable[..., R], *args: Any) -> Future[R]:
        """Queues fn(*args) for the compute queue, after what the caller's current stream has been given."""

    @abstractmethod
    def join(self, future: Future[R]) -> R:
        """The result of submitted work, raising its exception; the caller may use the tensors it wrote."""

    @abstractmethod
    def on_copy_engine(self, fn: Callable[..., None], *args: Any, after: Ticket = None) -> Ticket:
        """Queues fn(*args) for the copy engine, after that ticket; returns at once."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket = None) -> Ticket:
        """Starts dst <- src on the copy engine, after that ticket; returns at once.

        src must stay alive and unchanged until the ticket is past.
        """
        return self.on_copy_engine(_copy, dst, src, after=after)

    @abstractmethod
    def wait(self, ticket: Ticket) -> None:
        """Inside submitted work: what follows starts after the ticket. Raises what the copy engine raised."""

    @abstractmethod
    def mark(self) -> Ticket:
        """Inside submitted work: a ticket that is past when everything before it has run."""

    @abstractmethod
    def capture(self, fn: Callable[[], R]) -> tuple[Graph[R], Launched]:
        """fn() as a graph, and its first run, launched. fn's work goes to the current stream and depends on no value.

        Raises CannotCapture for what cannot be captured; some of fn may have been run then, on a simulated device.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until both queues are empty. Raises what the last copy raised."""

    def pin(self, tensor: torch.Tensor, *, unit_bytes: int | None = None, mapped: bool = False) -> Pin:
        """Makes host memory fast to copy from, where that means something, and as far as the system permits.

        unit_bytes  what is copied at a time, from multiples of that on; default: anything
        mapped      the tensor is a file, mapped read-only
        """
        return Pin(tensor.nbytes, _nothing)

    def room(self, form: ExpertForm) -> UnpackedExpert:
        """Memory on the accelerator for an expert. Raises torch.OutOfMemoryError."""
        return UnpackedExpert.empty(form, self.torch_device)

    def free_bytes(self) -> int | None:
        """What is left of the accelerator's memory; None if that is the host's."""
        return None

    def release(self) -> None:  # noqa: B027
        """Gives memory that nothing uses any more back to the accelerator."""

    def to_host(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Ticket]:
        """A contiguous copy of tensor in host memory, and the ticket after which it is there (`arrived`).

        It is valid until the next one of that name. Called from the caller's thread.
        """
        if tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous():
            return tensor, None
        return tensor.to(device="cpu", dtype=dtype).contiguous(), None

    def arrived(self, ticket: Ticket) -> None:  # noqa: B027
        """The caller waits for a ticket of `to_host`."""

    def host_room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory, uninitialised, that `to_device` is fast from; valid until the next one of that name."""
        return torch.empty(shape, dtype=dtype)

    def to_device(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copies what is in the host_room of that name to the accelerator, in the caller's stream; returns at once."""
        return tensor.to(self.torch_device)

    def send(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copies any host memory to the accelerator, in the caller's stream; returns at once."""
        return self.to_device(name, tensor)

    @abstractmethod
    def close(self) -> None:
        """Finishes what is queued and ends the threads. Calling it again does nothing."""

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_device(kind: Literal["auto", "cuda", "simulated", "none"] = "auto") -> Device:
    """Opens the accelerator. auto: the GPU if there is one, else the simulated one.

    Raises FiddlerError if cuda is asked for and absent. Warns (FiddlerWarning) for cuda: see CudaDevice.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "simulated"
    if kind == "cuda":
        return CudaDevice()
    if kind == "simulated":
        return SimulatedDevice()
    if kind == "none":
        return NoDevice()
    raise FiddlerError("unknown device", found=repr(kind), expected="auto, cuda, simulated or none")


class SimulatedDevice(Device):
    """One CPU core: a thread for the compute queue and one for the copy engine."""

    kind: AcceleratorKind = "simulated"

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._compute = Worker("fiddler-simulated-compute")
        self._copies = Worker("fiddler-simulated-copy")
        # torch keeps the number of threads per thread *and* as the default of threads that come later. The first
        # is wanted, the second not: so the caller's own number is set again after the two threads have set theirs.
        callers = torch.get_num_threads()
        for worker in (self._compute, self._copies):
            worker.submit(_use_one_thread).result()
        torch.set_num_threads(callers)
        self._last_copy: Future[None] | None = None

    def submit(self, fn: Callable[..., R], *args: Any) -> Future[R]:
        return self._compute.submit(_without_grad, fn, args)

    def join(self, future: Future[R]) -> R:
        return future.result()

    def on_copy_engine(self, fn: Callable[..., None], *args: Any, after: Ticket = None) -> Ticket:
        # `after` is always past: the compute queue is synchronous, so mark() returns None.
        self._last_copy = self._copies.submit(_without_grad, fn, args)
        return self._last_copy

    def wait(self, ticket: Ticket) -> None:
        if ticket is not None:
            ticket.result()

    def mark(self) -> Ticket:
        return None

    def capture(self, fn: Callable[[], R]) -> tuple[Graph[R], Launched]:
        recording = self._compute.submit(_without_grad, Recording, (fn,)).result()
        graph = _RecordedGraph(recording, self._compute)
        return graph, _Past()

    def synchronize(self) -> None:
        self._compute.submit(_nothing).result()
        if self._last_copy is not None:
            self._last_copy.result()

    def close(self) -> None:
        self._compute.close()
        self._copies.close()


class CudaDevice(Device):
    """An NVIDIA GPU: a compute stream fed by a thread of its own, so that launching overlaps the CPU lane, and a copy
    stream. Host memory is registered with the driver (`pin`) so that copies are asynchronous.

    No test of this project has run it on a GPU: opening it warns so.
    """

    kind: AcceleratorKind = "cuda"

    def __init__(self) -> None:
        require_cuda()
        warnings.warn(
            "the CUDA lanes have never been run on a GPU by this project: compare the output with transformers'",
            FiddlerWarning,
            stacklevel=3,
        )
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._compute = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._launcher = Worker("fiddler-cuda-launch")
        self._driver = Driver()
        self._sent: dict[str, torch.cuda.Event] = {}
        self._buffers = HostBuffers(_locked)

    def submit(self, fn: Callable[..., R], *args: Any) -> Future[R]:
        before = torch.cuda.Event()  # type: ignore[no-untyped-call]
        before.record(torch.cuda.current_stream(self.torch_device))
        return self._launcher.submit(self._launch, before, fn, args)

    def _launch(self, before: torch.cuda.Event, fn: Callable[..., R], args: tuple[Any, ...]) -> R:
        self._compute.wait_event(before)
        with torch.cuda.stream(self._compute):
            try:
                return _without_grad(fn, args)
            except RuntimeError as error:
                if "ALLOC_FAILED" in str(error):  # cuBLAS, whose own memory torch does not count
                    raise torch.OutOfMemoryError(str(error)) from error
                raise

    def join(self, future: Future[R]) -> R:
        try:
            return future.result()
        finally:
            # After an error too: what was launched before it still reads the caller's tensors, whose memory the
            # caller's stream may be given again as soon as they are let go.
            torch.cuda.current_stream(self.torch_device).wait_stream(self._compute)

    def on_copy_engine(self, fn: Callable[..., None], *args: Any, after: Ticket = None) -> Ticket:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            _without_grad(fn, args)
            done.record(self._copies)
        return done

    def wait(self, ticket: Ticket) -> None:
        if ticket is not None:
            self._compute.wait_event(ticket)

    def mark(self) -> Ticket:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._compute)
        return event

    def capture(self, fn: Callable[[], R]) -> tuple[Graph[R], Launched]:
        graph = _CudaGraph(fn, self.torch_device)
        return graph, graph.launch()

    def synchronize(self) -> None:
        self._launcher.submit(_nothing).result()
        self._copies.synchronize()
        self._compute.synchronize()

    def pin(self, tensor: torch.Tensor, *, unit_bytes: int | None = None, mapped: bool = False) -> Pin:
        if mapped:
            # Pinning would read the whole file into memory at once, and keep it there.
            return Pin(tensor.nbytes, _nothing)
        # Not pin_memory(): torch's allocator rounds up to a power of two, nearly doubling a large arena. Not torch's
        # cudaHostRegister: a refusal would be the next kernel's error, as nothing in torch takes the runtime's last
        # error back.
        return lock(tensor, unit_bytes or tensor.nbytes, self._driver.register, self._driver.unregister)

    def free_bytes(self) -> int | None:
        free = int(torch.cuda.mem_get_info(self.torch_device)[0])
        # What torch keeps for itself it gives out again.
        kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + kept

    def release(self) -> None:
        torch.cuda.empty_cache()

    def to_host(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Ticket]:
        if not self._has(tensor):
            return super().to_host(name, tensor, dtype)
        host = self._buffers.take(name, tensor.shape, dtype)
        host.copy_(tensor.to(dtype).contiguous(), non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record(torch.cuda.current_stream(self.torch_device))
        return host, there

    def arrived(self, ticket: Ticket) -> None:
        if ticket is not None:
            ticket.synchronize()

    def host_room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.arrived(self._sent.pop(name, None))  # the copy from it, which another stream may still have before it
        return self._buffers.take(name, shape, dtype)

    def to_device(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.to(self.torch_device, non_blocking=True)
        sent = self._sent[name] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record(torch.cuda.current_stream(self.torch_device))
        return there

    def send(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.to_device(name, self.host_room(name, tuple(tensor.shape), tensor.dtype).copy_(tensor))

    def _has(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.torch_device  # another GPU's streams are not waited for

    def close(self) -> None:
        self._launcher.close()
        # Whoever closes it gives back next what copies may still read: an expert that was fetched ahead in vain. It
        # needs a context of CUDA's in its thread for that, too, which the driver's functions alone would not make.
        self._copies.synchronize()
        self._compute.synchronize()


class NoDevice(Device):
    """No accelerator: everything runs in the CPU lane, and submitting anything is a mistake."""

    kind: AcceleratorKind = "none"

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    @staticmethod
    def _refuse() -> FiddlerError:
        return FiddlerError("there is no accelerator to run on", found="device none", expected="cuda or simulated")

    def submit(self, fn: Callable[..., R], *args: Any) -> Future[R]:
        raise self._refuse()

    def join(self, future: Future[R]) -> R:
        raise self._refuse()

    def on_copy_engine(self, fn: Callable[..., None], *args: Any, after: Ticket = None) -> Ticket:
        raise self._refuse()

    def wait(self, ticket: Ticket) -> None:
        raise self._refuse()

    def mark(self) -> Ticket:
        raise self._refuse()

    def capture(self, fn: Callable[[], R]) -> tuple[Graph[R], Launched]:
        raise self._refuse()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to end."""


class _RecordedGraph(Graph[R]):
    """On the simulated device: in its compute queue."""

    def __init__(self, recording: Recording[R], queue: Worker) -> None:
        self.result = recording.result
        self._recording = recording
        self._queue = queue

    def launch(self) -> Launched:
        return _InQueue(self._queue.submit(self._recording.replay))


class _InQueue(Launched):
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self, seconds: float) -> bool:
        try:
            self._future.result(seconds)
        except concurrent.futures.TimeoutError:
            return False
        return True


class _Past(Launched):
    def wait(self, seconds: float) -> bool:
        return True


class _CudaGraph(Graph[R]):
    """A CUDA graph of fn(), captured on a stream of its own, launched on the caller's."""

    def __init__(self, fn: Callable[[], R], device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        try:
            with captured_into(self._graph, device), torch.inference_mode():
                self.result = fn()
        except RuntimeError as error:  # torch's, for everything that the driver forbids in a capture
            raise CannotCapture("this cannot be captured", found=str(error).splitlines()[0]) from error

    def launch(self) -> Launched:
        self._graph.replay()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return _AfterEvent(done)


@contextmanager
def captured_into(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """What the thread gives its current stream within becomes the graph. Raises RuntimeError for what cannot."""
    # The outer context puts the stream back: torch.cuda.graph (2.13) leaves its own where the capture failed.
    # thread_local: the other threads of the engine may use the device meanwhile.
    with (
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        yield


class _AfterEvent(Launched):
    """By looking: a call that waits for the event could not be left if the stream hung, and would spin on a CPU."""

    _LOOK_S = 5e-5

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self._event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > until:
                return False
            time.sleep(self._LOOK_S)
        return True


def _without_grad(fn: Callable[..., R], args: tuple[Any, ...]) -> R:
    """Gradient mode is per thread, and a queue's threads start with it on."""
    with torch.no_grad():
        return fn(*args)


def _use_one_thread() -> None:
    # Asking first: the first question a thread asks resets its number to the process's default (torch 2.13).
    torch.get_num_threads()
    torch.set_num_threads(1)


def _copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    dst.copy_(src, non_blocking=True)


def _locked(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _nothing() -> None:
    """What undoes nothing, and what marks the end of a queue."""
