"""MoE layers as torch.onnx writes them for transformers' batched_mm: weights gathered per token, then multiplied.

TopK ─► ids ─┬─► Gather(gate_up) ─► MatMul ─► activation ─┬─► MatMul ─► * routing weights ─► sum
             └─► Gather(down) ────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .activation import by_computing
from .graph import Graph, attributes, where
from .layer import Form, Layer, make_layer, unsupported

# Nodes that change how values are laid out, not the values.
_VIEWS = frozenset({"Identity", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Cast", "CastLike", "Concat", "Transpose"})
_PROBE = 4


@dataclass(frozen=True)
class _Gathered:
    """One expert matrix per token: the node that gathers it, of which initializer, and the multiplication it goes to.

    side  which of MatMul's inputs it is: 0 multiplies [out, in] by columns, 1 rows by [in, out]
    """

    node: Any
    weights: str
    ids: str
    matmul: Any
    side: int
    transposed: bool


def find_gathered(graph: Graph) -> list[Layer]:
    """Every pair of gathered expert matrices, in the graph's order. Raises FiddlerError for half a pair."""
    by_ids: dict[str, list[_Gathered]] = {}
    for node in graph.nodes:
        gathered = _gathered(graph, node)
        if gathered is not None:
            by_ids.setdefault(gathered.ids, []).append(gathered)
    return [_layer(graph, ids, found) for ids, found in by_ids.items()]


def _gathered(graph: Graph, node: Any) -> _Gathered | None:
    if node.op_type not in ("GatherND", "Gather") or attributes(node).get(
        "axis", attributes(node).get("batch_dims", 0)
    ):
        return None
    weights = _untouched(graph, node.input[0])
    if len(graph.weights(weights) or ()) != 3:
        return None
    value, transposed = node.output[0], False
    while len(users := graph.consumers[value]) == 1 and users[0].op_type in ("Transpose", "Identity", "Cast"):
        order = attributes(users[0]).get("perm", [0, 1, 2])
        transposed ^= list(order) == [0, 2, 1]
        value = users[0].output[0]
    matmuls = [user for user in users if user.op_type == "MatMul"]
    if len(matmuls) != 1:
        return None
    ids = graph.source(node.input[1], _VIEWS)
    return _Gathered(node, weights, ids, matmuls[0], list(matmuls[0].input).index(value), transposed)


def _layer(graph: Graph, ids: str, found: list[_Gathered]) -> Layer:
    place = where(found[0].node)
    pairs = [(a, b) for a in found for b in found if a is not b and _between(graph, a, b) is not None]
    if len(found) != 2 or len(pairs) != 1:
        raise unsupported(place, f"{len(found)} gathered matrices of {ids}", "two: gate with up, and down")
    first, second = pairs[0]
    nodes = _between(graph, first, second) or []
    # [out, in] on the left, or [in, out] on the right; a Transpose in between turns one into the other.
    stored = {(g.side == 1) != g.transposed for g in pairs[0]}
    if len(stored) != 1:
        raise unsupported(place, "one matrix [outputs, inputs] and one [inputs, outputs]", "both alike")
    transposed = stored.pop()
    shape = graph.weights(first.weights) or ()
    experts, rows, hidden = (shape[0], shape[2], shape[1]) if transposed else shape
    if rows % 2:
        raise unsupported(place, f"{rows} outputs of {first.weights}", "an even number, gate's and up's")
    tensors = {"gate_up": first.weights, "down": second.weights}
    biases = _gathered_biases(graph, nodes, ids)
    if biases:
        tensors["gate_up_bias"] = next(iter(biases.values()))
    if (bias := _down_bias(graph, second, ids)) is not None:
        tensors["down_bias"] = bias
    count = _tokens(graph, first.matmul.output[0])
    zeros = dict.fromkeys(biases, (count, rows))
    sums = (count, 1, rows) if first.side == 1 else (count, rows, 1)
    target = second.matmul.input[1 - second.side]
    activation, interleaved = by_computing(graph, place, nodes, first.matmul.output[0], target, sums, zeros)
    form = Form(
        kind="TopK + GatherND",
        num_experts=experts,
        top_k=_top_k(graph, ids),
        hidden_size=hidden,
        intermediate_size=rows // 2,
        activation=activation,
        tensors=tuple(sorted(tensors)),
        interleaved=interleaved,
        transposed=transposed,
        bits=0,
    )
    return make_layer(graph, place, tensors, form, [first.weights, ids])


def _between(graph: Graph, first: _Gathered, second: _Gathered) -> list[Any] | None:
    """The nodes on the way from the first multiplication to the second, in order; None if there is no such way."""
    start = first.matmul.output[0]
    target = second.matmul.input[1 - second.side]
    wanted, pending, reached = set(), [target], False
    while pending:
        value = pending.pop()
        if value == start:
            reached = True
            continue
        node = graph.producer.get(value)
        if node is None or node.output[0] in wanted or _is_gather(graph, node):
            continue
        wanted.add(node.output[0])
        if len(wanted) > 100:
            return None
        pending += [name for name in node.input if name]
    return [node for node in graph.nodes if node.output[0] in wanted] if reached else None


def _is_gather(graph: Graph, node: Any) -> bool:
    return node.op_type in ("GatherND", "Gather") and graph.weights(_untouched(graph, node.input[0])) is not None


def _gathered_biases(graph: Graph, nodes: list[Any], ids: str) -> dict[str, str]:
    """Gathered vectors that the nodes use: the value -> its initializer [E, n]."""
    found = {}
    for value in {name for node in nodes for name in node.input}:
        node = graph.producer.get(value)
        if node is not None and _is_gather(graph, node) and graph.source(node.input[1], _VIEWS) == ids:
            found[value] = _untouched(graph, node.input[0])
    return found


def _down_bias(graph: Graph, second: _Gathered, ids: str) -> str | None:
    """The initializer of a bias that is added to the second multiplication's result."""
    value = second.matmul.output[0]
    for _ in range(4):
        users = graph.consumers[value]
        if len(users) != 1:
            return None
        if users[0].op_type == "Add":
            return next(iter(_gathered_biases(graph, users, ids).values()), None)
        if users[0].op_type not in _VIEWS:
            return None
        value = users[0].output[0]
    return None


def _untouched(graph: Graph, value: str) -> str:
    """The value behind transposes that do not transpose."""
    while (node := graph.producer.get(value)) is not None and node.op_type in ("Identity", "Transpose"):
        order = list(attributes(node).get("perm", []))
        if node.op_type == "Transpose" and order != list(range(len(order))):
            break
        value = node.input[0]
    return value


def _tokens(graph: Graph, value: str) -> int:
    """How many rows to compute with: as many as the graph was exported for, if it is for a fixed number."""
    shape = graph.shape(value)
    return shape[0] if shape and isinstance(shape[0], int) else _PROBE


def _top_k(graph: Graph, ids: str) -> int:
    """How many ids a token has; 0 if that is not fixed."""
    node = graph.producer.get(ids)
    if node is not None and node.op_type == "TopK" and (value := graph.constant(node.input[1])) is not None:
        return int(value.ravel()[0])
    shape = graph.shape(ids)
    last = shape[-1] if shape and len(shape) > 1 else 0
    return last if isinstance(last, int) else 0
