"""An ONNX file's MoE layers to a ModelSpec, and what the rest of the graph tells of memory."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.text import format_bytes
from fiddlerc.ir import ONNX_METADATA, ExpertTensors, ModelSpec, OnnxDescription

from .graph import Graph, import_onnx
from .layer import Layer, number_in
from .nodes import is_moe, read_node
from .pattern import find_gathered

_UNKNOWN_CONTEXT = 2**31 - 1
_PAST = re.compile(r"past.*(key|value)", re.IGNORECASE)
_BF16, _FP32 = 2, 4


def load_file(path: Path) -> ModelSpec:
    """An ONNX file whose experts can be run. kv_bytes_per_token is 0 if the graph does not tell.

    Raises FiddlerError for a file that is not valid, has no MoE layer, or has some that cannot be run.
    """
    graph = Graph(path)
    try:
        return _read(graph)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # A node without the inputs that its type has, attributes of other types, names that are no text.
        raise FiddlerError(
            f"cannot make sense of the graph in {path}",
            found=str(error)[:80],
            expected="nodes as their operators define them",
            hint="python -c 'import onnx, sys; onnx.checker.check_model(sys.argv[1])' FILE",
        ) from None


def _read(graph: Graph) -> ModelSpec:
    path = graph.path
    layers = [read_node(graph, node) for node in graph.nodes if is_moe(node)] or find_gathered(graph)
    if not layers:
        raise FiddlerError(
            f"no MoE layer in {path}",
            found=f"{len(graph.nodes)} nodes, none of com.microsoft MoE or QMoE, fiddlerc Experts, or experts' weights "
            "gathered for a MatMul",
            expected="one of these forms",
            hint="fiddlerc export-onnx MODEL_DIR -o FILE.onnx writes one; docs/onnx.md says what else is read",
        )
    form = layers[0].form
    for layer in layers:
        if layer.form != form:
            raise _differ(layers[0], layer)
    numbers, notes = _numbers(layers)
    if form.bits:
        notes += (_quantized(layers, path),)
    # All of a layer's tensors have one pattern, under which the plan knows them.
    pattern = "layers.{layer}.experts."
    names = {name: pattern + name for name in ("gate", "up", "down")}
    if "gate_up" in form.tensors:
        names["gate"] = names["up"] = pattern + "gate_up"
    if form.bias:
        names |= {f"{name}_bias": f"{names[name]}_bias" for name in ("gate", "up", "down")}
    initializers = {
        (pattern + name).format(layer=number): initializer
        for number, layer in zip(numbers, layers, strict=True)
        for name, initializer in zip(form.tensors, layer.initializers, strict=True)
    }
    tensors = ExpertTensors(
        **names, interleaved=form.interleaved, transposed=form.transposed, initializers=initializers, notes=notes
    )
    vocab = _vocabulary(graph)
    spec = ModelSpec(
        name=path.stem,
        architecture=f"ONNX {form.kind}",
        num_layers=max([*numbers, *(number for name in graph.initializers if (number := number_in(name)) is not None)])
        + 1,
        moe_layers=numbers,
        num_experts=form.num_experts,
        top_k=form.top_k,
        hidden_size=form.hidden_size,
        intermediate_size=form.intermediate_size,
        activation=form.activation,
        expert_bias=form.bias,
        vocab_size=vocab,
        max_context=_UNKNOWN_CONTEXT,
        expert_tensors=tensors,
        identity={"hidden_size": form.hidden_size, "num_experts_per_tok": form.top_k},
        non_expert_bytes=_other_bytes(graph, set(initializers.values())),
        kv_bytes_per_token=_kv_bytes(graph),
        workspace_bytes_per_token=_workspace_bytes(graph, layers[0], vocab),
    )
    if ONNX_METADATA not in graph.metadata:
        return spec
    where = f"{ONNX_METADATA} in the metadata of {path}"
    described = strict.decode(OnnxDescription, strict.parse(graph.metadata[ONNX_METADATA].encode(), where), where)
    return dataclasses.replace(spec, **{f.name: getattr(described, f.name) for f in dataclasses.fields(described)})


def _numbers(layers: Sequence[Layer]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The decoder layers' numbers, and what to say if they are not known."""
    found = tuple(layer.number for layer in layers)
    known = [number for number in found if number is not None]
    if len(known) == len(found) and known == sorted(set(known)):
        return tuple(known), ()
    note = "the ONNX file's names do not tell which layers have experts: MoE layers are numbered as they come, from 0"
    return tuple(range(len(layers))), (note,)


