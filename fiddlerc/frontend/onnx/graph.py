"""An ONNX graph without its weights, and how its nodes hang together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fiddler_runtime.errors import FiddlerError, install
from fiddler_runtime.onnx_file import DATA_FIELDS, GRAPH_INITIALIZER, MODEL_GRAPH, Wire, read_initializers
from fiddler_runtime.safetensors_header import DOWNLOAD_AGAIN

# Elements up to this size stay in the graph: the constants that shapes, top-k and activations are made of.
_SMALL_BYTES = 4096
_LENGTH_DELIMITED = 2


class Graph:
    """A graph's nodes by what they produce and consume. Nodes are onnx.NodeProto, in the file's order."""

    def __init__(self, path: Path) -> None:
        onnx = import_onnx()
        self.path = path
        self.tensors = read_initializers(path)  # also checks the file, and that its external data is there
        try:
            model = onnx.load_model_from_string(_without_weights(path))
        except Exception as error:  # protobuf's DecodeError, which has no public home
            raise FiddlerError(
                f"{path} is not a valid ONNX file", found=str(error).strip()[:80], hint=DOWNLOAD_AGAIN
            ) from None
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.opsets = list(model.opset_import)
        graph = model.graph
        self.nodes = list(graph.node)
        self.inputs, self.outputs = list(graph.input), list(graph.output)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self._shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input, *graph.output)}

    def shape(self, value: str) -> tuple[int | str, ...] | None:
        """A value's shape, as far as the file tells: sizes, and names of those that vary."""
        if value in self.initializers:
            return tuple(self.initializers[value].dims)
        return self._shapes.get(value)

    def weights(self, value: str) -> tuple[int, ...] | None:
        """The shape of an initializer; None for any other value."""
        return tuple(self.initializers[value].dims) if value in self.initializers else None

    def constant(self, value: str) -> npt.NDArray[Any] | None:
        """A small constant's value."""
        numpy_helper = import_onnx().numpy_helper
        node = self.producer.get(value)
        tensor = self.initializers.get(value)
        if node is not None and node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
                return np.asarray(import_onnx().helper.get_attribute_value(attribute))
            tensor = attribute.t if attribute.name == "value" else None
        if tensor is None or tensor.data_location:
            return None
        try:
            found: npt.NDArray[Any] = numpy_helper.to_array(tensor)
        except ValueError:  # left out as large
            return None
        return found

    def source(self, value: str, through: frozenset[str]) -> str:
        """The value that `value` is another view of, going up through nodes of these types."""
        while (node := self.producer.get(value)) is not None and node.op_type in through:
            if node.op_type == "Concat" and len(node.input) > 1:
                break
            value = node.input[0]
        return value

    def upstream(self, values: list[str]) -> Iterator[str]:
        """Everything that values are computed from, the nearest first."""
        seen = set(values)
        while values:
            yield from values
            nodes = [self.producer[value] for value in values if value in self.producer]
            values = [name for node in nodes for name in node.input if name and name not in seen]
            values = list(dict.fromkeys(values))
            seen |= set(values)


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes as Python values; text as str."""
    helper = import_onnx().helper
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in values.items()
    }


def where(node: Any) -> str:
    """A node for people."""
    return f"the node {node.name or node.output[0]} ({node.domain + '::' if node.domain else ''}{node.op_type})"


def import_onnx() -> Any:
    """The onnx package. Raises FiddlerError if there is none."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise FiddlerError(
            "reading ONNX files needs the onnx package", found=str(error), hint=install("onnx")
        ) from None
    return onnx


def _shape(value: Any) -> tuple[int | str, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)


def _without_weights(path: Path) -> bytes:
    """The file's bytes, initializers' elements left out where they are many: the weights never enter memory."""
    with path.open("rb") as file:
        wire = Wire(file, f"the ONNX file {path}")

        def message(start: int, end: int, depth: int = 0) -> bytes:
            parts = []
            for found in wire.fields(start, end):
                size = found.end - found.start
                if depth == 2 and found.number in DATA_FIELDS and size > _SMALL_BYTES:
                    continue
                nested = found.number == (MODEL_GRAPH, GRAPH_INITIALIZER, 0)[depth] and found.wire == _LENGTH_DELIMITED
                body = message(found.start, found.end, depth + 1) if nested else wire.read(found)
                length = _varint(len(body)) if found.wire == _LENGTH_DELIMITED else b""
                parts += [_varint(found.number << 3 | found.wire), length, body]
            return b"".join(parts)

        return message(0, wire.size)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
