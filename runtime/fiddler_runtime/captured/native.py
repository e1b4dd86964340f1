"""The generated library's side of a captured step: struct fdl_step_setup and the fdl_step_ functions of abi.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

import numpy as np
import torch

from .. import arena
from ..dispatch import Dispatcher
from ..errors import FiddlerError
from ..kernels import Kernels

_LINE = 128  # bytes: the flags lie on lines of their own, two of them, as adjacent lines are fetched together


class _Setup(ctypes.Structure):
    """struct fdl_step_setup."""

    _fields_ = (
        *((name, c_void_p) for name in ("tables", "resident", "experts", "hidden", "topk_ids", "topk_weights", "out")),
        *((name, c_void_p) for name in ("asked", "answered", "strategy", "counts", "lane_us", "cpu_ns")),
        ("stall_ms", c_int64),
        ("hidden_size", c_int64),
        *((name, c_int32) for name in ("layers", "num_experts", "top_k", "most_tokens", "polled")),
    )


class Mailbox:
    """Host memory through which an accelerator's stream and the CPU lane speak; one layer at a time.

    hidden bf16 [tokens, H], ids int64 and weights fp32 [tokens, k], out fp32 [tokens, H]: views of `memory`, which is
    page-aligned so that it can be registered with a driver. asked, answered: addresses of the two flags, uint32
    """

    def __init__(self, tokens: int, hidden_size: int, top_k: int) -> None:
        shapes: Sequence[tuple[torch.dtype, tuple[int, int]]] = (
            (torch.bfloat16, (tokens, hidden_size)),
            (torch.int64, (tokens, top_k)),
            (torch.float32, (tokens, top_k)),
            (torch.float32, (tokens, hidden_size)),
        )
        sizes = [-(-dtype.itemsize * rows * columns // _LINE) * _LINE for dtype, (rows, columns) in shapes]
        self.memory = arena.allocate(2 * _LINE + sum(sizes))
        raw = self.memory.view(torch.uint8)
        parts, at = [], 2 * _LINE
        for (dtype, shape), size in zip(shapes, sizes, strict=True):
            nbytes = dtype.itemsize * shape[0] * shape[1]
            parts.append(raw[at : at + nbytes].view(dtype).view(shape))
            at += size
        self.hidden, self.ids, self.weights, self.out = parts
        self.asked = self.memory.data_ptr()
        self.answered = self.asked + _LINE


class NativeStep:
    """One fdl_step: serves the CPU lane of the layers of captured steps, one step at a time.

    kernels     of the engine; closed after this
    dispatcher  that never streams: its tables decide
    pointers    per row: the packed experts, as `Kernels.moe` takes them
    polled      whether a thread polls the mailbox's flags
    stall_ms    how long a step may make no progress before it is given up
    strategy uint8 and counts int32 [rows, E], lane_us fp32 [rows, 2], cpu_ns int64 [rows] are those of the last step
    """

    def __init__(
        self,
        kernels: Kernels,
        dispatcher: Dispatcher,
        pointers: Sequence[ctypes.Array[c_void_p]],
        mailbox: Mailbox,
        *,
        polled: bool,
        stall_ms: int,
    ) -> None:
        rows, experts = len(pointers), len(pointers[0])
        self.mailbox = mailbox
        self.strategy = np.zeros((rows, experts), np.uint8)
        self.counts = np.zeros((rows, experts), np.int32)
        self.lane_us = np.zeros((rows, 2), np.float32)
        self.cpu_ns = np.zeros(rows, np.int64)
        # Kept alive here: the native side holds pointers into them.
        self._dispatcher = dispatcher
        self._pointers = (c_void_p * rows)(*(ctypes.addressof(row) for row in pointers))
        self._rows = tuple(pointers)
        tables, resident = dispatcher.native_tables()
        self._kernels, self._library = kernels, kernels.library
        self._native = declared(kernels.library.native)
        setup = _Setup(
            tables,
            resident,
            ctypes.addressof(self._pointers),
            *(part.data_ptr() for part in (mailbox.hidden, mailbox.ids, mailbox.weights, mailbox.out)),
            mailbox.asked,
            mailbox.answered,
            *(part.ctypes.data for part in (self.strategy, self.counts, self.lane_us, self.cpu_ns)),
            stall_ms,
            mailbox.hidden.shape[1],
            rows,
            experts,
            mailbox.ids.shape[1],
            mailbox.hidden.shape[0],
            polled,
        )
        self._handle: c_void_p | None = c_void_p()
        status = self._native.fdl_step_open(kernels.handle, byref(setup), byref(self._handle))
        if status:
            self._handle = None
            self._library.check(status, "start the CPU lane of captured steps")

    def begin(self, tokens: int) -> None:
        """A step of so many tokens is about to start. Raises FiddlerError after a step that failed."""
        self._library.check(self._native.fdl_step_begin(self._open(), tokens), "begin a captured step")

    def end(self, layers: int) -> None:
        """The step's stream has ended, having asked for so many layers. Raises FiddlerError if the step failed."""
        self._library.check(self._native.fdl_step_end(self._open(), layers), "run a captured step")

    def abandon(self) -> None:
        """As `end`, after another error: whatever the step's status, and however many layers its stream asked for."""
        self._native.fdl_step_end(self._open(), 0)

    @property
    def failed(self) -> bool:
        """Whether a step failed, the one in progress included; no other one will run."""
        return bool(self._native.fdl_step_status(self._open()))

    @property
    def serve_address(self) -> int:
        """fdl_step_serve, for a driver that calls host functions."""
        return int(ctypes.cast(self._native.fdl_step_serve, c_void_p).value or 0)

    def layer_address(self, row: int) -> int:
        """What fdl_step_serve takes for a row."""
        return int(self._native.fdl_step_layer(self._open(), row))

    def write_flag(self, address: int, value: int) -> None:
        """What a stream's write does, for streams that are threads of this CPU."""
        self._native.fdl_flag_write(address, value)

    def wait_flag(self, address: int, value: int) -> None:
        """What a stream's wait does, for streams that are threads of this CPU. Without the GIL."""
        self._native.fdl_flag_wait(address, value)

    def close(self) -> None:
        """Ends the threads. Calling it again does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._native.fdl_step_close(handle)

    def __del__(self) -> None:
        # A constructor that raised has left no handle.
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _open(self) -> c_void_p:
        if self._handle is None:
            raise FiddlerError("captured steps are closed", found="a step after close()")
        return self._handle


def declared(native: Any) -> Any:
    """Sets the types of the fdl_step_ functions."""
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "fdl_step_open": (c_int32, (c_void_p, POINTER(_Setup), POINTER(c_void_p))),
        "fdl_step_close": (None, (c_void_p,)),
        "fdl_step_begin": (c_int32, (c_void_p, c_int64)),
        "fdl_step_end": (c_int32, (c_void_p, c_int32)),
        "fdl_step_status": (c_int32, (c_void_p,)),
        "fdl_step_layer": (c_void_p, (c_void_p, c_int32)),
        "fdl_step_serve": (None, (c_void_p,)),
        "fdl_flag_write": (None, (c_void_p, c_uint32)),
        "fdl_flag_wait": (None, (c_void_p, c_uint32)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype = result
        function.argtypes = arguments
    return native
