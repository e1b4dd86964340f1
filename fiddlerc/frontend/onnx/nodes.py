"""MoE layers that are one node: com.microsoft's MoE and QMoE, and our own fiddlerc::Experts."""

from __future__ import annotations

from typing import Any

from fiddlerc.ir import ONNX_DOMAIN, ONNX_NODE

from .activation import by_attributes, checked
from .graph import Graph, attributes, where
from .layer import Form, Layer, make_layer, unsupported

# Inputs by position (onnxruntime's ContribOperators, docs/onnx.md).
_MOE = {"fc1": 2, "fc1_bias": 3, "fc2": 4, "fc2_bias": 5, "fc3": 6, "fc3_bias": 7}
_QMOE = {
    "fc1": 2, "fc1_scales": 3, "fc1_bias": 4, "fc2": 5, "fc2_scales": 6, "fc2_bias": 7, "fc3": 8, "fc3_scales": 9,
    "fc3_bias": 10, "fc1_zero_points": 11, "fc2_zero_points": 12, "fc3_zero_points": 13,
}  # fmt: skip
_EXPERTS = {"gate_up": 3, "down": 4, "gate_up_bias": 5, "down_bias": 6}
_SUFFIXES = ("", "_bias", "_scales", "_zero_points")


def is_moe(node: Any) -> bool:
    """Whether a node is one that `read_node` reads."""
    return (node.domain == "com.microsoft" and node.op_type in ("MoE", "QMoE")) or (
        node.domain == ONNX_DOMAIN and node.op_type == ONNX_NODE
    )


def read_node(graph: Graph, node: Any) -> Layer:
    """Raises FiddlerError for weights that are no initializers, shapes that do not fit, and what cannot be run."""
    return _experts(graph, node) if node.domain == ONNX_DOMAIN else _moe(graph, node)


def _moe(graph: Graph, node: Any) -> Layer:
    place, given = where(node), attributes(node)
    inputs = _weights(graph, node, _QMOE if node.op_type == "QMoE" else _MOE)
    for needed in ("fc1", "fc2"):
        if needed not in inputs:
            raise unsupported(place, f"no {needed}_experts_weights", "an input")
    bits = _bits(place, node, given)
    fusion, separate = given.get("swiglu_fusion", 0), "fc3" in inputs
    kind = given.get("activation_type", "relu")
    activation = by_attributes(
        place,
        kind,
        given.get("activation_alpha", 1.0),
        given.get("activation_beta", 0.0),
        given.get("swiglu_limit"),
        gated=separate != (fusion in (1, 2) and kind != "silu"),
    )
    if given.get("swiglu_limit_after_activation", 0):
        raise unsupported(place, "swiglu_limit_after_activation = 1", "0")
    names = {"fc2": "down"} | ({"fc1": "gate", "fc3": "up"} if separate else {"fc1": "gate_up"})
    tensors = {names[fc] + suffix: inputs[fc + suffix] for fc in names for suffix in _SUFFIXES if fc + suffix in inputs}
    shape = graph.weights(tensors["down"])
    experts, hidden, inner = shape if shape is not None and len(shape) == 3 else (0, 0, 0)
    inner = inner * 8 // bits if bits else inner
    return make_layer(
        graph,
        place,
        tensors,
        Form(
            kind=f"com.microsoft.{node.op_type}",
            num_experts=experts,
            top_k=given.get("k", 1),
            hidden_size=hidden,
            intermediate_size=inner,
            activation=activation,
            tensors=tuple(sorted(tensors)),
            interleaved=fusion == 1,
            transposed=False,
            bits=bits,
        ),
        [tensors["down"], node.input[1]],
    )


def _experts(graph: Graph, node: Any) -> Layer:
    place, given = where(node), attributes(node)
    tensors = _weights(graph, node, _EXPERTS)
    shape = graph.weights(tensors.get("down", "")) or ()
    if len(shape) != 3 or "gate_up" not in tensors:
        raise unsupported(
            place, f"{len(node.input)} inputs", "hidden, ids, weights, gate_up [E, 2I, H], down [E, H, I]"
        )
    transposed = bool(given.get("transposed", 0))
    form = Form(
        kind="fiddlerc.Experts",
        num_experts=shape[0],
        top_k=given.get("top_k", 0),
        hidden_size=shape[2] if transposed else shape[1],
        intermediate_size=shape[1] if transposed else shape[2],
        activation=checked(place, given.get("activation", "")),
        tensors=tuple(sorted(tensors)),
        interleaved=bool(given.get("interleaved", 0)),
        transposed=transposed,
        bits=0,
    )
    return make_layer(graph, place, tensors, form, [tensors["down"], node.input[1]], given.get("layer"))


def _weights(graph: Graph, node: Any, positions: dict[str, int]) -> dict[str, str]:
    """The inputs at these positions that are there; all have to be initializers."""
    found = {name: node.input[at] for name, at in positions.items() if at < len(node.input) and node.input[at]}
    for name, value in found.items():
        if graph.weights(value) is None:
            raise unsupported(where(node), f"{name} = {value}, which is computed or an input", "an initializer")
    return found


def _bits(place: str, node: Any, given: dict[str, Any]) -> int:
    """Bits of a stored weight; 0 for those that are not quantised. All of a layer have the same."""
    if node.op_type == "MoE":
        return 0
    kind = given.get("quant_type", "int")
    bits = given.get("expert_weight_bits", 4)
    others = {given.get(f"fc{n}_expert_weight_bits", bits) for n in (1, 2, 3)} - {bits}
    if kind != "int" or bits not in (4, 8) or others:
        found = (
            f"{kind} weights" if kind != "int" else f"weights of {', '.join(map(str, sorted({bits, *others})))} bits"
        )
        raise unsupported(place, found, "integers, all of 4 or all of 8 bits")
    if given.get("weights_prepacked", -1) == 1:
        raise unsupported(place, "weights prepacked for one execution provider", "weights_prepacked = 0")
    if len(node.input) <= 6 or not node.input[3] or not node.input[6]:
        raise unsupported(place, "no scales", "fc1_scales and fc2_scales")
    return int(bits)
