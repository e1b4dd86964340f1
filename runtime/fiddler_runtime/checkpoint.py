"""A Hugging Face model directory: config.json, and tensors in one safetensors file or in shards with an index."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import strict
from .errors import FiddlerError, FiddlerWarning
from .plan import ModelSpec
from .safetensors_header import DOWNLOAD_AGAIN, TensorInfo, read_header

__all__ = ["Checkpoint", "TensorInfo", "check_identity", "config_value", "expert_shapes", "has_weights", "read_config"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES, SAMPLE_DISTANCE = 64, 4096, 8 << 20
"""Pieces of a file that identify it besides what is where in it: at least so many, at most so far apart."""
_READERS = 16
"""Threads that read them: what is not in memory takes a disk or a network far longer than the reading itself."""
# Families whose published config.json says num_experts get num_local_experts instead when transformers 5 saves them.
_OTHER_SPELLING = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}


class Checkpoint:
    """The tensors of a model directory. Opening reads headers only."""

    described_by = "config.json"

    def __init__(self, model_dir: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.model_dir = model_dir
        self._told = False
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))

    @staticmethod
    def open(model_dir: Path) -> Checkpoint:
        """Reads and checks the header of every shard.

        Raises FiddlerError: no such directory, no weights, a missing or truncated shard, an index that its shards
        contradict, a header that breaks a rule of the format.
        """
        _check_directory(model_dir)
        if (model_dir / SINGLE).exists():
            return Checkpoint(
                model_dir, read_header(model_dir / SINGLE, f"the checkpoint {model_dir / SINGLE}").tensors
            )
        if not (model_dir / INDEX).exists():
            raise _no_weights(model_dir)
        return Checkpoint(model_dir, _read_shards(model_dir))

    def read_part(self, name: str, first: int, out: torch.Tensor, *, drop: bool = False) -> None:
        """Reads out.numel() consecutive elements, from the element `first` on, straight into `out`'s memory.

        out   on the CPU, contiguous, of the stored dtype
        drop  gives the pages back at once that were read, so that the file does not stay in the page cache as well
        Raises FiddlerError for another dtype, or a file that ends too early.
        """
        info = self.tensors[name]
        if not 0 <= first <= info.elements - out.numel():
            raise ValueError(f"{name} has {info.elements} elements, not {first} + {out.numel()}")
        if info.torch_dtype != out.dtype:
            raise FiddlerError(f"the tensor {name} has another dtype", found=info.torch_dtype, expected=out.dtype)
        if out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError("read_part needs a contiguous tensor on the CPU")
        if out.numel() == 0:
            return
        memory = out.detach().view(-1).view(torch.uint8).numpy().data
        try:
            # A descriptor of its own: nothing to close later.
            descriptor = os.open(info.file, os.O_RDONLY)
            try:
                start = info.offset + first * out.element_size()
                _read_exactly(descriptor, memory, info, start)
                if drop:
                    os.posix_fadvise(descriptor, start, len(memory), os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FiddlerError(f"cannot read {info.file}", found=error.strerror or str(error)) from None

    def identity(self) -> str:
        """What tells these tensors from others: names, types, places, and pieces of every file, hashed.

        SAMPLES pieces, and one every SAMPLE_DISTANCE: a matrix of that size cannot be another one unnoticed, smaller
        ones and single numbers can. Copying or moving the files does not change it. Raises FiddlerError for a file that
        cannot be read.
        """
        total = hashlib.sha256()
        starts: dict[Path, int] = {}
        # Places are hashed and not headers: an ONNX file says of another file where tensors are in it.
        for name, info in sorted(self.tensors.items()):
            starts[info.file] = min(info.offset, starts.get(info.file, info.offset))
            total.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.offset}\0".encode())
        for file, start in sorted(starts.items()):
            try:
                with file.open("rb", buffering=0) as opened:
                    size = os.fstat(opened.fileno()).st_size
                    os.posix_fadvise(opened.fileno(), start, 0, os.POSIX_FADV_RANDOM)
                    total.update(f"{file.name} {size}\0".encode())
                    for pieces in _samples(opened.fileno(), start, size):
                        total.update(pieces)
            except OSError as error:
                raise FiddlerError(f"cannot read {file}", found=error.strerror or str(error)) from None
        return total.hexdigest()

    def check_experts(self, spec: ModelSpec) -> None:
        """Raises FiddlerError unless every routed expert of `spec` is here, in the right shape and a float dtype.

        A missing tensor is named together with how many are missing. Warns (FiddlerWarning), once, if experts are not
        stored in bf16.
        """
        expected = expert_shapes(spec)
        self.check_tensors(expected)
        stored = {self.stored_as(self.tensors[name]) for name in expected} - {"bfloat16"}
        if stored and not self._told:
            self._told = True
            found = " and ".join(sorted(stored))
            message = (
                f"the experts of {self.model_dir} are stored as {found}: they are rounded to bf16 while they are read"
            )
            warnings.warn(message, FiddlerWarning, stacklevel=2)

    def stored_as(self, info: TensorInfo) -> str:
        """A weight's type on disk, in words."""
        return str(info.torch_dtype).removeprefix("torch.")

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises FiddlerError unless tensors of these names, of these shapes and of a float dtype are here."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            self._refuse_quantised(missing[0])
            raise FiddlerError(
                f"the checkpoint {self.model_dir} is incomplete",
                found=f"no tensor {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                expected=f"all {len(expected)} that {self.described_by} announces",
                hint="download the model again",
            )
        for name, shape in expected.items():
            info = self.tensors[name]
            if info.shape != shape:
                raise FiddlerError(
                    f"the checkpoint {self.model_dir} does not fit its {self.described_by}",
                    found=f"{name} of shape {list(info.shape)}",
                    expected=list(shape),
                    hint="download the model again",
                )
            _ = info.torch_dtype  # raises for what is not plain floating weights

    def _refuse_quantised(self, missing: str) -> None:
        """Raises FiddlerError if what stands in for a missing tensor is its quantised form."""
        base = missing.removesuffix(".weight")
        for ending, what in _QUANTISED_ENDINGS.items():
            if base + ending in self.tensors:
                raise FiddlerError(
                    f"the checkpoint {self.model_dir} is quantised",
                    found=f"{base}{ending} ({what})",
                    expected=missing,
                    hint="use the model's bf16 release, or convert it with transformers (dequantize=True)",
                )


