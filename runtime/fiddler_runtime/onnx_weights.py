"""Experts in an ONNX file: the names of the plan for the file's own, and quantised weights as plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from .checkpoint import Checkpoint, expert_shapes
from .errors import FiddlerError
from .onnx_file import VarintTensor, read_initializers, read_varints
from .plan import ModelSpec
from .safetensors_header import DOWNLOAD_AGAIN, TensorInfo

SCALES, ZERO_POINTS = "_scales", "_zero_points"
_ELEMENTS_AT_A_TIME = 1 << 22
"""Elements that are dequantised together: temporary memory, 12 bytes each."""
_DECODED = 9
"""Tensors whose varints are kept decoded, a layer's: numbers, scales and zero points of three matrices."""


@dataclass(frozen=True)
class QuantizedTensor(TensorInfo):
    """Integers of 4 or 8 bits with scales, by the rule of onnxruntime's QMoE: (q - zero point) * scale.

    It looks like its fp32 [E, N, K].
    packed       uint8 [E, N, K * bits / 8], the first element in the lowest bits
    scales       [E, N], or [E, N, blocks of K]
    zero_points  uint8, packed along the last dimension of scales; without them 2^(bits - 1)
    """

    bits: int
    packed: TensorInfo
    scales: TensorInfo
    zero_points: TensorInfo | None


