"""Entering the CPU lane from a GPU's stream: which way there is on this machine. Never run on a GPU by this project."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

from ..errors import FiddlerError, FiddlerWarning
from ..lanes.device import captured_into
from ..lanes.driver import Driver
from .entry import Entry, HostFunction, StreamFlags
from .native import Mailbox

_PROBE_LOOKS = 10_000
_LOOK_S = 1e-4

_abandoned: list[object] = []
"""Memory that a GPU may be waiting for: it is never given back."""


def open_entry(device: torch.device) -> Entry:
    """Stream memory operations where the driver has them and a captured graph carries them out, else host functions.

    Warns (FiddlerWarning) for the latter, with the reason. Raises FiddlerError if there is no driver.
    """
    driver = Driver()

    def flags() -> StreamFlags:
        return StreamFlags(driver, lambda: int(torch.cuda.current_stream(device).cuda_stream))

    def functions() -> HostFunction:
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return HostFunction(
            driver,
            lambda: int(beside.cuda_stream),
            fork=lambda: beside.wait_stream(torch.cuda.current_stream(device)),
            merge=lambda: torch.cuda.current_stream(device).wait_stream(beside),
        )

    return choose(driver, device.index or 0, flags, functions, lambda entry: probe(entry, device))


def choose(
    driver: Driver,
    ordinal: int,
    flags: Callable[[], StreamFlags],
    functions: Callable[[], HostFunction],
    probe: Callable[[StreamFlags], str | None],
) -> Entry:
    """The decision of `open_entry`, with its means. probe: why a captured graph does not carry flags out, or None."""
    version = driver.version()
    reason: str | None = f"the driver, CUDA {version // 1000}.{version % 1000 // 10}, has none for this GPU"
    if driver.has_memory_operations(ordinal):
        entry = flags()
        reason = probe(entry)
        if reason is None:
            return entry
    warnings.warn(
        f"captured steps enter the CPU lane through host functions, which take longer: no stream memory operations "
        f"({reason})",
        FiddlerWarning,
        stacklevel=4,
    )
    return functions()


def probe(entry: StreamFlags, device: torch.device) -> str | None:
    """None if a captured graph writes a flag that the host sees, and waits for one that the host writes; else why not.

    Raises FiddlerError if the GPU keeps waiting for a flag that was written: then nothing can be run on it any more.
    """
    mailbox = Mailbox(1, 1, 1)
    flags = mailbox.memory.view(torch.int32)
    asked, answered = flags[:1], flags[(mailbox.answered - mailbox.asked) // 4 :][:1]
    try:
        entry.prepare(mailbox)
        graph = torch.cuda.CUDAGraph()
        with captured_into(graph, device):
            entry.ask(0)
            entry.answer(0)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        graph.replay()
        done.record(torch.cuda.current_stream(device))
    except (RuntimeError, FiddlerError) as error:
        entry.close()
        return str(error).splitlines()[0]
    seen = _within_looks(lambda: int(asked) == 1)
    early = bool(done.query())  # type: ignore[no-untyped-call]
    answered.fill_(1)
    if not _within_looks(lambda: bool(done.query())):  # type: ignore[no-untyped-call]
        _abandoned.append((entry, mailbox, graph))
        raise FiddlerError(
            "the GPU waits for a flag that was written, and does not see it",
            found=f"no answer in {_PROBE_LOOKS * _LOOK_S:g} s",
            expected="host memory that is coherent with the GPU",
            hint="load the model without capture",
        )
    entry.close()
    if not seen:
        return "a captured write did not reach the host"
    return "a captured wait did not wait" if early else None


def _within_looks(happened: Callable[[], bool]) -> bool:
    """Whether it happens while it is looked for. By looks, not by a clock: that goes on while a process is stopped."""
    for _ in range(_PROBE_LOOKS):
        if happened():
            return True
        time.sleep(_LOOK_S)
    return False
