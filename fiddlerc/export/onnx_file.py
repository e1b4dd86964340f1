"""Writes a model's graph with torch.onnx, and its experts one at a time beside it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch.export import Dim

from fiddler_runtime import hf, strict
from fiddler_runtime.errors import FiddlerError, install
from fiddler_runtime.progress import Progress
from fiddler_runtime.text import format_bytes
from fiddler_runtime.weights import ExpertWeights
from fiddlerc.ir import ONNX_DOMAIN, ONNX_METADATA, ONNX_NODE, ModelSpec, OnnxDescription

DType = Literal["bfloat16", "float32"]
_ALIGNMENT = 4096  # of a tensor in the data file, so that it can be mapped
_SAMPLE = (2, 8)  # any batch and length: both stay open in the graph


def export_onnx(
    model_dir: Path, spec: ModelSpec, output: Path, *, dtype: DType, progress: Progress | None = None
) -> Path:
    """Writes `output` and, beside it, `output`.data with all weights; returns the latter.

    The graph computes logits [batch, sequence, vocabulary] from input_ids [batch, sequence], without a cache.
    Everything but the experts is in `dtype`, under the names that transformers gives it; the experts are bf16,
    gate_up_proj [E, 2I, H] and down_proj [E, H, I], with their biases if they have some. At no time are more than one
    expert and the rest of the model in memory. Raises FiddlerError if the model cannot be exported or there is no room;
    nothing is left behind then.
    """
    onnx = _import("onnx", "onnx")
    _import("onnxscript", "onnx")
    if output.suffix != ".onnx":
        raise FiddlerError(
            "the output is no ONNX file", found=str(output), expected="FILE.onnx", hint=f"-o {output}.onnx"
        )
    weights = ExpertWeights.load(model_dir)
    weights.check(spec)
    data = output.with_name(output.name + ".data")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _require_disk(spec, output.parent, dtype)
        # Beside the output, so that publishing is a rename.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            draft, draft_data = Path(folder, output.name), Path(folder, data.name)
            names = _write_rest(model_dir, spec, draft, getattr(torch, dtype))
            graph = onnx.load(draft, load_external_data=False)
            _tidy(graph.graph)
            draft_data.touch()
            with draft_data.open("r+b") as file:
                _add_experts(onnx, graph.graph, names, spec, weights, file, data.name, progress)
            described = {f: getattr(spec, f) for f in OnnxDescription.__dataclass_fields__}
            onnx.helper.set_model_props(graph, {ONNX_METADATA: strict.dump(OnnxDescription(**described)).decode()})
            if ONNX_DOMAIN not in {opset.domain for opset in graph.opset_import}:
                graph.opset_import.append(onnx.helper.make_opsetid(ONNX_DOMAIN, 1))
            onnx.save(graph, draft)
            # The graph last: without it the data is nothing.
            draft_data.replace(data)
            draft.replace(output)
    except OSError as error:
        raise FiddlerError(
            f"cannot write {output}", found=error.strerror or str(error), hint="-o ANOTHER_FILE.onnx"
        ) from None
    return data


class _Node:
    """Stands where the engine stands in a model that runs: an Experts node instead of a computation."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def moe(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        return torch.onnx.ops.symbolic(
            f"{ONNX_DOMAIN}::{ONNX_NODE}",
            (hidden, ids, weights),
            {"layer": layer, "top_k": self._spec.top_k, "activation": self._spec.activation},
            dtype=hidden.dtype,
            shape=hidden.shape,
            version=1,
        )


