"""ONNX files to specs: which layers are found, what the rest of the graph tells, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_samples
import pytest
from onnx import TensorProto, helper, numpy_helper

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import ModelSpec
from fiddlerc.frontend import load_model, with_cache


def spec_of(model: Any, folder: Path) -> ModelSpec:
    return load_model(str(onnx_samples.save(model, folder / "model.onnx")))


def error_of(model: Any, folder: Path) -> str:
    with pytest.raises(FiddlerError) as caught:
        spec_of(model, folder)
    return caught.value.line


def test_moe_nodes(tmp_path: Path) -> None:
    spec = spec_of(onnx_samples.two_moe_layers()[0], tmp_path)
    assert (spec.name, spec.architecture) == ("model", "ONNX com.microsoft.MoE")
    assert (spec.moe_layers, spec.num_layers) == ((1, 3), 4)
    assert (spec.num_experts, spec.top_k, spec.hidden_size, spec.intermediate_size) == (6, 2, 64, 96)
    assert (spec.activation, spec.expert_bias) == ("silu", False)
    names = spec.expert_tensors
    assert names.gate == names.up
    assert (names.interleaved, names.transposed, names.notes) == (True, False, ())
    assert names.initializers["layers.3.experts.gate_up"] == "model.layers.3.moe.experts.gate_up_proj.weight"
    assert spec.from_onnx


@pytest.mark.parametrize(
    ("attributes", "activation", "interleaved"),
    [
        ({"swiglu_fusion": 2}, "silu", False),
        ({"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}, "gptoss", True),
        ({"activation_type": "geglu"}, "gelu_tanh", True),
    ],
)
def test_activations_of_moe_nodes(tmp_path: Path, attributes: dict, activation: str, interleaved: bool) -> None:
    spec = spec_of(onnx_samples.two_moe_layers(**attributes)[0], tmp_path)
    assert (spec.activation, spec.expert_tensors.interleaved) == (activation, interleaved)


def test_quantised_experts_come_with_a_note_of_what_they_cost(tmp_path: Path) -> None:
    spec = spec_of(onnx_samples.one_qmoe_layer(4, 32, zero_points=True)[0], tmp_path)
    assert spec.intermediate_size == 96
    assert spec.expert_tensors.initializers == {
        f"layers.0.experts.{name}{suffix}": f"{fc}.{letter}"
        for name, fc in (("gate_up", "fc1"), ("down", "fc2"))
        for suffix, letter in (("", "q"), ("_scales", "s"), ("_zero_points", "z"))
    }
    (unnamed, note) = spec.expert_tensors.notes
    assert "numbered as they come" in unnamed
    # 3 x 64 x 96 x 6 weights of half a byte.
    assert "are int4, 54.0 KiB and scales" in note
    assert "216.0 KiB in memory" in note


def test_our_own_nodes(tmp_path: Path) -> None:
    layers = {2: onnx_samples.random_experts(1), 5: onnx_samples.random_experts(2)}
    spec = spec_of(onnx_samples.experts_node(layers), tmp_path)
    assert (spec.architecture, spec.moe_layers) == ("ONNX fiddlerc.Experts", (2, 5))
    transposed = {2: tuple(np.ascontiguousarray(m.transpose(0, 2, 1)) for m in layers[2])}
    spec = spec_of(onnx_samples.experts_node(transposed, transposed=1, interleaved=1), tmp_path)  # type: ignore[arg-type]
    assert (spec.hidden_size, spec.intermediate_size) == (64, 96)
    assert (spec.expert_tensors.transposed, spec.expert_tensors.interleaved) == (True, True)


def test_the_rest_of_the_graph_tells_of_memory(tmp_path: Path) -> None:
    model, _ = onnx_samples.two_moe_layers()
    table = numpy_helper.from_array(np.zeros((500, 64), np.float16), "model.embed_tokens.weight")
    model.graph.initializer.extend(
        [table, numpy_helper.from_array(np.zeros((64, 200), np.float32), "model.layers.5.w")]
    )
    model.graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"]))
    model.graph.node.insert(0, helper.make_node("Gather", [table.name, "input_ids"], ["embedded"]))
    for layer in range(6):
        for kind in ("key", "value"):
            name, shape = f"past_key_values.{layer}.{kind}", ["b", 2, "past", 16]
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape))
    spec = spec_of(model, tmp_path)
    assert spec.num_layers == 6
    assert spec.vocab_size == 500
    assert spec.non_expert_bytes == 500 * 64 * 2 + 64 * 200 * 4
    assert spec.kv_bytes_per_token == 2 * 6 * 2 * 16 * 2
    assert spec.workspace_bytes_per_token == 10 * 64 + 8 * 200 + 8 * 6 + 12 * 2 + 6 * 64 + 6 * 200 + 6 * 500
    assert with_cache(spec, "model.onnx", None) == spec
    assert with_cache(spec, "model.onnx", 7).kv_bytes_per_token == 7


def test_an_unknown_kv_cache_is_not_guessed(tmp_path: Path) -> None:
    spec = spec_of(onnx_samples.two_moe_layers()[0], tmp_path)
    with pytest.raises(FiddlerError, match="does not tell how large the KV cache is"):
        with_cache(spec, "model.onnx", None)
    assert with_cache(spec, "model.onnx", 0).kv_bytes_per_token == 0
    with pytest.raises(FiddlerError, match="--kv-bytes is for ONNX files"):
        with_cache(load_model("mixtral"), "mixtral", 5)


def change(model: Any, **attributes: Any) -> Any:
    """Sets attributes of every MoE node; ... removes one."""
    for node in model.graph.node:
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
        for name, value in attributes.items():
            if value is not ...:
                node.attribute.append(helper.make_attribute(name, value))
    return model


def moe(**attributes: Any) -> Any:
    return onnx_samples.two_moe_layers(**attributes)[0]


def qmoe(**attributes: Any) -> Any:
    return onnx_samples.one_qmoe_layer(4, 0, zero_points=False, **attributes)[0]


def layers_that_differ() -> Any:
    model = moe()
    next(a for a in model.graph.node[1].attribute if a.name == "k").i = 3
    return model


def with_one_bias() -> Any:
    model = moe()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((6, 192), np.float32), "bias"))
    model.graph.node[0].input[3] = "bias"
    return model


def computed_weights() -> Any:
    model = moe()
    name = model.graph.node[0].input[2]
    model.graph.node.insert(0, helper.make_node("Neg", [name], ["negative"]))
    model.graph.node[1].input[2] = "negative"
    return model


def legacy_layout() -> Any:
    model = moe()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).transpose(0, 2, 1).copy(), tensor.name))
    return model


def without_scales() -> Any:
    model = qmoe()
    model.graph.node[0].input[3] = ""
    return model


REFUSED = {
    "no MoE layer": (lambda: onnx_samples.moe_model([helper.make_node("Relu", ["x"], ["y"])], {}), "no MoE layer"),
    "layers differ": (layers_that_differ, "MoE layers of different forms in one file: found top k 3"),
    "no gate": (lambda: moe(activation_type="relu", swiglu_fusion=0), "found relu without a gate"),
    "silu without fc3": (lambda: moe(activation_type="silu", swiglu_fusion=0), "found silu without a gate"),
    "other alpha": (lambda: moe(activation_alpha=1.5), "found swiglu with alpha 1.5, beta 0, expected one of silu"),
    "other limit": (lambda: moe(swiglu_limit=5.0), "alpha 1, beta 0, limit 5"),
    "late limit": (lambda: moe(swiglu_limit_after_activation=1), "swiglu_limit_after_activation"),
    "one bias": (with_one_bias, "no bias for down"),
    "computed weights": (computed_weights, "fc1 = negative, which is computed or an input"),
    "legacy layout": (legacy_layout, r"of shape \[6, 64, 192\]"),
    "top-k of too many": (lambda: moe(k=7), "top-k 7, expected 1 to 6"),
    "fp4": (lambda: qmoe(quant_type="fp4"), "found fp4 weights, expected integers"),
    "2 bits": (lambda: change(qmoe(), expert_weight_bits=2), "found weights of 2 bits"),
    "mixed bits": (lambda: qmoe(fc2_expert_weight_bits=8), "found weights of 4, 8 bits"),
    "prepacked": (lambda: qmoe(weights_prepacked=1), "prepacked for one execution provider"),
    "no scales": (without_scales, "found no scales"),
    "wrong types": (lambda: change(moe(), k="two"), "cannot make sense of the graph"),
    "no down": (
        lambda: onnx_samples.moe_model([helper.make_node("Experts", ["x", "x", "x"], ["y"], domain="fiddlerc")], {}),
        "found 3 inputs",
    ),
    "activation of our node": (
        lambda: onnx_samples.experts_node({0: onnx_samples.random_experts(0)}, activation="relu2"),
        "the activation 'relu2'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(FiddlerError, match=message):
        spec_of(make(), tmp_path)


def gathered(body: str, *, transposed: bool = False, biases: bool = False) -> Any:
    """TopK, two gathered matrices, and an activation written as ONNX text from z [N, 2I] to a [N, I]."""
    gate_up, down = onnx_samples.random_experts(3)
    if transposed:
        gate_up, down = (np.ascontiguousarray(m.transpose(0, 2, 1)) for m in (gate_up, down))
    multiply = ("x3, w1", "a3, w2") if transposed else ("w1, x3", "w2, a3")
    axis = 1 if transposed else 2
    add = ("b1 = GatherND (gate_up_bias, i) zz = Add (z0, b1)", "b2 = GatherND (down_bias, i) oo = Add (o, b2)")
    add = add if biases else ("zz = Identity (z0)", "oo = Identity (o)")
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    moe (float[T, 64] x, float[T, 6] router) => (float[N, 64] y)
    <int64[1] k = {{2}}, int64[1] minus = {{-1}}, int64[1] axis = {{{axis}}}, float one = {{1.0}},
     float seven = {{7.0}},
     float low = {{-7.0}}, float alpha = {{1.702}}, int64[1] zero = {{0}}, int64[1] first = {{1}},
     int64[1] two = {{2}}, int64[1] inner = {{96}}, int64[1] far = {{192}}>
    {{
      p = Softmax <axis = -1> (router)
      v, ids = TopK (p, k)
      flat = Reshape (ids, minus)
      i = Unsqueeze (flat, minus)
      x3 = Unsqueeze (x, axis)
      w1 = GatherND (gate_up, i)
      z3 = MatMul ({multiply[0]})
      z0 = Squeeze (z3, axis)
      {add[0]}
      {body.replace("(z", "(zz")}
      a3 = Unsqueeze (a, axis)
      w2 = GatherND (down, i)
      o3 = MatMul ({multiply[1]})
      o = Squeeze (o3, axis)
      {add[1]}
      y = Mul (oo, one)
    }}"""
    model = onnx.parser.parse_model(text)
    tensors = {"gate_up": gate_up, "down": down}
    if biases:
        rng = np.random.default_rng(1)
        tensors |= {"gate_up_bias": rng.normal(size=(6, 192)), "down_bias": rng.normal(size=(6, 64))}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), n) for n, v in tensors.items())
    return model


