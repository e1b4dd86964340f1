"""What all forms of MoE layers in a graph come down to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fiddler_runtime.errors import FiddlerError
from fiddlerc.ir import Activation

from .graph import Graph

_LAYER = re.compile(r"(?:^|[./])(?:layers?|h|blocks)[./](\d+)[./]")


@dataclass(frozen=True)
class Form:
    """What has to be the same in all layers of a model.

    kind         the kind of node, for people
    tensors      which tensors an expert has: gate_up (or gate and up) and down, with _bias, _scales and _zero_points
    interleaved, transposed  as in ExpertTensors
    bits         of a weight as stored: 4 or 8 if quantised, else 0
    """

    kind: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    tensors: tuple[str, ...]
    interleaved: bool
    transposed: bool
    bits: int

    @property
    def bias(self) -> bool:
        """Whether experts have biases: all three or none."""
        return "down_bias" in self.tensors


@dataclass(frozen=True)
class Layer:
    """One MoE layer. number: the decoder layer's, if names tell; initializers: of each of form.tensors."""

    where: str
    number: int | None
    form: Form
    initializers: tuple[str, ...]


def make_layer(
    graph: Graph, where: str, tensors: dict[str, str], form: Form, named: list[str], number: int | None = None
) -> Layer:
    """A layer whose weights have the shapes that its form says; `named`: values whose names may tell its number.

    Raises FiddlerError if they have others, or some matrices have biases and others do not.
    """
    rows, width = form.intermediate_size, form.hidden_size
    for name, (outputs, inputs) in {
        "gate_up": (2 * rows, width), "gate": (rows, width), "up": (rows, width), "down": (width, rows),
    }.items():  # fmt: skip
        if name not in tensors:
            continue
        stored = (inputs, outputs) if form.transposed else (outputs, inputs * (form.bits or 8) // 8)
        shapes: dict[str, tuple[int, ...]] = {name: (form.num_experts, *stored)}
        if any(tensor.endswith("_bias") for tensor in tensors):
            shapes[f"{name}_bias"] = (form.num_experts, outputs)
        for tensor, shape in shapes.items():
            if tensor not in tensors:
                raise unsupported(where, f"no bias for {name}", "biases for all of an expert's matrices, or for none")
            found = graph.weights(tensors[tensor]) or ()
            if found != shape or 0 in shape:
                raise unsupported(where, f"{tensors[tensor]} of shape {list(found)}", f"{tensor} {list(shape)}")
    if not 1 <= form.top_k <= form.num_experts:
        raise unsupported(
            where, f"top-k {form.top_k}", f"1 to {form.num_experts}, its experts, the same for all tokens"
        )
    for value in named:
        number = layer_number(graph, [value]) if number is None else number
    return Layer(where, number, form, tuple(tensors[name] for name in form.tensors))


def layer_number(graph: Graph, values: list[str]) -> int | None:
    """The decoder layer's number in the name of the nearest initializer that has one, upstream of `values`."""
    for value in graph.upstream(values):
        if value in graph.initializers and (number := number_in(value)) is not None:
            return number
    return None


def number_in(name: str) -> int | None:
    """The decoder layer's number in an initializer's name, such as model.layers.3.mlp.gate.weight."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def unsupported(where: str, found: str, expected: str) -> FiddlerError:
    """The error for an MoE layer that is recognised but cannot be run."""
    return FiddlerError(
        f"cannot run the experts of {where}",
        found=found,
        expected=expected,
        hint="docs/onnx.md lists what is supported",
    )