def _write_rest(model_dir: Path, spec: ModelSpec, draft: Path, dtype: torch.dtype) -> dict[int, str]:
    """The graph and all weights but the experts'; returns the experts modules' names by layer."""
    model = hf.load_without_experts(model_dir, spec, dtype).eval()
    model.config.use_cache = False
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, hf.PlannedExperts):
            module.engine = _Node(spec)  # type: ignore[assignment]
            names[module.layer] = name
    ids = torch.zeros(_SAMPLE, dtype=torch.int64)
    with _silenced():
        try:
            program = torch.onnx.export(
                model,
                kwargs={"input_ids": ids},
                dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("sequence")}},
                output_names=["logits"],
                dynamo=True,
                optimize=False,  # folds transposes into the weights, which then lose their names
                verbose=False,
            )
        except Exception as error:  # whatever torch.export cannot trace
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise FiddlerError(
                f"torch.onnx cannot export {spec.architecture}",
                found=str(cause).strip().splitlines()[0][:150],
                expected="a model that torch.onnx can trace and translate",
                hint="pip install --upgrade torch transformers onnxscript",
            ) from None
        assert program is not None
        program.save(draft, external_data=True)
    return names


def _add_experts(
    onnx: Any,
    graph: Any,
    names: dict[int, str],
    spec: ModelSpec,
    weights: ExpertWeights,
    file: BinaryIO,
    location: str,
    progress: Progress | None,
) -> None:
    """Appends every layer's experts to the data file, and to the nodes as inputs."""
    rows, width, experts = spec.intermediate_size, spec.hidden_size, spec.num_experts
    parts = {"gate_up_proj": torch.empty((2 * rows, width), dtype=torch.bfloat16)}
    parts |= {"down_proj": torch.empty((width, rows), dtype=torch.bfloat16)}
    if spec.expert_bias:
        parts |= {f"{name}_bias": torch.empty(part.shape[0], dtype=torch.bfloat16) for name, part in parts.items()}
    (gate, up), down = parts["gate_up_proj"].chunk(2), parts["down_proj"]
    biases = (*parts["gate_up_proj_bias"].chunk(2), parts["down_proj_bias"]) if spec.expert_bias else ()
    total = len(spec.moe_layers) * experts
    nodes = {
        a.i: node for node in graph.node if node.domain == ONNX_DOMAIN for a in node.attribute if a.name == "layer"
    }
    end = file.seek(0, os.SEEK_END)
    for row, layer in enumerate(spec.moe_layers):
        places = []
        for part_name, part in parts.items():
            name, begin, size = f"{names[layer]}.{part_name}", -(-end // _ALIGNMENT) * _ALIGNMENT, part.numel() * 2
            tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.BFLOAT16, dims=(experts, *part.shape))
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", str(begin)), ("length", str(experts * size))):
                tensor.external_data.add(key=key, value=value)
            graph.initializer.append(tensor)
            nodes[layer].input.append(name)
            places.append((begin, size, part))
            end = begin + experts * size
        for expert in range(experts):
            if progress is not None:
                progress("exporting experts", row * experts + expert, total)
            weights.read(layer, expert, gate, up, down, biases)
            for begin, size, part in places:
                file.seek(begin + expert * size)
                file.write(part.view(torch.uint8).numpy().data)
    if progress is not None:
        progress("exporting experts", total, total)


def _tidy(graph: Any) -> None:
    """Leaves out torch's stack traces, nine tenths of the file, and names the input's sizes, which torch numbers."""
    for node in graph.node:
        del node.metadata_props[:]
    batch, sequence = (dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim)
    names = {batch: "batch", sequence: "sequence"}
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.dim_param)


def _require_disk(spec: ModelSpec, folder: Path, dtype: DType) -> None:
    experts = spec.total_experts * spec.expert_bytes
    needed = experts + spec.non_expert_bytes * (2 if dtype == "float32" else 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FiddlerError(
            f"not enough room in {folder}",
            found=f"{format_bytes(free)} free",
            expected=format_bytes(needed),
            hint="-o OTHER_FOLDER/model.onnx, on a disk with more room",
        )


def _import(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise FiddlerError(f"exporting needs {name}", found=str(error), hint=install(f"hf,{extra}")) from None


@contextmanager
def _silenced() -> Iterator[None]:
    """Without torch's warnings about packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
