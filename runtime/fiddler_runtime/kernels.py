"""A built kernel library: a thin wrapper of the C interface in templates/include/fiddler/abi.h.

library = KernelLibrary(build_kernels(plan_dir / "kernels"), plan.header.kernels)
with library.open() as kernels:
    kernels.pack(gate, up, down, packed)
    kernels.moe(hidden, topk_ids, topk_weights, make_pointers([packed]), out)
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import struct
import warnings
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import FiddlerError, FiddlerWarning
from .machine import KNOWN_ISAS, NodeCpus, refused, refuses_placement, threads_of_nodes, usable_cores
from .openmp import TeamStruct, torch_team
from .plan import ABI_VERSION, KernelSpec

_OK, _E_ISA, _E_PLACE = 0, -1, -6
_ALIGNMENT = 64
_LEAST_READ, _LEAST_SETTLED = 512, 1 << 20
_LEAVE_IT = "leave the instruction set to the runtime, which takes the best that runs here"
# struct fdl_moe_call. A call has streamed weights through the caches; the fewer Python objects the next one needs, the
# fewer come from memory again. (A ctypes.Structure takes several times as long.)
_PACK_MOE_CALL = struct.Struct("@PqPPPPPqiii4x").pack


class TablesStruct(ctypes.Structure):
    """struct fdl_tables."""

    _fields_ = (
        ("cpu_us", c_void_p),
        ("gpu_us", c_void_p),
        ("length", c_int32),
        ("cpu_overhead_us", c_float),
        ("gpu_overhead_us", c_float),
        ("stream_us", c_float),
        ("contention", c_float),
        ("rows", c_int32),
    )


class _Expert(ctypes.Structure):
    """struct fdl_expert."""

    _fields_ = (
        *((name, c_void_p) for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")),
        ("gate_up_stride", c_int64 * 2),
        ("down_stride", c_int64 * 2),
        ("gate_up_bias_stride", c_int64),
    )


def make_pointers(experts: Sequence[int | None]) -> ctypes.Array[c_void_p]:
    """The pointer array that `Kernels.moe` takes: addresses (data_ptr()) of packed experts, None where none is held."""
    return (c_void_p * len(experts))(*experts)


def empty_packed(packed_bytes: int, experts: int | None = None) -> torch.Tensor:
    """Uninitialised packed weights at a 64-byte aligned address: bf16 [packed_bytes / 2], or [experts, ...]."""
    count = packed_bytes // 2 * (1 if experts is None else experts)
    raw = torch.empty(count + _ALIGNMENT // 2, dtype=torch.bfloat16)
    start = -raw.data_ptr() % _ALIGNMENT // 2
    packed = raw[start : start + count]
    return packed if experts is None else packed.view(experts, packed_bytes // 2)


def require_variant(spec: KernelSpec, isa: str) -> None:
    """Raises FiddlerError if there are no kernels of that instruction set."""
    built = [variant.isa for variant in spec.variants]
    if isa not in built:
        raise FiddlerError(
            f"no {isa} kernels were generated",
            found=", ".join(built),
            hint=f"fiddlerc compile ... --isa {isa}" if isa in KNOWN_ISAS else _LEAVE_IT,
        )


class KernelLibrary:
    """A loaded kernel library, checked against the plan's description of it.

    isas          instruction sets built in, preferred first
    packed_bytes  of one expert
    Raises FiddlerError if the file is no such library, or one of another version, shape or layout.
    """

    def __init__(self, path: Path, spec: KernelSpec) -> None:
        self.path = path
        self.spec = spec
        try:
            _check_complete(path)
            self._native: Any = ctypes.CDLL(str(path))
            _declare(self._native)
        except (OSError, AttributeError) as error:
            raise FiddlerError(f"cannot load the kernel library {path.name}", found=str(error)) from None
        self._expect("its ABI version", self._native.fdl_abi_version(), ABI_VERSION)
        about = json.loads(self._native.fdl_describe())
        self._expect("its name", about["name"], spec.name)
        self.packed_bytes: int = self._native.fdl_packed_bytes()
        self._expect("its bytes per packed expert", self.packed_bytes, spec.packed_bytes)
        self.isas: tuple[str, ...] = tuple(about["isas"])
        self._expect("its instruction sets", self.isas, tuple(variant.isa for variant in spec.variants))

    @property
    def native(self) -> Any:
        """The ctypes library with declared signatures."""
        return self._native

    def usable(self, isa: str) -> bool:
        """Whether `isa` is built in and this CPU and operating system permit it."""
        return bool(self._native.fdl_isa_usable(isa.encode()))

    def others(self, isa: str) -> dict[str, str]:
        """The instruction sets that are built in and do not run while `isa` does, and why."""
        found = {}
        for other in self.isas:
            if other == isa:
                continue
            if not self.usable(other):
                found[other] = refused(other) or "refused by the operating system"
            else:
                found[other] = (
                    f"{isa} was preferred" if self.isas.index(other) > self.isas.index(isa) else f"{isa} was asked for"
                )
        return found

    def open(
        self,
        isa: str | None = None,
        threads: int | None = None,
        *,
        cpus: Sequence[NodeCpus] | None = None,
        beside_torch: bool = False,
    ) -> Kernels:
        """Starts a variant with its thread pool.

        isa      None for the first usable one of `isas`; it is never replaced by another
        threads  counting the caller; None is one per usable core
        cpus     of each memory node (machine.lane_cpus): where the threads run, one after another (but the caller, who
                 is the first, is left alone), each node's on its share of an expert's weights; None pins nothing
        beside_torch  torch computes on the CPU in turns with these kernels: they run on its threads if they can
        Raises FiddlerError if the instruction set cannot be used here or a thread cannot be started.
        """
        if isa is not None and not self.usable(isa):
            self._refuse(isa)
        count = usable_cores() if threads is None else threads
        if not 1 <= count <= 1024:
            raise FiddlerError("cannot start the kernel's threads", found=count, expected="1 to 1024 threads")
        pinned = nodes = None
        node_count = 0 if cpus is None else len(cpus)
        if cpus is not None:
            if not cpus or [len(of.cpus) for of in cpus] != threads_of_nodes(count, node_count):
                raise FiddlerError(
                    "cannot pin the kernel's threads",
                    found=f"CPUs by node: {[list(of.cpus) for of in cpus]}",
                    expected=f"{count}, one per thread, of each node as many as of the others, or one more",
                )
            pinned = (c_int32 * count)(*itertools.chain.from_iterable(of.cpus for of in cpus))
            nodes = (c_int32 * node_count)(*(of.node for of in cpus))
        team = torch_team(count) if beside_torch else None
        handle = c_void_p()
        name = isa.encode() if isa else None
        status = self._native.fdl_open(name, count, pinned, nodes, node_count, team, byref(handle))
        if isa is not None and status == _E_ISA:
            self._refuse(isa)
        self.check(status, "open kernels")
        return Kernels(self, handle, count, "torch's" if team else "own", tuple(of.node for of in cpus or ()))

    def check(self, status: int, what: str) -> None:
        """Raises FiddlerError for a status of the C interface other than FDL_OK."""
        if status != _OK:
            text = self._native.fdl_error_text(status).decode()
            raise FiddlerError(f"cannot {what} ({self.spec.name})", found=text)

    def _refuse(self, isa: str) -> None:
        require_variant(self.spec, isa)
        raise FiddlerError(
            f"this CPU cannot run {isa} kernels",
            found=refused(isa) or "an operating system that refuses the registers",
            expected=f"a CPU with {isa}, and a system that permits it",
            hint=_LEAVE_IT,
        )

    def _expect(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise FiddlerError(
                f"the kernel library {self.path.name} is not this plan's: {what} differs",
                found=found,
                expected=expected,
                hint="build it from the plan's own sources: fiddlerc verify PLAN",
            )


class Kernels:
    """One kernel variant and its thread pool. Calls from several threads are carried out one after another.

    Every method raises FiddlerError if a tensor's dtype, shape or memory layout is not what its docstring says.
    """

    def __init__(
        self, library: KernelLibrary, handle: c_void_p, threads: int, whose_threads: str, nodes: tuple[int, ...]
    ) -> None:
        self.library = library
        self.threads = threads
        self.whose_threads = whose_threads
        self.nodes = nodes  # memory nodes that the threads are pinned to; () where there is one
        self._handle: c_void_p | None = handle
        self._native = library.native
        self._moe = library.native.fdl_moe
        self._hidden_size = library.spec.hidden_size
        self.isa: str = self._native.fdl_isa(handle).decode()

    def pack(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        packed: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        """A checkpoint's order to packed: bf16 gate, up [I, H], down [H, I] to bf16 packed [packed_bytes / 2].

        The matrices may be views of [I, H], [H, I], or of gate and up in one, also in turn: what `orders.views` makes.
        biases  bf16 of gate [I], up [I] and down [H] where the kernels are for experts with biases, else none
        """
        expert = self._weights(gate, up, down, packed, biases)
        self.library.check(self._native.fdl_pack(self._open(), byref(expert), packed.data_ptr()), "pack an expert")

    def unpack(
        self,
        packed: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        """The reverse of `pack`, exactly, to contiguous matrices."""
        for name, matrix in (("gate", gate), ("up", up), ("down", down)):
            if not matrix.is_contiguous():
                raise FiddlerError(f"wrong {name} to unpack to", found=_shown(matrix), expected="contiguous")
        expert = self._weights(gate, up, down, packed, biases)
        self.library.check(self._native.fdl_unpack(self._open(), packed.data_ptr(), byref(expert)), "unpack an expert")

    def settle(self, packed: torch.Tensor, *, present: bool = False) -> bool:
        """Puts the memory of a packed expert, bf16 [packed_bytes / 2], on the nodes of the threads that read it.

        present  its pages are there, or in a mapped file, and move. Else nobody may have written to it before
        False if the system refuses or, unless it is present, a node is full. Nothing happens, and True is returned,
        where the threads are on one node.
        """
        _expect_bf16("packed expert", packed, (self.library.packed_bytes // 2,))
        return self._settled(self._native.fdl_settle(self._open(), packed.data_ptr(), present))

    def settle_probed(self, data: torch.Tensor) -> bool:
        """The same for what `read_gbps` reads, which is there and at least 1 MiB."""
        _expect_readable(data, _LEAST_SETTLED)
        return self._settled(self._native.fdl_probe_settle(self._open(), data.data_ptr(), data.nbytes))

    def _settled(self, status: int) -> bool:
        if status != _E_PLACE:
            self.library.check(status, "place memory")
        return status == _OK

    def moe(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        experts: ctypes.Array[c_void_p],
        out: torch.Tensor,
        strategy: npt.NDArray[np.uint8] | None = None,
        split_rows: int = 0,
    ) -> None:
        """The CPU share of one MoE layer: out[t] = sum over k of weight[t, k] * expert(id[t, k])(hidden[t]).

        hidden        bf16 [tokens, H], last dimension contiguous
        topk_ids      int64 [tokens, top_k]; ids outside 0 .. experts - 1 are skipped
        topk_weights  float32 [tokens, top_k]
        experts       `make_pointers` of the layer's packed experts
        out           float32 [tokens, H], overwritten; rows without a computed expert are zero
        strategy      uint8 [experts]: only experts marked CPU or SPLIT are computed; None computes all
        split_rows    of experts marked SPLIT, so many intermediate rows are left out, the first; a multiple of 64
        """
        tokens, top_k = topk_ids.shape
        width = self._hidden_size
        if (
            hidden.dtype is not torch.bfloat16
            or topk_ids.dtype is not torch.int64
            or topk_weights.dtype is not torch.float32
            or out.dtype is not torch.float32
            or hidden.shape != (tokens, width)
            or topk_weights.shape != (tokens, top_k)
            or out.shape != (tokens, width)
            or hidden.stride()[1] != 1
            or topk_ids.stride() != (top_k, 1)
            or topk_weights.stride() != (top_k, 1)
            or out.stride() != (width, 1)
            or not (hidden.is_cpu and topk_ids.is_cpu and topk_weights.is_cpu and out.is_cpu)
        ):
            self._check(hidden, topk_ids, topk_weights, out)
        strategy_address = 0
        if strategy is not None:
            if strategy.dtype != np.uint8 or strategy.shape != (len(experts),) or not strategy.flags.c_contiguous:
                raise FiddlerError(
                    "wrong strategy for a MoE layer",
                    found=f"{strategy.dtype} {strategy.shape}",
                    expected=f"contiguous uint8 ({len(experts)},)",
                )
            strategy_address = strategy.ctypes.data
        call = _PACK_MOE_CALL(
            hidden.data_ptr(),
            hidden.stride()[0],
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            strategy_address,
            ctypes.addressof(experts),
            out.data_ptr(),
            tokens,
            top_k,
            len(experts),
            split_rows,
        )
        status = self._moe(self._open(), call)
        if status != _OK:
            self.library.check(status, "run a MoE layer")

    def read_gbps(self, data: torch.Tensor) -> float:
        """GB/s of all threads reading `data` (contiguous, on the CPU, at least 512 bytes) once."""
        _expect_readable(data, _LEAST_READ)
        result = c_double()
        status = self._native.fdl_probe_read(self._open(), data.data_ptr(), data.nbytes, byref(result))
        self.library.check(status, "measure the memory bandwidth")
        return result.value

    def peak_gflops(self, milliseconds: float = 20.0) -> float:
        """GFLOP/s of all threads doing nothing but this variant's multiply instruction for that long."""
        result = c_double()
        status = self._native.fdl_probe_peak(self._open(), milliseconds, byref(result))
        self.library.check(status, "measure the peak")
        return result.value

    @property
    def handle(self) -> c_void_p:
        """The fdl_kernels. Raises FiddlerError after `close`."""
        return self._open()

    def close(self) -> None:
        """Stops the threads. Does nothing if already closed."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._native.fdl_close(handle)

    def __enter__(self) -> Kernels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A constructor that raised has left no handle.
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _open(self) -> c_void_p:
        if self._handle is None:
            raise FiddlerError("these kernels are closed", expected="a call before close()")
        return self._handle

    def _weights(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        packed: torch.Tensor,
        biases: Sequence[torch.Tensor],
    ) -> _Expert:
        spec = self.library.spec
        wide = (spec.intermediate_size, spec.hidden_size)
        _expect_bf16("gate weights", gate, wide, contiguous=False)
        _expect_bf16("up weights", up, wide, contiguous=False)
        _expect_bf16("down weights", down, wide[::-1], contiguous=False)
        in_turn = gate.stride(0) == 2 and up.data_ptr() == gate.data_ptr() + 2
        for name, matrix, known in (("gate", gate, in_turn), ("up", up, in_turn), ("down", down, False)):
            if not (known or 1 in matrix.stride()) or (name == "up" and matrix.stride() != gate.stride()):
                raise FiddlerError(f"wrong {name} weights", found=_shown(matrix), expected="an order that pack() knows")
        _expect_bf16("packed expert", packed, (self.library.packed_bytes // 2,))
        if len(biases) != 3 * spec.bias:
            raise FiddlerError(
                f"wrong biases for {spec.name}", found=len(biases), expected="three" if spec.bias else "none"
            )
        for bias, matrix in zip(biases, (gate, up, down), strict=False):
            _expect_bf16("bias", bias, matrix.shape[:1], contiguous=matrix is down)
        if biases and biases[0].stride() != biases[1].stride():
            raise FiddlerError("wrong up bias", found=_shown(biases[1]), expected=f"stride {biases[0].stride(0)}")
        if packed.data_ptr() % _ALIGNMENT != 0:
            raise FiddlerError(
                "wrong packed expert",
                found=f"an address {packed.data_ptr() % _ALIGNMENT} bytes past a multiple of {_ALIGNMENT}",
                expected=f"{_ALIGNMENT}-byte alignment (fiddler_runtime.kernels.empty_packed)",
            )
        addresses = [part.data_ptr() for part in (gate, up, down, *biases)] + [None] * (3 - len(biases))
        bias_stride = biases[0].stride(0) if biases else 1
        strides = (c_int64 * 2)(*gate.stride()), (c_int64 * 2)(*down.stride()), bias_stride
        return _Expert(*addresses, *strides)

    def _check(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """Raises the FiddlerError of the first tensor of `moe` that is wrong. (The stride of a single row never is.)"""
        tokens, top_k = ids.shape
        for name, tensor, dtype, shape in (
            ("hidden states", hidden, torch.bfloat16, (tokens, self._hidden_size)),
            ("top-k ids", ids, torch.int64, (tokens, top_k)),
            ("top-k weights", weights, torch.float32, (tokens, top_k)),
            ("output", out, torch.float32, (tokens, self._hidden_size)),
        ):
            strided = tensor is hidden and tensor.dim() == 2 and tensor.stride(1) == 1
            if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not (strided or tensor.is_contiguous()):
                raise FiddlerError(
                    f"wrong {name} for a MoE layer", found=_shown(tensor), expected=_wanted(dtype, shape)
                )
            if not tensor.is_cpu:
                raise FiddlerError(f"wrong {name} for a MoE layer", found=str(tensor.device), expected="cpu")


def warn_of_far_memory(what: str) -> None:
    """Warns the caller's caller's caller that `Kernels.settle` could not bring `what` to its nodes, and why."""
    refusal = refuses_placement()
    reason = f"the system refuses mbind ({refusal})" if refusal else "a memory node is full, or not for this process"
    hint = "in a container, docker run --cap-add SYS_NICE" if refusal else "numastat -m"
    warnings.warn(
        f"{what} lie on other memory nodes than the threads that read them, and are read more slowly: "
        f"{reason}; hint: {hint}",
        FiddlerWarning,
        stacklevel=4,
    )


def _check_complete(path: Path) -> None:
    """Raises OSError for a file that is not a whole ELF64 library: the loader maps a truncated one and then crashes."""
    with path.open("rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        raise OSError("not an ELF64 library")
    (table,) = struct.unpack_from("<Q", header, 0x28)
    entry_bytes, entries = struct.unpack_from("<HH", header, 0x3A)
    if size < table + entry_bytes * entries:  # the section table is the end of the file
        raise OSError(f"truncated: {size} bytes of {table + entry_bytes * entries}")


def _expect_bf16(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *, contiguous: bool = True) -> None:
    if (
        tensor.dtype is not torch.bfloat16
        or tuple(tensor.shape) != shape
        or (contiguous and not tensor.is_contiguous())
        or not tensor.is_cpu
    ):
        raise FiddlerError(f"wrong {name}", found=_shown(tensor), expected=_wanted(torch.bfloat16, shape))


def _expect_readable(data: torch.Tensor, least: int) -> None:
    if not data.is_contiguous() or not data.is_cpu or data.nbytes < least:
        raise FiddlerError(
            "wrong buffer to read", found=_shown(data), expected=f"contiguous, {least} bytes or more, on cpu"
        )


def _shown(tensor: torch.Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tuple(tensor.stride())}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {layout} on {tensor.device}"


def _wanted(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} contiguous on cpu"


def _declare(native: Any) -> None:
    """Sets the argument and result types of the C interface. Raises AttributeError for a function that is missing."""
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "fdl_abi_version": (c_int32, ()),
        "fdl_describe": (c_char_p, ()),
        "fdl_error_text": (c_char_p, (c_int32,)),
        "fdl_packed_bytes": (c_int64, ()),
        "fdl_isa_usable": (c_int32, (c_char_p,)),
        "fdl_open": (
            c_int32,
            (
                *(c_char_p, c_int32, POINTER(c_int32), POINTER(c_int32), c_int32),
                *(POINTER(TeamStruct), POINTER(c_void_p)),
            ),
        ),
        "fdl_close": (None, (c_void_p,)),
        "fdl_isa": (c_char_p, (c_void_p,)),
        "fdl_pack": (c_int32, (c_void_p, POINTER(_Expert), c_void_p)),
        "fdl_unpack": (c_int32, (c_void_p, c_void_p, POINTER(_Expert))),
        "fdl_settle": (c_int32, (c_void_p, c_void_p, c_int32)),
        "fdl_moe": (c_int32, (c_void_p, c_char_p)),  # _PACK_MOE_CALL
        "fdl_dispatch": (
            c_int32,
            (POINTER(TablesStruct), c_void_p, c_int64, c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p),
        ),
        "fdl_probe_settle": (c_int32, (c_void_p, c_void_p, c_int64)),
        "fdl_probe_read": (c_int32, (c_void_p, c_void_p, c_int64, POINTER(c_double))),
        "fdl_probe_peak": (c_int32, (c_void_p, c_double, POINTER(c_double))),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype = result
        function.argtypes = arguments
