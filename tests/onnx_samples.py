"""Small ONNX models with MoE layers: made by hand, and exported from tiny transformers models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 64, 96, 2
Array = npt.NDArray[np.float32]


def round_bf16(values: npt.NDArray[Any]) -> Array:
    """To the nearest bf16, as fp32: what the runtime makes of a weight."""
    import torch

    rounded: Array = torch.from_numpy(np.asarray(values, np.float32)).bfloat16().float().numpy()
    return rounded


def random_experts(
    seed: int, *, experts: int = EXPERTS, hidden: int = HIDDEN, inner: int = INTERMEDIATE
) -> tuple[Array, Array]:
    """gate_up [E, 2I, H], gate's rows first, and down [E, H, I]; every value is a bf16."""
    rng = np.random.default_rng(seed)
    gate_up = rng.standard_normal((experts, 2 * inner, hidden)) / hidden**0.5
    down = rng.standard_normal((experts, hidden, inner)) / inner**0.5
    return round_bf16(gate_up), round_bf16(down)


def interleave(gate_up: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows g0 u0 g1 u1 ... of [E, 2I, ...]."""
    gate, up = np.split(gate_up, 2, axis=1)
    return np.stack([gate, up], axis=2).reshape(gate_up.shape)


@dataclass(frozen=True)
class Quantized:
    """What QMoE takes: packed [E, N, K * bits / 8], scales, packed zero points or None; values: what they stand for."""

    packed: npt.NDArray[np.uint8]
    scales: Array
    zero_points: npt.NDArray[np.uint8] | None
    values: Array


def quantize(weights: Array, bits: int, block: int, *, zero_points: bool, seed: int = 0) -> Quantized:
    """By the rule in onnxruntime's schema of QMoE; block 0: one scale per row."""
    experts, rows, columns = weights.shape
    parts = weights.reshape(experts, rows, -1, block or columns)
    scales = (np.abs(parts).max(-1) / (2 ** (bits - 1) - 1)).astype(np.float32)
    middle = 2 ** (bits - 1)
    zeros = np.full(scales.shape, middle, np.uint8)
    if zero_points:
        zeros = np.random.default_rng(seed).integers(middle - 2, middle + 3, scales.shape).astype(np.uint8)
    codes = np.clip(np.round(parts / scales[..., None]) + zeros[..., None], 0, 2**bits - 1).astype(np.uint8)
    values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    if not block:
        scales, zeros = scales[..., 0], zeros[..., 0]
    return Quantized(
        _pack(codes.reshape(weights.shape), bits),
        scales,
        _pack(zeros, bits) if zero_points else None,
        values.reshape(weights.shape),
    )


def _pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def moe_model(
    nodes: list[Any], tensors: dict[str, npt.NDArray[Any]], *, inputs: tuple[str, ...] = (), hidden: int = HIDDEN
) -> Any:
    """Nodes from x [T, H] (and others) to their last output; x, router_N: fp32."""
    names = ("x", *inputs)
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", hidden if n == "x" else EXPERTS]) for n in names
    ]
    out = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["T", hidden])]
    graph = helper.make_graph(nodes, "moe", values, out, [numpy_helper.from_array(v, n) for n, v in tensors.items()])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("fiddlerc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def random_biases(seed: int) -> tuple[Array, Array]:
    """gate_up [E, 2I], gate's first, and down [E, H]; every value is a bf16."""
    rng = np.random.default_rng(seed)
    return round_bf16(rng.standard_normal((EXPERTS, 2 * INTERMEDIATE))), round_bf16(
        rng.standard_normal((EXPERTS, HIDDEN))
    )


def two_moe_layers(*, biases: bool = False, **attributes: Any) -> tuple[Any, dict[int, tuple[Array, Array]]]:
    """com.microsoft::MoE in decoder layers 1 and 3, and their experts; as onnxruntime-genai names them.

    biases: those of random_biases(layer)
    """
    given = {"k": TOP_K, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 1, **attributes}
    experts = {layer: random_experts(layer) for layer in (1, 3)}
    nodes, tensors, value = [], {}, "x"
    for layer, (gate_up, down) in experts.items():
        name = f"model.layers.{layer}.moe.experts"
        tensors |= {f"{name}.gate_up_proj.weight": interleave(gate_up), f"{name}.down_proj.weight": down}
        ins = [value, f"router_{layer}", f"{name}.gate_up_proj.weight", "", f"{name}.down_proj.weight"]
        if biases:
            first, second = random_biases(layer)
            tensors |= {f"{name}.gate_up_proj.bias": interleave(first), f"{name}.down_proj.bias": second}
            ins[3:4], ins[5:] = [f"{name}.gate_up_proj.bias"], [f"{name}.down_proj.bias"]
        nodes.append(helper.make_node("MoE", ins, [f"y{layer}"], name=f"moe_{layer}", domain="com.microsoft", **given))
        value = f"y{layer}"
    return moe_model(nodes, tensors, inputs=("router_1", "router_3")), experts


def one_qmoe_layer(
    bits: int, block: int, *, zero_points: bool, separate: bool = False, **attributes: Any
) -> tuple[Any, tuple[Array, Array]]:
    """com.microsoft::QMoE, and what its experts stand for: gate_up, gate's rows first, and down. fp32 scales.

    separate: gate as FC1 and up as FC3
    """
    gate_up, down = random_experts(7)
    quantized = {"fc2": quantize(down, bits, block, zero_points=zero_points, seed=1)}
    if separate:
        gate, up = np.split(gate_up, 2, axis=1)
        quantized |= {"fc1": quantize(gate, bits, block, zero_points=zero_points, seed=2)}
        quantized |= {"fc3": quantize(up, bits, block, zero_points=zero_points, seed=3)}
        stands_for = np.concatenate([quantized["fc1"].values, quantized["fc3"].values], axis=1)
    else:
        quantized["fc1"] = quantize(gate_up, bits, block, zero_points=zero_points, seed=2)
        stands_for = quantized["fc1"].values
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, weights in quantized.items():
        # Whole rows are exchanged, so what each stands for goes with it.
        order = interleave if name == "fc1" and not separate else np.asarray
        tensors |= {f"{name}.q": order(weights.packed), f"{name}.s": order(weights.scales)}
        if weights.zero_points is not None:
            tensors[f"{name}.z"] = weights.zero_points
    if zero_points and not separate:
        # Packed along the rows if there is one per row, so they are interleaved before they are packed.
        again = quantize(gate_up, bits, block, zero_points=True, seed=2)
        assert again.zero_points is not None
        tensors["fc1.z"] = _interleaved_zero_points(again, bits, block)
    places = (
        "x",
        "router_0",
        "fc1.q",
        "fc1.s",
        "",
        "fc2.q",
        "fc2.s",
        "",
        "fc3.q",
        "fc3.s",
        "",
        "fc1.z",
        "fc2.z",
        "fc3.z",
    )
    ins = [name if name in tensors or place < 2 else "" for place, name in enumerate(places)]
    while not ins[-1]:
        ins.pop()
    given = {"k": TOP_K, "activation_type": "swiglu", "swiglu_fusion": 0 if separate else 1, "expert_weight_bits": bits}
    given |= {"normalize_routing_weights": 1} | ({"block_size": block} if block else {}) | attributes
    node = helper.make_node("QMoE", ins, ["y"], name="qmoe", domain="com.microsoft", **given)
    return moe_model([node], tensors, inputs=("router_0",)), (stands_for, quantized["fc2"].values)


def _interleaved_zero_points(quantized: Quantized, bits: int, block: int) -> npt.NDArray[np.uint8]:
    assert quantized.zero_points is not None
    if block:
        return interleave(quantized.zero_points)
    rows = quantized.scales.shape[1]
    codes = quantized.zero_points
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)[:, :rows]
    return _pack(interleave(codes), bits)


