"""torch.cuda for machines without a GPU: streams, events and graphs that do what they are given at once, on the CPU.

So the code of the CUDA lanes runs, with its calls in order. That streams overlap, and that they wait for each other
where they must, only a GPU can show (tests/gpu). Only a graph's replay runs beside the caller, as it waits for flags.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver

from fiddler_runtime.captured import cuda as captured_cuda
from fiddler_runtime.lanes import device as device_module
from fiddler_runtime.lanes import recording
from fiddler_runtime.lanes.driver import Driver

CPU = torch.device("cpu")


class FakeCuda:
    """Installed by `install`. log: what streams and events were given, in order.

    refuse_capture  what a capture raises, if anything
    free            bytes that mem_get_info reports as free
    """

    def __init__(self, fake: FakeDriver) -> None:
        self.fake = fake
        self.log: list[tuple[Any, ...]] = []
        self.refuse_capture: str | None = None
        self.free = 1 << 40
        self.capturing = False
        self.streams: list[Any] = []
        self.running: list[threading.Thread] = []


class _Driver(Driver):
    """The fake driver as a stream sees it: nothing is carried out while it is captured; torch's operations wait."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(cuda.fake.path)
        self._cuda = cuda

    def write_value(self, stream: int, address: int, value: int) -> None:
        if not self._cuda.capturing:
            super().write_value(stream, address, value)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        if not self._cuda.capturing:
            super().wait_value(stream, address, value)
            self._cuda.fake.synchronize()

    def launch_host_function(self, stream: int, function: int, argument: int) -> None:
        if not self._cuda.capturing:
            super().launch_host_function(stream, function, argument)
            self._cuda.fake.synchronize()


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeDriver) -> FakeCuda:
    """Puts it in torch.cuda's place. Devices that are opened then compute on the CPU."""
    cuda = FakeCuda(fake)
    current = threading.local()

    class Stream:
        def __init__(self, device: Any = None) -> None:
            cuda.streams.append(self)
            self.number = len(cuda.streams)

        @property
        def cuda_stream(self) -> int:
            return fake.stream

        def wait_event(self, event: Any) -> None:
            cuda.log.append(("wait", self.number, event.number))

        def wait_stream(self, other: Any) -> None:
            cuda.log.append(("follow", self.number, other.number))

        def synchronize(self) -> None:
            cuda.log.append(("synchronize", self.number))

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.number = Event.count
            self._of: threading.Thread | None = None
            self._recorded = False

        def record(self, stream: Any = None) -> None:
            self._recorded = True
            self._of = cuda.running[-1] if cuda.running else None
            cuda.log.append(("record", self.number, (stream or current_stream()).number))

        def query(self) -> bool:
            return self._of is None or not self._of.is_alive()

        def synchronize(self) -> None:
            assert self._recorded, "an event that was never recorded is past at once"
            cuda.log.append(("arrived", self.number))

    class Graph:
        operations: list[Any]

        def replay(self) -> None:
            def work() -> None:
                with torch.inference_mode():
                    for function, args, kwargs, targets in self.operations:
                        results = function(*args, **kwargs)
                        leaves = torch.utils._pytree.tree_leaves(results)
                        for target, result in zip(targets, leaves, strict=False):
                            if target is not None:
                                target.copy_(result)

            thread = threading.Thread(target=work, daemon=True)
            cuda.running.append(thread)
            thread.start()

    @contextmanager
    def graph(target: Graph, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        """As torch's (2.13): a capture that fails leaves its stream the current one."""
        assert capture_error_mode == "thread_local"
        before = current_stream()
        current.stream = Stream()
        if cuda.refuse_capture is not None:
            raise RuntimeError(cuda.refuse_capture)
        target.operations = recording._thread.operations = []
        cuda.capturing = True
        try:
            with recording._Recorder():
                yield
            current.stream = before
        finally:
            cuda.capturing = False
            recording._thread.operations = None

    @contextmanager
    def stream_context(stream: Stream) -> Iterator[None]:
        before = current_stream()
        current.stream = stream
        try:
            yield
        finally:
            current.stream = before

    def current_stream(device: Any = None) -> Stream:
        if not hasattr(current, "stream"):
            current.stream = Stream()
        return current.stream

    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": stream_context,
        "current_stream": current_stream,
        "mem_get_info": lambda device=None: (cuda.free, 1 << 40),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: cuda.log.append(("empty_cache",)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    class OnCpu(device_module.CudaDevice):
        def __init__(self) -> None:
            super().__init__()
            self.torch_device = CPU

        def _has(self, tensor: torch.Tensor) -> bool:
            return True

    monkeypatch.setattr(device_module, "CudaDevice", OnCpu)
    monkeypatch.setattr(device_module, "Driver", lambda: _Driver(cuda))
    monkeypatch.setattr(captured_cuda, "Driver", lambda: _Driver(cuda))
    monkeypatch.setattr(device_module, "_locked", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    return cuda
