"""Entering the CPU lane from a GPU's stream: which way there is on this machine. Never run on a GPU by this project."""

from __future__ import annotations

import time
import warnings

import torch

from ..errors import FiddlerError, FiddlerWarning
from ..lanes.driver import Driver
from .entry import Entry, HostFunction, StreamFlags
from .native import Mailbox

_PROBE_S = 2.0


def open_entry(device: torch.device) -> Entry:
    """Stream memory operations where the driver has them and a captured graph carries them out, else host functions.

    Warns (FiddlerWarning) for the latter, with the reason. Raises FiddlerError if there is no driver.
    """
    driver = Driver()
    reason = f"the driver (CUDA {driver.version() // 1000}.{driver.version() % 1000 // 10}) has none for this GPU"
    if driver.has_memory_operations(device.index or 0):
        flags = StreamFlags(driver, lambda: _handle(torch.cuda.current_stream(device)))
        failure = _probe(flags, device)
        if failure is None:
            return flags
        reason = failure
    warnings.warn(
        f"captured steps enter the CPU lane through host functions, which take longer: no stream memory operations "
        f"({reason})",
        FiddlerWarning,
        stacklevel=3,
    )
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fork() -> None:
        beside.wait_stream(torch.cuda.current_stream(device))

    def merge() -> None:
        torch.cuda.current_stream(device).wait_stream(beside)

    return HostFunction(driver, lambda: _handle(beside), fork, merge)


def _probe(flags: StreamFlags, device: torch.device) -> str | None:
    """None if a captured graph writes a flag that the host sees, and sees the one that the host writes; else why not."""
    mailbox = Mailbox(1, 1, 1)
    asked, answered = (mailbox.memory.view(torch.int32)[at] for at in (0, (mailbox.answered - mailbox.asked) // 4))
    try:
        flags.prepare(mailbox)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            flags.ask(0)
            flags.answer(0)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        graph.replay()
        done.record()
        until = time.monotonic() + _PROBE_S
        while int(asked) != 1 and time.monotonic() < until:
            time.sleep(1e-4)
        seen, early = int(asked) == 1, done.query()
        answered.fill_(1)  # whatever came of it: the stream must not be left waiting
        while not done.query() and time.monotonic() < until + _PROBE_S:
            time.sleep(1e-4)
        if not done.query():
            # The flag stays mapped: a stream may be waiting for it.
            raise FiddlerError(
                "the GPU waits for a flag that was written and does not see it",
                found=f"no answer in {_PROBE_S:g} s",
                expected="host memory that is coherent with the GPU",
                hint="load the model without capture",
            )
        flags.close()
        if not seen or early:
            return "a captured write did not reach the host" if not seen else "a captured wait did not wait"
    except (RuntimeError, FiddlerError) as error:
        if isinstance(error, FiddlerError) and "does not see it" in error.what:
            raise
        flags.close()
        return str(error).splitlines()[0]
    return None


def _handle(stream: torch.cuda.Stream) -> int:
    return int(stream.cuda_stream)