SPLIT = "g, u = Split <axis = -1, num_outputs = 2> (z)"
TAKE_TURNS = "g = Slice (z, zero, far, first, two) u = Slice (z, first, far, first, two)"
BODIES = {
    "sigmoid": (f"{SPLIT} s = Sigmoid (g) gs = Mul (g, s) a = Mul (gs, u)", "silu", False),
    "swapped operands": (f"{SPLIT} s = Sigmoid (g) gs = Mul (u, s) a = Mul (gs, g)", "silu", False),
    "slices": (
        "g = Slice (z, zero, inner, first) u = Slice (z, inner, far, first) s = Sigmoid (g) "
        "us = Mul (u, s) a = Mul (us, g)",
        "silu",
        False,
    ),
    "interleaved": (f"{TAKE_TURNS} s = Sigmoid (g) gs = Mul (g, s) a = Mul (gs, u)", "silu", True),
    "gelu": (f"{SPLIT} s = Gelu (g) a = Mul (s, u)", "gelu", False),
    "gelu tanh": (f'{SPLIT} s = Gelu <approximate = "tanh"> (g) a = Mul (s, u)', "gelu_tanh", False),
    "gpt-oss": (
        f"{TAKE_TURNS} gm = Min (g, seven) uc = Clip (u, low, seven) ga = Mul (gm, alpha) s = Sigmoid (ga) "
        "gs = Mul (gm, s) up = Add (uc, one) a = Mul (gs, up)",
        "gptoss",
        True,
    ),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("body", BODIES)
def test_activations_are_recognised_by_what_they_compute(tmp_path: Path, body: str, transposed: bool) -> None:
    text, activation, interleaved = BODIES[body]
    spec = spec_of(gathered(text, transposed=transposed, biases=transposed), tmp_path)
    names = spec.expert_tensors
    assert (spec.activation, names.interleaved, names.transposed) == (activation, interleaved, transposed)
    assert (spec.num_experts, spec.top_k, spec.hidden_size, spec.intermediate_size) == (6, 2, 64, 96)
    assert spec.expert_bias == transposed
    if transposed:
        assert names.initializers["layers.0.experts.gate_up_bias"] == "gate_up_bias"
        assert names.initializers["layers.0.experts.down_bias"] == "down_bias"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{SPLIT} s = Sigmoid (u) us = Mul (u, s) a = Mul (us, g)", "found silu of the second of two outputs"),
        (f"{SPLIT} s = Relu (g) a = Mul (s, u)", "an activation that is not known"),
        (f"{SPLIT} s = Sigmoid (g) a = Mul (s, u)", "an activation that is not known"),
        (f"{SPLIT} s = NoSuchOperator (g) a = Mul (s, u)", "nodes that cannot be evaluated"),
    ],
)
def test_other_activations_are_refused(tmp_path: Path, body: str, message: str) -> None:
    assert message in error_of(gathered(body), tmp_path)


def test_half_a_pair_of_gathered_matrices_is_refused(tmp_path: Path) -> None:
    model = gathered(BODIES["sigmoid"][0])
    second = next(node for node in model.graph.node if node.output[0] == "w2")
    second.input[1] = "other"
    model.graph.node.insert(0, helper.make_node("Neg", ["i"], ["other"]))
    assert "found 1 gathered matrices of ids, expected two" in error_of(model, tmp_path)
