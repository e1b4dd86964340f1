"""A whole exported model without transformers: onnxruntime runs the graph, and a plan the Experts nodes in it.

fiddlerc export-onnx MODEL_DIR --dtype float32 -o model.onnx     onnxruntime multiplies no bfloat16 on a CPU
fiddlerc compile model.onnx --hw HW -o PLAN
python examples/onnx_engine.py PLAN model.onnx 1 17 42           greedy, from these token ids
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.external_data_helper import load_external_data_for_tensor

import fiddler_runtime


class Model:
    """The graph in pieces: what lies between two Experts nodes is one onnxruntime session."""

    def __init__(self, engine, path):
        graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
        self.engine, self.output = engine, graph.output[0].name
        weights = {tensor.name: tensor for tensor in graph.initializer}
        infos = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
        self.steps, rest = [], list(graph.node)
        while rest:
            at = next((i for i, node in enumerate(rest) if node.op_type == "Experts"), len(rest))
            nodes, node, rest = rest[:at], rest[at : at + 1], rest[at + 1 :]
            made = {name for n in nodes for name in n.output}
            wanted = {name for n in (*node, *rest) for name in n.input} | {self.output}
            used = {name for n in nodes for name in n.input if name and name not in made}
            for name in used & set(weights):
                if weights[name].data_location:  # all but the experts' weights, which the engine reads
                    load_external_data_for_tensor(weights[name], str(Path(path).parent))
            inputs, outputs = sorted(used - set(weights)), sorted(made & wanted)
            piece = onnx.helper.make_graph(
                nodes,
                "piece",
                [infos[name] for name in inputs],
                [infos[name] for name in outputs],
                [weights[name] for name in sorted(used & set(weights))],
            )
            proto = onnx.helper.make_model(piece, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
            self.steps.append((onnxruntime.InferenceSession(proto.SerializeToString()), inputs, outputs, node))

    def __call__(self, input_ids):
        """int64 [batch, sequence] -> logits [batch, sequence, vocabulary]."""
        values = {"input_ids": input_ids}
        for session, inputs, outputs, experts in self.steps:
            values.update(zip(outputs, session.run(outputs, {name: values[name] for name in inputs}), strict=True))
            for node in experts:
                layer = next(attribute.i for attribute in node.attribute if attribute.name == "layer")
                hidden, ids, weights = (torch.from_numpy(values[name]) for name in node.input[:3])
                values[node.output[0]] = self.engine.moe(layer, hidden, ids, weights).numpy()
        return values[self.output]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    plan, path, *tokens = sys.argv[1:]
    with fiddler_runtime.Engine(plan, fiddler_runtime.ExpertWeights.load(path)) as engine:
        model = Model(engine, path)
        ids = [int(token) for token in tokens]
        for _ in range(8):
            ids.append(int(np.argmax(model(np.array([ids]))[0, -1])))
        print(*ids)
        print(engine.counters()["expert_calls"])
