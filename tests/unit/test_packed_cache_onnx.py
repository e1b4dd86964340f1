"""Packed caches of ONNX files: what is in them, whose they are, and processes that make one at the same time."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_samples
import pytest
import runtime_samples
import torch
from onnx import numpy_helper

from fiddler_runtime.engine import Engine
from fiddler_runtime.packed_cache import FOLDER, PackedCache
from fiddler_runtime.plan import ModelSpec, Plan
from fiddler_runtime.weights import ExpertWeights, OnnxWeights
from fiddlerc import frontend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*rounded to bf16 while they are read:fiddler_runtime.FiddlerWarning"),
]
OUTSIDE = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0}
FORMS: dict[str, Callable[[], Any]] = {
    "Experts": lambda: onnx_samples.experts_node({layer: onnx_samples.random_experts(layer) for layer in (0, 1)}),
    "MoE": lambda: onnx_samples.two_moe_layers()[0],
    "QMoE": lambda: onnx_samples.one_qmoe_layer(4, 32, zero_points=True)[0],
}


class NeverRead(OnnxWeights):
    """A file whose experts must not be read."""

    def read(self, *args: object) -> None:
        pytest.fail("experts were read though the cache has them")


def plan_of(path: Path, folder: Path) -> Plan:
    spec = dataclasses.replace(frontend.load_model(str(path)), kv_bytes_per_token=1)
    return runtime_samples.write_sample_plan(folder, spec)


def outputs(engine: Engine) -> torch.Tensor:
    spec = engine.spec
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, spec.hidden_size, generator=generator)
    ids = torch.rand(40, spec.num_experts, generator=generator).topk(spec.top_k).indices
    return torch.cat([engine.moe(layer, hidden, ids, torch.full(ids.shape, 0.5)) for layer in spec.moe_layers])


@pytest.mark.parametrize("external", [{}, OUTSIDE], ids=["inside", "outside"])
@pytest.mark.parametrize("form", FORMS)
def test_engines_from_the_cache_compute_the_same(tmp_path: Path, form: str, external: dict[str, Any]) -> None:
    path = onnx_samples.save(FORMS[form](), tmp_path / "m.onnx", **external)
    plan = plan_of(path, tmp_path / "plan")
    for strategies in (None, ("cpu",), ("resident",), ("streamed",)):
        with Engine(plan, ExpertWeights.load(path), strategies=strategies) as engine:
            expected = outputs(engine)
        with Engine(plan, ExpertWeights.load(path), strategies=strategies, packed_cache=True) as engine:
            assert torch.equal(outputs(engine), expected)
        with Engine(plan, NeverRead(path), strategies=strategies, packed_cache=True) as engine:
            assert torch.equal(outputs(engine), expected)
    files = {file.parent.parent for file in tmp_path.rglob("layer-*.safetensors")}
    assert files == {tmp_path / FOLDER}, "beside the ONNX file"


def cache_of(path: Path, spec: ModelSpec) -> Path:
    weights = ExpertWeights.load(path)
    weights.check(spec)
    cache = PackedCache.open(True, spec, weights)
    assert cache is not None
    return Path(cache.path.name)


def rewrite(path: Path, tensor: str, change: Callable[[Any], Any]) -> None:
    """Replaces a tensor of a file with external data by another of its size, in its place."""
    entry = next(t for t in onnx.load(path, load_external_data=False).graph.initializer if t.name == tensor)
    places = {e.key: e.value for e in entry.external_data}
    values = numpy_helper.to_array(next(t for t in onnx.load(path).graph.initializer if t.name == tensor))
    data = np.ascontiguousarray(change(values)).tobytes()
    assert len(data) == int(places["length"])
    with (path.parent / places["location"]).open("r+b") as file:
        file.seek(int(places["offset"]))
        file.write(data)


@pytest.mark.parametrize("tensor", ["fc1.q", "fc1.s", "fc2.z"])
def test_other_numbers_in_the_same_places_get_another_cache(tmp_path: Path, tensor: str) -> None:
    path = onnx_samples.save(FORMS["QMoE"](), tmp_path / "m.onnx", **OUTSIDE)
    spec = frontend.load_model(str(path))
    before = cache_of(path, spec)
    rewrite(path, tensor, lambda values: values + np.ones((), values.dtype))
    assert cache_of(path, spec) != before


def test_the_same_data_in_other_places_get_another_cache(tmp_path: Path) -> None:
    """The graph alone changes: layers exchange their experts, of which not a byte moves."""
    path = onnx_samples.save(FORMS["MoE"](), tmp_path / "m.onnx", **OUTSIDE)
    spec = frontend.load_model(str(path))
    before = cache_of(path, spec)
    plan = plan_of(path, tmp_path / "plan")
    with Engine(plan, ExpertWeights.load(path), strategies=("cpu",), packed_cache=True) as engine:
        first = outputs(engine)
    data = (tmp_path / "m.data").read_bytes()
    changed = onnx.load(path, load_external_data=False)
    tensors = {t.name: t for t in changed.graph.initializer}
    for name in ("gate_up_proj", "down_proj"):
        a, b = (tensors[f"model.layers.{layer}.moe.experts.{name}.weight"] for layer in (1, 3))
        a.name, b.name = b.name, a.name
    path.write_bytes(changed.SerializeToString())
    assert (tmp_path / "m.data").read_bytes() == data
    assert cache_of(path, spec) != before
    with Engine(plan, ExpertWeights.load(path), strategies=("cpu",), packed_cache=True) as engine:
        assert torch.equal(outputs(engine), torch.cat(first.chunk(2)[::-1]))


def test_a_cache_moves_with_its_file(tmp_path: Path) -> None:
    path = onnx_samples.save(FORMS["MoE"](), tmp_path / "a" / "m.onnx", **OUTSIDE)
    spec = frontend.load_model(str(path))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert cache_of(tmp_path / "b" / "m.onnx", spec) == cache_of(path, spec)


def test_what_comes_before_the_experts_is_not_read(tmp_path: Path) -> None:
    """An embedding of gigabytes may."""
    model = FORMS["MoE"]()
    path = onnx_samples.save(model, tmp_path / "m.onnx", **OUTSIDE)
    moved = onnx.load(path, load_external_data=False)
    gap = 1 << 40  # a hole in the file
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + gap)
    data = (tmp_path / "m.data").read_bytes()
    with (tmp_path / "m.data").open("wb") as file:
        file.seek(gap)
        file.write(data)
    path.write_bytes(moved.SerializeToString())
    plan = plan_of(path, tmp_path / "plan")
    with Engine(plan, ExpertWeights.load(path), strategies=("cpu",), packed_cache=True) as engine:
        assert outputs(engine).isfinite().all()


RUN = """
import sys
from fiddler_runtime import Engine, ExpertWeights
with Engine(sys.argv[1], ExpertWeights.load(sys.argv[2]), strategies=("cpu",), packed_cache=True) as engine:
    print(engine.describe()["arena_bytes"])
"""


def test_processes_that_pack_at_the_same_time(tmp_path: Path) -> None:
    path = onnx_samples.save(FORMS["QMoE"](), tmp_path / "m.onnx", **OUTSIDE)
    plan = plan_of(path, tmp_path / "plan")
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(plan.path), str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = len(plan.header.model.moe_layers) * 6 * plan.header.kernels.packed_bytes
    assert [process.communicate(timeout=120)[0] for process in both] == [f"{expected}\n"] * 2
    weights = ExpertWeights.load(path)
    weights.check(plan.header.model)
    cache = PackedCache.open(True, plan.header.model, weights)
    assert cache is not None and cache.missing_bytes() == 0
    cache.verify(threads=1)
    with Engine(plan, ExpertWeights.load(path), strategies=("cpu",)) as plain:
        expected_outputs = outputs(plain)
    with Engine(plan, NeverRead(path), strategies=("cpu",), packed_cache=True) as engine:
        assert torch.equal(outputs(engine), expected_outputs)