_QUANTISED_ENDINGS = {"_blocks": "MXFP4", ".qweight": "INT4: GPTQ or AWQ", ".weight_packed": "packed INT4"}


def expert_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor that holds routed experts, in the order of layers and experts."""
    names = spec.expert_tensors
    rows, width = spec.intermediate_size, spec.hidden_size
    both = 2 * rows if names.gate == names.up else rows
    matrices = {names.gate: (both, width), names.up: (both, width), names.down: (width, rows)}
    shapes: dict[str, tuple[int, ...]] = {
        name: shape[::-1] if names.transposed else shape for name, shape in matrices.items()
    }
    if names.gate_bias:
        shapes |= {names.gate_bias: (both,), names.up_bias: (both,), names.down_bias: (width,)}
    return {
        pattern.format(layer=layer, expert=expert): shape if "{expert}" in pattern else (spec.num_experts, *shape)
        for layer in spec.moe_layers
        for expert in range(spec.num_experts)
        for pattern, shape in shapes.items()
    }


def has_weights(model_dir: Path) -> bool:
    """Whether the directory holds safetensors weights, or parts of them; without any it may still describe a model."""
    return any(model_dir.glob("*.safetensors")) or (model_dir / INDEX).exists()


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json as a dict. It is Hugging Face's, so unknown keys are allowed.

    Raises FiddlerError: no such directory, no config.json, not JSON.
    """
    _check_directory(model_dir)
    path = model_dir / "config.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FiddlerError(
            f"{model_dir} is not a Hugging Face model directory",
            found="no config.json",
            expected="config.json beside the weights",
            hint="download the whole model, e.g. hf download ORGANISATION/MODEL --local-dir DIR",
        ) from None
    except OSError as error:
        raise FiddlerError(
            f"cannot read {path}", found=error.strerror or str(error), expected="a readable file", hint=f"ls -l {path}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FiddlerError(f"{path} is not valid JSON", found=str(error), hint=DOWNLOAD_AGAIN) from None
    if not isinstance(value, dict):
        raise FiddlerError(
            f"{path} is not a model's config", found=type(value).__name__, expected="an object", hint=DOWNLOAD_AGAIN
        )
    return value


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """config[key], or what stands under the key's other spelling, or None."""
    if key not in config and key in _OTHER_SPELLING:
        key = _OTHER_SPELLING[key]
    return config.get(key)


def _samples(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """A file's pieces from `start` on, some at a time, in order."""
    count = max(SAMPLES, -(-(end - start) // SAMPLE_DISTANCE))

    def read(first: int) -> bytes:
        numbers = range(first, min(first + SAMPLES, count))
        return b"".join(os.pread(descriptor, SAMPLE_BYTES, start + (end - start) * n // count) for n in numbers)

    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(read, range(0, count, SAMPLES))


def check_identity(spec: ModelSpec, model_dir: Path) -> None:
    """Raises FiddlerError unless the directory's config.json agrees with the plan's model, key by key."""
    config = read_config(model_dir)
    for key, expected in sorted(spec.identity.items()):
        found = config_value(config, key)
        if found != expected or isinstance(found, bool) != isinstance(expected, bool):
            raise FiddlerError(
                f"{model_dir} is not the plan's model ({spec.name})",
                found=f"no {key}" if found is None else f"{key} = {found}",
                expected=f"{key} = {expected}",
                hint=f"give {spec.name}'s directory, or compile this one: fiddlerc compile {model_dir} --hw HW -o PLAN",
            )


def _check_directory(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise FiddlerError(
            f"no such model directory: {model_dir}",
            found="a file" if model_dir.exists() else "nothing",
            expected="a directory with config.json and *.safetensors (built-in names have no weights)",
            hint="--model DIR",
        )


def _no_weights(model_dir: Path) -> FiddlerError:
    loose = sorted(path.name for path in model_dir.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model_dir.glob(pattern))
    if loose:
        return FiddlerError(
            f"the checkpoint {model_dir} is incomplete",
            found=f"{len(loose)} safetensors files, but neither {SINGLE} nor {INDEX}",
            expected=f"{INDEX}, which says what is in which shard",
            hint="download the model again",
        )
    return FiddlerError(
        f"no weights in {model_dir}",
        found=f"{pickled[0]}, a pickle" if pickled else f"neither {SINGLE} nor {INDEX}",
        expected="safetensors weights",
        hint="download the model's safetensors, e.g. hf download ORGANISATION/MODEL --local-dir DIR",
    )


def _read_shards(model_dir: Path) -> dict[str, TensorInfo]:
    what = f"the index {model_dir / INDEX}"
    index = strict.load(model_dir / INDEX, what)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FiddlerError(f"{what} is not valid", found="no usable weight_map", hint=DOWNLOAD_AGAIN)
    tensors: dict[str, TensorInfo] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # The index comes with the model: it must not name files elsewhere.
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise FiddlerError(
                f"{what} is not valid", found=f"the file {shard!r}", expected="*.safetensors, without folders"
            )
    for number, shard in enumerate(shards, start=1):
        if not (model_dir / shard).exists():
            raise FiddlerError(
                f"the checkpoint {model_dir} is incomplete",
                found=f"no {shard}",
                expected=f"{len(shards)} shards, of which this is number {number}",
                hint="download the model again",
            )
        found = read_header(model_dir / shard, f"the shard {model_dir / shard}").tensors
        for name in found:
            if weight_map.get(name) != shard:
                listed = f"it in {weight_map[name]}" if name in weight_map else "a tensor that the index lists"
                raise _disagree(what, f"{name} in {shard}", listed)
        tensors |= found
    for name, shard in weight_map.items():
        if name not in tensors:
            raise _disagree(what, f"no {name} in {shard}", "it there")
    return tensors


def _disagree(what: str, found: str, expected: str) -> FiddlerError:
    return FiddlerError(
        f"{what} and its shards disagree", found=found, expected=expected, hint="download the model again"
    )


def _read_exactly(descriptor: int, memory: memoryview, info: TensorInfo, offset: int) -> None:
    done = 0
    # One call reads at most 2 GiB, and may read less.
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise FiddlerError(
                f"{info.file} was truncated while it was read",
                found=f"{done} bytes of {info.name}",
                expected=len(memory),
                hint=DOWNLOAD_AGAIN,
            )
        done += count