def experts_node(
    layers: dict[int, tuple[Array, Array]], *, dtype: int = TensorProto.BFLOAT16, **attributes: Any
) -> Any:
    """fiddlerc::Experts nodes, one per layer, on x with ids and weights as inputs."""
    given = {"top_k": TOP_K, "activation": "silu", **attributes}
    nodes, tensors, value = [], [], "x"
    for layer, (gate_up, down) in layers.items():
        for name, array in (("gate_up_proj", gate_up), ("down_proj", down)):
            raw = numpy_helper.from_array(array)
            if dtype != TensorProto.FLOAT:
                raw = helper.make_tensor("", dtype, array.shape, array.ravel().tolist())
            raw.name = f"model.layers.{layer}.mlp.experts.{name}"
            tensors.append(raw)
        ins = [value, "ids", "weights", tensors[-2].name, tensors[-1].name]
        nodes.append(helper.make_node("Experts", ins, [f"y{layer}"], domain="fiddlerc", layer=layer, **given))
        value = f"y{layer}"
    model = moe_model(nodes, {})
    model.graph.initializer.extend(tensors)
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["T", TOP_K]))
    model.graph.input.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", TOP_K]))
    return model


def save(model: Any, path: Path, **external: Any) -> Path:
    """Saves a model, and its weights beside it if asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, **external)
    return path


def export_family(family: str, path: Path, *, optimize: bool) -> Any:
    """Writes torch.onnx's graph of a tiny transformers model with batched_mm experts; returns the model.

    fp32, but every weight is a bf16.
    """
    import logging
    import warnings

    import torch
    import transformers
    from tiny_families import config_of

    torch.manual_seed(1)
    config = config_of(family)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="batched_mm"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # As initialised, experts are too small for their share to be seen.
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16().float())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            kwargs={"input_ids": torch.arange(3, 27).view(2, 12), "use_cache": False},
            dynamo=True,
            optimize=optimize,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)
    return model