class OnnxCheckpoint(Checkpoint):
    """The initializers of an ONNX file. model_dir is the file."""

    described_by = "plan"

    def __init__(self, model_dir: Path, tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__(model_dir, tensors)
        self._decoded: dict[str, npt.NDArray[Any]] = {}

    @staticmethod
    def open(model_dir: Path) -> OnnxCheckpoint:
        """Reads where the tensors are: see `read_initializers` for what it raises."""
        if not model_dir.is_file():
            raise FiddlerError(
                f"no such ONNX file: {model_dir}",
                found="a directory" if model_dir.is_dir() else "nothing",
                expected="the file that the plan was compiled from",
                hint="--experts FILE.onnx",
            )
        return OnnxCheckpoint(model_dir, read_initializers(model_dir))

    def renamed(self, spec: ModelSpec) -> OnnxCheckpoint:
        """The tensors that hold the model's experts, under the plan's names; quantised ones as what they stand for.

        Raises FiddlerError for one that is missing, and for scales that do not fit.
        """
        names = spec.expert_tensors.initializers
        missing = [initializer for initializer in names.values() if initializer not in self.tensors]
        if missing:
            raise FiddlerError(
                f"{self.model_dir} is not the file that the plan was compiled from",
                found=f"no initializer {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                expected=f"all {len(names)} that the plan names",
                hint=f"compile it: fiddlerc compile {self.model_dir} --hw HW -o PLAN",
            )
        tensors = {name: self.tensors[initializer] for name, initializer in names.items()}
        for name, shape in expert_shapes(spec).items():
            if (scales := tensors.get(name + SCALES)) is not None and len(shape) == 3:
                tensors[name] = _quantized(tensors[name], scales, tensors.get(name + ZERO_POINTS), shape)
        return OnnxCheckpoint(self.model_dir, tensors)

    def stored_as(self, info: TensorInfo) -> str:
        if isinstance(info, QuantizedTensor):
            return f"int{info.bits} ({'half' if info.bits == 8 else 'a quarter'} of what they take in memory)"
        return super().stored_as(info)

    def read_part(self, name: str, first: int, out: torch.Tensor, *, drop: bool = False) -> None:
        """As Checkpoint's; quantised tensors, which are fp32 here, one whole expert at a time."""
        info = self.tensors[name]
        if isinstance(info, QuantizedTensor):
            self._dequantize(info, out, first)
        elif isinstance(info, VarintTensor):
            elements = torch.from_numpy(self._decode(info)[first : first + out.numel()])
            out.view(-1).copy_(elements.view(out.dtype))
        else:
            super().read_part(name, first, out, drop=drop)

    def _dequantize(self, info: QuantizedTensor, out: torch.Tensor, start: int) -> None:
        """One expert's fp32 [N * K]. Raises ValueError if `out` and `start` are not one expert's."""
        _, rows, columns = info.shape
        expert, odd = divmod(start, rows * columns)
        if odd or out.numel() != rows * columns:
            raise ValueError("quantised experts are read whole")
        packed = self._expert(info.packed, expert)
        scales = self._expert(info.scales, expert).float().view(rows, -1)
        zero_points = torch.tensor(float(1 << (info.bits - 1)))
        if info.zero_points is not None:
            per_row = scales.shape[1] if len(info.scales.shape) == 3 else rows
            unpacked = _unpack(self._expert(info.zero_points, expert).view(-1, info.zero_points.shape[-1]), info.bits)
            zero_points = unpacked[:, :per_row].reshape(rows, -1, 1)
        blocks = scales.shape[1]
        step = max(1, _ELEMENTS_AT_A_TIME // columns)
        matrix = out.view(rows, blocks, columns // blocks)
        for row in range(0, rows, step):
            part = slice(row, row + step)
            values = _unpack(packed[part], info.bits).view(-1, blocks, columns // blocks)
            values -= zero_points[part] if zero_points.dim() else zero_points
            torch.mul(values, scales[part].unsqueeze(-1), out=matrix[part])

    def _expert(self, info: TensorInfo, expert: int) -> torch.Tensor:
        """One expert's part of a tensor [E, ...], as stored."""
        dtype = torch.uint8 if info.dtype == "U8" else info.torch_dtype
        part = torch.empty(info.shape[1:], dtype=dtype)
        if isinstance(info, VarintTensor):
            values = self._decode(info)[expert * part.numel() : (expert + 1) * part.numel()]
            return torch.from_numpy(values).view(dtype).view(part.shape)
        memory = part.view(-1).view(torch.uint8).numpy().data
        try:
            with info.file.open("rb") as file:
                file.seek(info.offset + expert * len(memory))
                if file.readinto(memory) == len(memory):
                    return part
        except OSError as error:
            raise FiddlerError(f"cannot read {info.file}", found=error.strerror or str(error)) from None
        raise FiddlerError(
            f"{info.file} was truncated while it was read", found=f"half of {info.name}", hint=DOWNLOAD_AGAIN
        )

    def _decode(self, info: VarintTensor) -> npt.NDArray[Any]:
        """The tensor's elements. A layer's tensors hold all its experts, which are asked for one after the other."""
        if (found := self._decoded.get(info.name)) is None:
            while len(self._decoded) >= _DECODED:
                del self._decoded[next(iter(self._decoded))]
            found = self._decoded[info.name] = read_varints(info)
        return found


def _quantized(
    packed: TensorInfo, scales: TensorInfo, zero_points: TensorInfo | None, shape: tuple[int, ...]
) -> QuantizedTensor:
    """Raises FiddlerError unless the three have shapes that fit each other and the dequantised [E, N, K]."""
    experts, rows, columns = shape
    bits = 8 * packed.shape[-1] // columns if len(packed.shape) == 3 else 0
    if packed.dtype != "U8" or bits not in (4, 8) or packed.shape != (experts, rows, columns * bits // 8):
        raise _unfit(packed, f"uint8 {[experts, rows, columns // 2]} or {[experts, rows, columns]}: raw int4 or int8")
    blocks = scales.shape[2] if len(scales.shape) == 3 else 1
    by_row = (experts, rows) if len(scales.shape) == 2 else (experts, rows, blocks)
    if scales.shape != by_row or not blocks or columns % blocks or columns // blocks * bits % 8:
        raise _unfit(
            scales, f"{[experts, rows]} or {[experts, rows, 'blocks of K']}, with blocks that divide {columns}"
        )
    _ = scales.torch_dtype
    if zero_points is not None:
        expected = (*by_row[:-1], -(-by_row[-1] * bits // 8))
        if zero_points.dtype != "U8" or zero_points.shape != expected:
            raise _unfit(zero_points, f"uint8 {list(expected)}")
    return QuantizedTensor(
        packed.name, packed.file, "F32", shape, packed.offset, packed.nbytes, bits, packed, scales, zero_points
    )


def _unfit(info: TensorInfo, expected: str) -> FiddlerError:
    return FiddlerError(
        f"the initializer {info.name} does not fit its layer",
        found=f"{info.dtype} {list(info.shape)}",
        expected=expected,
    )


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, w] -> fp32 [n, w * 8 / bits], the first element in the lowest bits."""
    if bits == 8:
        return packed.float()
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).view(packed.shape[0], -1).float()