def _quantized(layers: Sequence[Layer], path: Path) -> str:
    form = layers[0].form
    weights = 3 * form.hidden_size * form.intermediate_size * form.num_experts * len(layers)
    return (
        f"the experts in {path.name} are int{form.bits}, {format_bytes(weights * form.bits // 8)} and scales; the "
        f"kernels compute in bf16, so they are dequantised as they are loaded: {format_bytes(2 * weights)} in memory, "
        "no faster than bf16 experts, and each weight rounded once more"
    )


def _differ(one: Layer, other: Layer) -> FiddlerError:
    fields = [f.name for f in dataclasses.fields(one.form)]
    different = next(name for name in fields if getattr(one.form, name) != getattr(other.form, name))
    return FiddlerError(
        "MoE layers of different forms in one file",
        found=f"{different.replace('_', ' ')} {getattr(other.form, different)} at {other.where}",
        expected=f"{getattr(one.form, different)}, as at {one.where}",
    )


def _vocabulary(graph: Graph) -> int:
    """Entries of the embedding: what a graph input of integers picks from. 1 if there is none."""
    integers = {value.name for value in graph.inputs if value.type.tensor_type.elem_type in (6, 7)}
    for node in graph.nodes:
        shape = graph.weights(node.input[0]) if node.op_type == "Gather" else None
        if shape is not None and len(shape) == 2 and node.input[1] in integers:
            return shape[0]
    return 1


def _other_bytes(graph: Graph, experts: set[str]) -> int:
    """Everything in the file that is not a routed expert's, as it is stored."""
    return sum(
        math.prod(tensor.dims) * _element_bits(tensor.data_type) // 8
        for name, tensor in graph.initializers.items()
        if name not in experts
    )


def _element_bits(data_type: int) -> int:
    packed = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # (U)INT4, FLOAT4E2M1, (U)INT2
    return packed.get(data_type) or 8 * int(import_onnx().helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _kv_bytes(graph: Graph) -> int:
    """Keys and values per token, if inputs past_key_values.N.{key,value} [batch, heads, length, size] tell; else 0."""
    total = 0
    for value in graph.inputs:
        shape = graph.shape(value.name)
        if _PAST.search(value.name) and shape is not None and len(shape) == 4:
            heads, size = shape[1], shape[3]
            if not isinstance(heads, int) or not isinstance(size, int):
                return 0
            total += heads * size * _element_bits(value.type.tensor_type.elem_type) // 8
    return total


def _workspace_bytes(graph: Graph, layer: Layer, vocab: int) -> int:
    """As frontend.sizes counts it, an upper bound; queries, keys, values and attention's result are each taken as wide
    as the widest matrix outside the experts and the vocabulary."""
    form = layer.form
    matrices = [tensor.dims for tensor in graph.initializers.values() if len(tensor.dims) == 2]
    width = max((size for dims in matrices if vocab not in dims for size in dims), default=form.hidden_size)
    router = 2 * _FP32 * form.num_experts + 12 * form.top_k
    expert = 6 * form.hidden_size + 6 * max(form.intermediate_size, width)
    return 10 * form.hidden_size + _BF16 * 4 * width + router + expert + 6 * vocab


def with_cache(spec: ModelSpec, source: str, kv_bytes_per_token: int | None) -> ModelSpec:
    """The model with the KV cache's size that the user gave, or with its own.

    Raises FiddlerError for a Hugging Face model, whose size is known, and for an ONNX file that does not tell it.
    """
    if kv_bytes_per_token is not None and spec.from_onnx:
        return dataclasses.replace(spec, kv_bytes_per_token=kv_bytes_per_token)
    if kv_bytes_per_token is not None:
        raise FiddlerError(
            "--kv-bytes is for ONNX files",
            found=f"the model {source}",
            expected="no --kv-bytes: its size is known",
            hint="leave out --kv-bytes",
        )
    if spec.from_onnx and not spec.cache_bytes(1):
        raise FiddlerError(
            f"{source} does not tell how large the KV cache is",
            found="no inputs past_key_values.* of fixed heads and sizes",
            expected="--kv-bytes: bytes per token, keys and values of all layers",
            hint="--kv-bytes BYTES, which is 4 x layers x key-value heads x head size in bf16; 0 if there is none",
        )
    return spec
