"""Engine.moe of plans compiled from ONNX files, on every strategy, against onnxruntime on the same file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_samples
import pytest
import runtime_samples
import torch
from onnx import TensorProto, helper

from fiddler_runtime.engine import Engine
from fiddler_runtime.weights import ExpertWeights
from fiddlerc import frontend

ort = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*rounded to bf16 while they are read:fiddler_runtime.FiddlerWarning"),
]
EVERY_WAY = {"cpu": ("cpu",), "resident": ("resident",), "streamed": ("streamed",), "mixed": None}
TOKENS = 70
# Roundings to bf16, 2^-9 relative each: gate, up, silu, product, an expert's result, the sum's result.
ROUNDINGS = 6


@dataclass
class Case:
    """A file, a call of one of its layers, and what onnxruntime gives for it.

    experts      gate_up [E, 2I, H] and down as the file has them, before they are rounded to bf16
    exact        whether they are bf16 already
    biases       gate_up [E, 2I] and down [E, H], or none
    gptoss       whether the activation is gpt-oss's instead of SwiGLU
    """

    path: Path
    layer: int
    hidden: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    expected: np.ndarray
    experts: tuple[np.ndarray, np.ndarray]
    exact: bool = True
    biases: tuple[np.ndarray, np.ndarray] | None = None
    gptoss: bool = False


def routing(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """hidden, router logits, ids and weights: softmax over the k largest, as normalize_routing_weights = 1 has it."""
    rng = np.random.default_rng(seed)
    hidden = onnx_samples.round_bf16(rng.standard_normal((TOKENS, onnx_samples.HIDDEN)))
    logits = rng.standard_normal((TOKENS, onnx_samples.EXPERTS)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, : onnx_samples.TOP_K]
    chosen = np.exp(np.take_along_axis(logits, ids, axis=1).astype(np.float64))
    return hidden, logits, ids, (chosen / chosen.sum(1, keepdims=True)).astype(np.float32)


def run(model: Any, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(outputs, feeds))


def moe_case(folder: Path) -> Case:
    model, experts = onnx_samples.two_moe_layers()
    hidden, logits, ids, weights = routing(1)
    model.graph.output.append(helper.make_tensor_value_info("y1", TensorProto.FLOAT, None))
    expected = run(model, {"x": hidden, "router_1": logits, "router_3": logits}, ["y1"])[0]
    path = onnx_samples.save(model, folder / "moe.onnx", save_as_external_data=True, location="moe.data")
    return Case(path, 1, hidden, ids, weights, expected, experts[1])


def gptoss_case(folder: Path) -> Case:
    alike = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
    model, experts = onnx_samples.two_moe_layers(biases=True, **alike)
    hidden, logits, ids, weights = routing(4)
    # Large enough to be limited now and then.
    hidden = onnx_samples.round_bf16(4 * hidden)
    model.graph.output.append(helper.make_tensor_value_info("y1", TensorProto.FLOAT, None))
    expected = run(model, {"x": hidden, "router_1": logits, "router_3": logits}, ["y1"])[0]
    path = onnx_samples.save(model, folder / "gptoss.onnx")
    biases = onnx_samples.random_biases(1)
    return Case(path, 1, hidden, ids, weights, expected, experts[1], biases=biases, gptoss=True)


def qmoe_case(folder: Path, bits: int, block: int, zero_points: bool) -> Case:
    model, experts = onnx_samples.one_qmoe_layer(bits, block, zero_points=zero_points)
    hidden, logits, ids, weights = routing(2)
    expected = run(model, {"x": hidden, "router_0": logits})[0]
    return Case(onnx_samples.save(model, folder / "q.onnx"), 0, hidden, ids, weights, expected, experts, exact=False)


def node_case(folder: Path) -> Case:
    """onnxruntime does not know our node: it runs the same experts as a MoE node."""
    same, experts = onnx_samples.two_moe_layers()
    hidden, logits, ids, weights = routing(3)
    same.graph.output.append(helper.make_tensor_value_info("y1", TensorProto.FLOAT, None))
    expected = run(same, {"x": hidden, "router_1": logits, "router_3": logits}, ["y1"])[0]
    path = onnx_samples.save(onnx_samples.experts_node(experts), folder / "node.onnx")
    return Case(path, 1, hidden, ids, weights, expected, experts[1])


def exported_case(folder: Path, family: str, optimize: bool) -> Case:
    path = folder / "exported.onnx"
    reference = onnx_samples.export_family(family, path, optimize=optimize)
    model = onnx.load(path)
    producer = {name: node for node in model.graph.node for name in node.output}
    consumers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    topk = [node for node in model.graph.node if node.op_type == "TopK"][-1]
    hidden = producer[producer[topk.input[0]].input[0]].input[0]
    # Downstream of the last layer's second gathered matrix: * routing weights, then the sum over the choices.
    gather = [node for node in model.graph.node if node.op_type == "GatherND" and _is_matrix(model, producer, node)][-1]
    value, weights = gather.output[0], ""
    while (node := consumers[value][0]).op_type != "ReduceSum":
        if node.op_type == "Mul":
            weights = next(name for name in node.input if name != value)
        value = node.output[0]
    wanted = [hidden, topk.output[1], weights, node.output[0]]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    ids = np.arange(3, 27).reshape(2, 12)
    x, chosen, scale, expected = run(model, {"input_ids": ids}, wanted)
    layer = frontend.load_model(str(path)).moe_layers[-1]
    module = reference.model.layers[layer].mlp.experts
    gate_up, down = module.gate_up_proj.detach().numpy(), module.down_proj.detach().numpy()
    gptoss, biases = family == "gpt_oss", None
    if gptoss:
        gate_up, down = gate_up.transpose(0, 2, 1), down.transpose(0, 2, 1)
        first = module.gate_up_proj_bias.detach().numpy()
        gate_up, first = (np.concatenate([m[:, 0::2], m[:, 1::2]], axis=1) for m in (gate_up, first))
        biases = (first, module.down_proj_bias.detach().numpy())
    hidden_states = x.reshape(-1, x.shape[-1])
    scales = scale.reshape(chosen.shape)
    return Case(path, layer, hidden_states, chosen, scales, expected, (gate_up, down), biases=biases, gptoss=gptoss)


def _is_matrix(model: Any, producer: dict[str, Any], node: Any) -> bool:
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    source = node.input[0]
    while source in producer and producer[source].op_type == "Transpose":
        source = producer[source].input[0]
    return len(shapes.get(source, ())) == 3


CASES: dict[str, Callable[[Path], Case]] = {
    "MoE": moe_case,
    "MoE, gpt-oss": gptoss_case,
    "QMoE int4": lambda folder: qmoe_case(folder, 4, 0, False),
    "QMoE int4, zero points": lambda folder: qmoe_case(folder, 4, 0, True),
    "QMoE int4, blocks": lambda folder: qmoe_case(folder, 4, 32, True),
    "QMoE int8": lambda folder: qmoe_case(folder, 8, 0, True),
    "Experts": node_case,
    "exported": lambda folder: exported_case(folder, "mixtral", False),
    "exported, optimised": lambda folder: exported_case(folder, "qwen3_moe", True),
    "exported, gpt-oss": lambda folder: exported_case(folder, "gpt_oss", True),
}
SLOW = ("exported, gpt-oss",)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module", params=EVERY_WAY)
def engine(request: pytest.FixtureRequest, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    spec = frontend.load_model(str(case.path))
    plan = runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "plan", spec)
    with Engine(plan, ExpertWeights.load(case.path), strategies=EVERY_WAY[request.param]) as opened:
        yield opened


def test_equals_onnxruntime_on_every_strategy(engine: Engine, case: Case) -> None:
    # The engine rounds its input to bf16, onnxruntime does not.
    hidden = torch.from_numpy(case.hidden)
    out = engine.moe(case.layer, hidden, torch.from_numpy(case.ids), torch.from_numpy(case.weights)).double().numpy()
    assert np.abs(case.expected).max() > 0.5, "the experts contribute"
    assert (np.abs(out - case.expected) <= bound(case)).all()
    ran = {name for name, count in engine.counters()["expert_calls"].items() if count}
    assert ran <= set(engine.strategies)
    assert len(ran) > 1 or len(engine.strategies) == 1


def bound(case: Case) -> np.ndarray:
    """How far bf16 may be from exact, per output [T, H]: sums of the absolute terms that are rounded.

    The result's roundings as in test_engine_moe. Where the inputs or the weights are no bf16, gate and up are off by
    2^-9 of their absolute terms for each of the two, silu's slope is at most 1.1, and down's weights are rounded too.
    """
    gate_up, down = (matrix.astype(np.float64) for matrix in case.experts)
    half = gate_up.shape[1] // 2
    first, second = case.biases or (np.zeros(gate_up.shape[:2]), np.zeros(down.shape[:2]))
    inexact = float(not np.array_equal(onnx_samples.round_bf16(case.hidden), case.hidden)) + float(not case.exact)
    roundings = ROUNDINGS + (not case.exact)
    size = np.zeros(case.expected.shape)
    for token, x in enumerate(case.hidden.astype(np.float64)):
        for expert, weight in zip(case.ids[token], case.weights[token].astype(np.float64), strict=True):
            sums = gate_up[expert] @ x + first[expert]
            terms = np.abs(gate_up[expert]) @ np.abs(x) + np.abs(first[expert])
            gate, up = sums[:half], np.abs(sums[half:])
            if case.gptoss:  # |up + 1| <= |up| + 1; the limits only make less of everything
                gated, up = (
                    np.minimum(gate, 7.0) / (1.0 + np.exp(-1.702 * np.minimum(gate, 7.0))),
                    np.minimum(up, 7.0) + 1,
                )
            else:
                gated = gate / (1.0 + np.exp(-gate))
            off = inexact * (1.1 * terms[:half] * up + np.abs(gated) * terms[half:])
            inner = np.abs(down[expert]) @ (roundings * np.abs(gated) * up + off)
            size[token] += weight * (inner + roundings * np.abs(second[expert]))
    return 2.0**-9 * size + 1e-5
