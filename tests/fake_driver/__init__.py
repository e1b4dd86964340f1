"""Builds tests/fake_driver/driver.c, and hands it to the runtime in place of NVIDIA's driver."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from fiddler_runtime.captured.entry import HostFunction, StreamFlags
from fiddler_runtime.lanes.driver import Driver
from fiddler_runtime.lanes.recording import perform

WRITES, WAITS, CALLS = range(3)


class FakeDriver:
    """A built fake driver with one stream. `driver` is the runtime's wrapper of it; native: its fake_ functions."""

    def __init__(self, folder: Path, *defines: str) -> None:
        self.path = folder / "libfake.so"
        source = Path(__file__).with_name("driver.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
            + [f"-D{name}" for name in defines]
            + [str(source), "-o", str(self.path)],
            check=True,
        )
        self.driver = Driver(self.path)
        self.native = ctypes.CDLL(str(self.path))
        self.native.fake_stream_open.restype = ctypes.c_void_p
        for name in ("synchronize", "close"):
            getattr(self.native, f"fake_stream_{name}").argtypes = (ctypes.c_void_p,)
        self.native.fake_lock_limit.argtypes = (ctypes.c_size_t,)
        self.native.fake_registered.restype = ctypes.c_size_t
        self.native.fake_calls.restype = ctypes.c_uint64
        self.stream = int(self.native.fake_stream_open())

    def synchronize(self) -> None:
        """Waits for the stream, without the GIL."""
        self.native.fake_stream_synchronize(self.stream)

    def flags(self) -> StreamFlags:
        """Stream memory operations on the stream, for the simulated device: its own queue waits with the stream."""
        fake = self

        class Flags(StreamFlags):
            def answer(self, row: int) -> None:
                super().answer(row)
                perform(fake.synchronize)

        return Flags(self.driver, lambda: self.stream)

    def functions(self) -> HostFunction:
        """Host functions on the stream, alike."""
        return HostFunction(
            self.driver, lambda: self.stream, fork=lambda: None, merge=lambda: perform(self.synchronize)
        )

    def close(self) -> None:
        """Ends the stream's thread."""
        self.native.fake_stream_close(self.stream)
