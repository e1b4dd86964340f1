"""The few functions of NVIDIA's driver that torch does not offer, through ctypes: flags that a stream writes and waits
for, functions of the host in a stream, and registering host memory.

Symbols, constants and their meaning: CUDA Driver API 13.0, cuda.h. Nothing here has been run on a GPU by this project;
the tests run it on a library of their own with the same functions (tests/fake_driver).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from ..errors import FiddlerError

LIBRARY = "libcuda.so.1"

SUCCESS = 0  # of enum cudaError_enum

# CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: the second version of these functions, of which 32 bits are a part.
_STREAM_MEMORY_OPERATIONS = 122
_WAIT_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(*address - value) >= 0
_WRITE_DEFAULT = 0  # fences what the stream wrote before
_REGISTER_PORTABLE, _REGISTER_MAPPED = 1, 2

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuLaunchHostFunc": (c_void_p, c_void_p, c_void_p),
}
# Drivers before CUDA 11.7 lack these.
_MEMORY_OPERATIONS: dict[str, tuple[Any, ...]] = {
    "cuStreamWriteValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint),
    "cuStreamWaitValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint),
}


class Driver:
    """A loaded and initialised driver. Streams are handles (torch.cuda.Stream.cuda_stream), addresses are integers.

    Methods raise FiddlerError with the driver's own words. Raises FiddlerError if there is no driver, or one that lacks
    a function which every driver since CUDA 11 has.
    """

    def __init__(self, library: str | Path = LIBRARY) -> None:
        try:
            self._native: Any = ctypes.CDLL(str(library))
            self._declare(_SIGNATURES)
        except (OSError, AttributeError) as error:
            raise FiddlerError(
                "cannot load NVIDIA's driver", found=str(error), expected=f"{LIBRARY} of CUDA 11 or later"
            ) from None
        try:
            self._declare(_MEMORY_OPERATIONS)
            self._has_memory_operations = True
        except AttributeError:
            self._has_memory_operations = False
        self._call("cuInit", 0)

    def version(self) -> int:
        """The CUDA version that the driver supports: 12040 is 12.4."""
        found = c_int()
        self._call("cuDriverGetVersion", byref(found))
        return found.value

    def has_memory_operations(self, device: int) -> bool:
        """Whether streams of that device can write and wait for memory."""
        if not self._has_memory_operations:
            return False
        ordinal, found = c_int(), c_int()
        self._call("cuDeviceGet", byref(ordinal), device)
        self._call("cuDeviceGetAttribute", byref(found), _STREAM_MEMORY_OPERATIONS, ordinal)
        return bool(found.value)

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Queues: once all before it is done and visible to the host, the uint32 at a device address becomes value."""
        self._call("cuStreamWriteValue32_v2", stream, address, value, _WRITE_DEFAULT)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Queues: nothing after it starts before the uint32 at a device address has reached value, cyclically."""
        self._call("cuStreamWaitValue32_v2", stream, address, value, _WAIT_GEQ)

    def launch_host_function(self, stream: int, function: int, argument: int) -> None:
        """Queues function(argument), a native function that makes no call of the driver."""
        self._call("cuLaunchHostFunc", stream, function, argument)

    def register(self, address: int, nbytes: int) -> int:
        """Locks host memory and lets devices access it; returns its device address."""
        self._call("cuMemHostRegister_v2", address, nbytes, _REGISTER_PORTABLE | _REGISTER_MAPPED)
        found = c_uint64()
        try:
            self._call("cuMemHostGetDevicePointer_v2", byref(found), address, 0)
        except FiddlerError:
            self.unregister(address)
            raise
        return found.value

    def unregister(self, address: int) -> None:
        """Ends what `register` began."""
        self._call("cuMemHostUnregister", address)

    def _declare(self, signatures: dict[str, tuple[Any, ...]]) -> None:
        for name, arguments in signatures.items():
            function = getattr(self._native, name)
            function.restype = c_int
            function.argtypes = arguments

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._native, name)(*args)
        if status != SUCCESS:
            text = c_char_p()
            self._native.cuGetErrorString(status, byref(text))
            words = (text.value or b"unknown error").decode()
            raise FiddlerError(f"NVIDIA's driver failed in {name}", found=f"error {status}: {words}")
