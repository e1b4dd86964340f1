"""Experts read from ONNX files: every way in which a file can store them, and plans that are run with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_samples
import pytest
import runtime_samples
import torch
from onnx import TensorProto, helper, numpy_helper

from fiddler_runtime.engine import Engine
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.onnx_file import VarintTensor, read_initializers, read_varints
from fiddler_runtime.plan import ModelSpec
from fiddler_runtime.weights import ExpertWeights
from fiddlerc import frontend

pytestmark = pytest.mark.filterwarnings("ignore:.*rounded to bf16 while they are read:fiddler_runtime.FiddlerWarning")
GATE_UP, DOWN = onnx_samples.random_experts(11)
Experts = dict[tuple[int, int], tuple[torch.Tensor, ...]]


def read_all(path: Path, spec: ModelSpec | None = None) -> Experts:
    """Every expert of a file as the engine gets it."""
    spec = frontend.load_model(str(path)) if spec is None else spec
    weights = ExpertWeights.load(path)
    weights.check(spec)
    rows, width = spec.intermediate_size, spec.hidden_size
    shapes = [(rows, width), (rows, width), (width, rows), *([(rows,), (rows,), (width,)] if spec.expert_bias else [])]
    found = {}
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            parts = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in shapes]
            weights.read(layer, expert, parts[0], parts[1], parts[2], parts[3:])
            found[layer, expert] = tuple(parts)
    return found


def assert_experts(found: Experts, layer: int, gate_up: Any, down: Any) -> None:
    """gate_up [E, 2I, H], gate's rows first, and down [E, H, I], rounded to bf16 like a checkpoint's."""
    gate, up = np.split(np.asarray(gate_up, np.float32), 2, axis=1)
    for expert in range(len(down)):
        for part, expected in zip(found[layer, expert], (gate, up, np.asarray(down, np.float32)), strict=True):
            assert torch.equal(part, torch.from_numpy(expected[expert].copy()).bfloat16())


STORED = {
    "raw in the file": {},
    "one file": {"save_as_external_data": True, "location": "w.data", "size_threshold": 0},
    "a file each": {"save_as_external_data": True, "all_tensors_to_one_file": False, "size_threshold": 0},
}


@pytest.mark.parametrize("dtype", [TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT])
@pytest.mark.parametrize("stored", STORED)
def test_inside_and_outside(tmp_path: Path, stored: str, dtype: int) -> None:
    model = onnx_samples.experts_node({0: (GATE_UP, DOWN), 3: (2 * GATE_UP, 2 * DOWN)}, dtype=dtype)
    for tensor in model.graph.initializer:
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
        tensor.CopyFrom(raw)
        assert tensor.raw_data
    path = onnx_samples.save(model, tmp_path / "m.onnx", **STORED[stored])
    assert len(list(tmp_path.iterdir())) == {"raw in the file": 1, "one file": 2, "a file each": 5}[stored]
    found = read_all(path)
    assert len(found) == 12
    kept = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    assert_experts(found, 0, GATE_UP.astype(kept), DOWN.astype(kept))
    assert_experts(found, 3, (2 * GATE_UP).astype(kept), (2 * DOWN).astype(kept))


@pytest.mark.parametrize(
    ("dtype", "field"),
    [(TensorProto.FLOAT, "float_data"), (TensorProto.BFLOAT16, "int32_data"), (TensorProto.DOUBLE, "double_data")],
)
def test_typed_data(tmp_path: Path, dtype: int, field: str) -> None:
    model = onnx_samples.experts_node({0: (GATE_UP, DOWN)}, dtype=TensorProto.FLOAT)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, dtype, values.shape, values.ravel().tolist()))
        assert len(getattr(tensor, field)) == values.size
    path = onnx_samples.save(model, tmp_path / "m.onnx")
    assert_experts(read_all(path), 0, GATE_UP, DOWN)
    kinds = {isinstance(info, VarintTensor) for info in read_initializers(path).values()}
    assert kinds == {field == "int32_data"}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_and_biases(tmp_path: Path, transposed: bool, interleaved: bool) -> None:
    order = onnx_samples.interleave if interleaved else np.asarray
    stored = [np.ascontiguousarray(m.transpose(0, 2, 1)) if transposed else m for m in (order(GATE_UP), DOWN)]
    rng = np.random.default_rng(4)
    biases = [rng.standard_normal((6, 192)).astype(np.float32), rng.standard_normal((6, 64)).astype(np.float32)]
    model = onnx_samples.experts_node(
        {0: (stored[0], stored[1])}, transposed=int(transposed), interleaved=int(interleaved)
    )
    for name, bias in (("gate_up_bias", order(biases[0])), ("down_bias", biases[1])):
        model.graph.initializer.append(numpy_helper.from_array(bias, name))
        model.graph.node[0].input.append(name)
    found = read_all(onnx_samples.save(model, tmp_path / "m.onnx"))
    assert_experts({key: parts[:3] for key, parts in found.items()}, 0, GATE_UP, DOWN)
    for expert in range(6):
        joined = torch.cat(found[0, expert][3:5])
        assert torch.equal(joined, torch.from_numpy(biases[0][expert]).bfloat16())
        assert torch.equal(found[0, expert][5], torch.from_numpy(biases[1][expert]).bfloat16())


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "fc3"])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_what_they_stand_for(
    tmp_path: Path, bits: int, block: int, zero_points: bool, separate: bool
) -> None:
    model, (gate_up, down) = onnx_samples.one_qmoe_layer(bits, block, zero_points=zero_points, separate=separate)
    assert_experts(read_all(onnx_samples.save(model, tmp_path / "q.onnx")), 0, gate_up, down)


def test_quantised_varints_are_decoded_once_for_all_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (gate_up, down) = onnx_samples.one_qmoe_layer(8, 16, zero_points=True)
    quantised = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT8]
    for tensor in quantised:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.UINT8, values.shape, values.ravel().tolist()))
        assert tensor.int32_data
    decoded: list[str] = []

    def counted(info: VarintTensor) -> Any:
        decoded.append(info.name)
        return read_varints(info)

    monkeypatch.setattr("fiddler_runtime.onnx_weights.read_varints", counted)
    assert_experts(read_all(onnx_samples.save(model, tmp_path / "q.onnx")), 0, gate_up, down)
    assert sorted(decoded) == sorted(tensor.name for tensor in quantised)


def test_what_dequantising_costs_is_told_once(tmp_path: Path) -> None:
    model, _ = onnx_samples.one_qmoe_layer(4, 0, zero_points=False)
    path = onnx_samples.save(model, tmp_path / "q.onnx")
    spec, weights = frontend.load_model(str(path)), ExpertWeights.load(path)
    with pytest.warns(FiddlerWarning, match=r"stored as int4 \(a quarter of what they take in memory\)") as told:
        weights.check(spec)
        weights.check(spec)
    assert len(told) == 1


def test_large_quantised_experts_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fiddler_runtime import onnx_weights

    model, (gate_up, down) = onnx_samples.one_qmoe_layer(4, 32, zero_points=True)
    path = onnx_samples.save(model, tmp_path / "q.onnx")
    monkeypatch.setattr(onnx_weights, "_ELEMENTS_AT_A_TIME", 7 * 64)
    assert_experts(read_all(path), 0, gate_up, down)


def test_scales_that_do_not_fit_are_told(tmp_path: Path) -> None:
    model, _ = onnx_samples.one_qmoe_layer(4, 0, zero_points=True)
    path = onnx_samples.save(model, tmp_path / "q.onnx")
    spec = frontend.load_model(str(path))
    for tensor, message in (
        ("fc2.s", "does not fit its layer: found F32"),
        ("fc2.z", "found U8"),
        ("fc1.q", "found U8"),
    ):
        other = onnx.load(path)
        changed = next(t for t in other.graph.initializer if t.name == tensor)
        values = numpy_helper.to_array(changed)
        changed.CopyFrom(numpy_helper.from_array(np.repeat(values, 3, axis=-1), tensor))
        with pytest.raises(FiddlerError, match=message):
            read_all(onnx_samples.save(other, tmp_path / "other.onnx"), spec)


def test_another_file_or_a_directory_is_refused(tmp_path: Path) -> None:
    path = onnx_samples.save(onnx_samples.experts_node({0: (GATE_UP, DOWN)}), tmp_path / "m.onnx")
    other = onnx_samples.save(onnx_samples.two_moe_layers()[0], tmp_path / "other.onnx")
    narrow = [m[:, :, :32] for m in (GATE_UP, DOWN)]
    small = onnx_samples.experts_node({0: (GATE_UP, DOWN)})
    for tensor, values in zip(small.graph.initializer, narrow, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    spec = frontend.load_model(str(path))
    with pytest.raises(
        FiddlerError, match=r"not the file that the plan was compiled from: found no initializer model\."
    ):
        ExpertWeights.load(other).check(spec)
    with pytest.raises(FiddlerError, match=r"does not fit its plan: found .*gate_up of shape \[6, 192, 32\]"):
        ExpertWeights.load(onnx_samples.save(small, tmp_path / "small.onnx")).check(spec)
    with pytest.raises(FiddlerError, match="are in an ONNX file: found the directory"):
        ExpertWeights.load(runtime_samples.TINY_MIXTRAL).check(spec)
    with pytest.raises(FiddlerError, match="is a Hugging Face directory"):
        ExpertWeights.load(path).check(frontend.load_model(str(runtime_samples.TINY_MIXTRAL)))
    with pytest.raises(FiddlerError, match="no such ONNX file"):
        ExpertWeights.load(tmp_path / "none.onnx")


@pytest.mark.slow
def test_the_runtime_does_without_the_onnx_package(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = onnx_samples.save(onnx_samples.experts_node({0: (GATE_UP, DOWN)}), tmp_path / "m.onnx")
    spec = frontend.load_model(str(path))
    plan = runtime_samples.write_sample_plan(tmp_path / "plan", spec)
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "import torch, fiddler_runtime as f\n"
        "with f.Engine(sys.argv[1], f.ExpertWeights.load(sys.argv[2])) as engine:\n"
        "    print(engine.moe(0, torch.ones(1, 64), torch.zeros(1, 2, dtype=int), torch.ones(1, 2)).shape)\n"
        "loaded = {name.split('.')[0] for name, module in sys.modules.items() if module}\n"
        "assert not loaded & {'onnx', 'google', 'fiddlerc'}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(plan.path), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "[1, 64]" in done.stdout


def test_a_plan_remembers_where_the_experts_are(tmp_path: Path) -> None:
    model, experts = onnx_samples.two_moe_layers()
    path = onnx_samples.save(model, tmp_path / "m.onnx")
    spec = frontend.load_model(str(path))
    plan = runtime_samples.write_sample_plan(tmp_path / "plan", dataclasses.replace(spec, kv_bytes_per_token=1))
    with Engine(plan.path, ExpertWeights.load(path), strategies=("resident",)) as engine:
        for row, layer in enumerate(spec.moe_layers):
            gate_up, down = experts[layer]
            for expert, resident in engine._store.resident[row].items():
                gate, up, found = resident.to(torch.device("cpu")).matrices
                assert torch.equal(torch.cat([gate, up]), torch.from_numpy(gate_up[expert]).bfloat16())
                assert torch.equal(found, torch.from_numpy(down[expert]).bfloat16())
