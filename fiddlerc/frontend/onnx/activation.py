"""What a graph computes between an expert's two multiplications, found out by computing it.

The nodes in question are run on random numbers and the result is compared with what the kernels can compute: how an
exporter or optimiser spelled it does not matter.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fiddlerc.ir import ACTIVATIONS, Activation

from .graph import Graph, import_onnx
from .layer import unsupported

Array = npt.NDArray[np.float64]
_HALF = (10, 16)  # TensorProto.FLOAT16, BFLOAT16
_FLOAT = 1


def by_attributes(where: str, kind: str, alpha: float, beta: float, limit: float | None, gated: bool) -> Activation:
    """The activation that com.microsoft's MoE nodes describe. gated: whether there are gate and up at all."""
    if kind == "swiglu" and gated:
        if (alpha, beta, limit) == (1.0, 0.0, None):
            return "silu"
        if abs(alpha - 1.702) < 1e-6 and (beta, limit) == (1.0, 7.0):
            return "gptoss"
    elif kind == "silu" and gated:
        return "silu"
    elif kind == "geglu" and gated:
        return "gelu_tanh"
    limited = "" if limit is None else f", limit {limit:g}"
    found = f"{kind} with alpha {alpha:g}, beta {beta:g}{limited}" if gated else f"{kind} without a gate"
    raise unsupported(where, found, "one of " + ", ".join(ACTIVATIONS))


def checked(where: str, name: str) -> Activation:
    """`name` if the kernels compute it. Raises FiddlerError otherwise."""
    for known in ACTIVATIONS:
        if name == known:
            return known
    raise unsupported(where, f"the activation {name!r}", "one of " + ", ".join(ACTIVATIONS))


def by_computing(
    graph: Graph, where: str, nodes: list[Any], source: str, target: str, shape: tuple[int, ...], zeros: dict[str, Any]
) -> tuple[Activation, bool]:
    """(activation, whether gate's and up's outputs take turns) of the nodes between `source` and `target`.

    shape  of source: one of its dimensions is 2I, and the last but perhaps one
    zeros  other inputs and their shapes: biases, left out here
    Raises FiddlerError if it is nothing that the kernels compute.
    """
    sums = np.random.default_rng(0).normal(0.0, 4.0, shape).astype(np.float32)
    feeds = {source: sums} | {name: np.zeros(size, np.float32) for name, size in zeros.items()}
    try:
        found = _run(graph, nodes, feeds, target)
    except Exception as error:  # whatever the nodes do to onnx's evaluator
        raise unsupported(where, f"nodes that cannot be evaluated ({str(error)[:60]})", "an activation") from None
    rows = sums.reshape(shape[0], -1).astype(np.float64)
    outputs = found.reshape(shape[0], -1).astype(np.float64)
    halves = np.split(rows, 2, axis=1)
    layouts = {"one after the other": halves, "interleaved": [rows[:, 0::2], rows[:, 1::2]]}
    for layout, (gate, up) in layouts.items():
        for name, function in _FUNCTIONS.items():
            if outputs.shape != gate.shape:
                continue
            if np.allclose(outputs, function(gate, up), rtol=1e-4, atol=1e-5):
                return name, layout == "interleaved"
            if np.allclose(outputs, function(up, gate), rtol=1e-4, atol=1e-5):
                raise unsupported(where, f"{name} of the second of two outputs, {layout}", "gate first, then up")
    raise unsupported(where, "an activation that is not known", "one of " + ", ".join(ACTIVATIONS))


def _run(graph: Graph, nodes: list[Any], feeds: dict[str, Any], target: str) -> npt.NDArray[Any]:
    """Runs nodes on feeds, in fp32 whatever the graph's type."""
    onnx = import_onnx()
    reference = importlib.import_module("onnx.reference")
    plain = [_in_float(node) for node in nodes]
    inside = {name for node in nodes for name in node.output}
    constants = {}
    for name in {name for node in nodes for name in node.input if name} - inside - set(feeds):
        value = graph.constant(name)
        if value is None:
            raise ValueError(f"{name} is no constant")
        constants[name] = value.astype(np.float32) if value.dtype.kind not in "biu" else value
    helper = onnx.helper
    infos = [helper.make_tensor_value_info(name, _FLOAT, value.shape) for name, value in feeds.items()]
    output = [helper.make_tensor_value_info(target, _FLOAT, None)]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(plain, "activation", infos, output, tensors), opset_imports=graph.opsets
    )
    result: npt.NDArray[Any] = reference.ReferenceEvaluator(model).run([target], feeds)[0]
    return result


def _in_float(node: Any) -> Any:
    """A copy of the node with fp32 where it says fp16 or bf16."""
    onnx = import_onnx()
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if copy.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
            attribute.i = _FLOAT
        if attribute.t.data_type in _HALF:
            attribute.t.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(attribute.t).astype(np.float32))
            )
    return copy


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _gptoss(gate: Array, up: Array) -> Array:
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return gate * _sigmoid(1.702 * gate) * (up + 1.0)


def _gelu(gate: Array, up: Array) -> Array:
    erf: Array = np.vectorize(math.erf)(gate / math.sqrt(2.0))
    return gate * 0.5 * (1.0 + erf) * up


def _gelu_tanh(gate: Array, up: Array) -> Array:
    return gate * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)) * up


_FUNCTIONS: dict[Activation, Callable[[Array, Array], Array]] = {
    "silu": lambda gate, up: gate * _sigmoid(gate) * up,
    "gptoss": _gptoss,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
