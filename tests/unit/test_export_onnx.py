"""`fiddlerc export-onnx`: the file compiles again, and its plan runs with the same experts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import runtime_samples
import torch
from tiny_families import TINY_MIXTRAL, save_family

from fiddler_runtime import hf
from fiddler_runtime.engine import Engine
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.weights import ExpertWeights
from fiddlerc import frontend, pipeline
from fiddlerc.cli import run_command_line

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_engine.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, everything but its experts in fp32."""
    path = tmp_path_factory.mktemp("onnx") / "demo.onnx"
    assert run_command_line(["export-onnx", str(TINY_MIXTRAL), "-o", str(path), "--dtype", "float32", "--json"]) == 0
    return path


def test_one_node_per_layer_with_the_names_that_transformers_gives(exported: Path) -> None:
    assert sorted(p.name for p in exported.parent.iterdir()) == ["demo.onnx", "demo.onnx.data"]
    graph = onnx.load(exported, load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain == "fiddlerc"]
    assert [node.op_type for node in nodes] == ["Experts"] * 6
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    gate_up = tensors["model.layers.3.mlp.experts.gate_up_proj"]
    assert (list(gate_up.dims), gate_up.data_type) == ([8, 512, 128], onnx.TensorProto.BFLOAT16)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].data_type == onnx.TensorProto.FLOAT
    shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.output]
    assert shapes == [["batch", "sequence", 2048]]
    onnx.checker.check_model(str(exported))
    assert str(Path(__file__).parents[2]).encode() not in exported.read_bytes(), "no path of this machine"


def test_the_plan_of_the_file_has_the_directorys_experts(exported: Path, tmp_path: Path) -> None:
    theirs, ours = frontend.load_model(str(TINY_MIXTRAL)), frontend.load_model(str(exported))
    for name in ("name", "architecture", "moe_layers", "num_layers", "top_k", "identity", "kv_bytes_per_token"):
        assert getattr(ours, name) == getattr(theirs, name)
    # The router's and the embedding's bytes double in fp32; rotary frequencies are buffers that a checkpoint lacks.
    assert 0 < ours.non_expert_bytes - 2 * theirs.non_expert_bytes < 1000
    packed = []
    for spec, source in ((theirs, TINY_MIXTRAL), (ours, exported)):
        plan = runtime_samples.write_sample_plan(tmp_path / str(len(packed)), spec)
        with Engine(plan, ExpertWeights.load(source), strategies=("cpu",)) as engine:
            packed.append([tensor.clone() for row in engine._store.packed for tensor in row.values()])
    assert len(packed[0]) == 48
    assert all(torch.equal(a, b) for a, b in zip(*packed, strict=True)), "bit for bit"


def test_onnxruntime_and_the_engine_give_transformers_logits(exported: Path, tmp_path: Path) -> None:
    import transformers

    pytest.importorskip("onnxruntime")
    found = importlib.util.spec_from_file_location("onnx_engine", EXAMPLE)
    assert found is not None
    assert found.loader is not None
    example: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    text = (TINY_MIXTRAL / "heldout-docs.txt").read_text()[:2000]
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_MIXTRAL)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :200].view(2, 100)
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY_MIXTRAL, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(ids).logits.numpy()
        rounded = reference.bfloat16()(ids).logits.float().numpy()
    plan = runtime_samples.write_sample_plan(tmp_path / "plan", frontend.load_model(str(exported)))
    with Engine(plan, ExpertWeights.load(exported)) as engine:
        logits = example.Model(engine, exported)(ids.numpy())
        calls = engine.counters()["expert_calls"]
        assert all(calls[name] for name in ("resident", "streamed", "cpu")), "on every lane"
    # Only the experts compute in bf16: closer than where everything does.
    errors = [np.sqrt(np.mean((values - expected) ** 2)) for values in (logits, rounded)]
    assert errors[0] <= errors[1]
    assert np.abs(expected).max() > 10 * errors[0]


def test_a_plan_from_onnx_runs_with_the_rest_from_its_directory(exported: Path, tmp_path: Path) -> None:
    ids = torch.arange(5, 45).view(1, 40)
    logits = []
    for model, experts in ((TINY_MIXTRAL, None), (exported, exported)):
        spec = frontend.load_model(str(model))
        plan = runtime_samples.write_sample_plan(tmp_path / str(len(logits)), spec)
        loaded = hf.load(TINY_MIXTRAL, plan, experts=experts, strategies=("cpu",))
        with torch.no_grad():
            logits.append(loaded(ids).logits)
        loaded.fiddler.close()
    assert torch.equal(*logits)
    with pytest.raises(FiddlerError, match="are in an ONNX file") as caught:
        hf.load(TINY_MIXTRAL, plan)
    assert caught.value.hint is not None
    assert "--experts FILE.onnx" in caught.value.hint


def test_the_rest_has_to_be_of_the_same_model(exported: Path, tmp_path: Path) -> None:
    plan = runtime_samples.write_sample_plan(tmp_path / "plan", frontend.load_model(str(exported)))
    other = save_family("mixtral", tmp_path / "other")
    with pytest.raises(FiddlerError, match="is not the plan's model"):
        hf.load(other, plan, experts=exported)


def test_a_trace_of_the_original_serves_the_export(exported: Path, tmp_path: Path) -> None:
    trace = TINY_MIXTRAL.with_name("tiny-mixtral-trace.safetensors")
    request = pipeline.CompileRequest(str(exported), "a100", tmp_path / "plan", trace=trace, build=False)
    header = pipeline.compile_plan(request).plan.header
    assert "the trace is of tiny-mixtral: for an ONNX file its shapes are all that was compared" in header.assumptions
    assert header.placement.basis.startswith("trace")
    counts = {"model": "x", "text": "y", "tokens": 8, "counts": [[2] * 8] * 32}
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    pipeline.import_counts("mixtral", tmp_path / "counts.json", tmp_path / "other")
    with pytest.raises(FiddlerError, match=r"is not valid: found counts of int64 \[2, 32, 8\]"):
        pipeline.compile_plan(
            pipeline.CompileRequest(str(exported), "a100", tmp_path / "plan2", trace=tmp_path / "other", build=False)
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Dense layers between; transposed, interleaved, with biases and another activation. In bf16, the default."""
    model = save_family(family, tmp_path / "model")
    spec, _ = pipeline.export_onnx(str(model), tmp_path / "q.onnx")
    again = frontend.load_model(str(tmp_path / "q.onnx"))
    names = ("moe_layers", "expert", "window", "window_kv_bytes_per_token", "kv_bytes_per_token")
    assert all(getattr(again, name) == getattr(spec, name) for name in names)
    rows, width = spec.intermediate_size, spec.hidden_size
    shapes = [(rows, width), (rows, width), (width, rows), *([(rows,), (rows,), (width,)] if spec.expert_bias else [])]
    parts = [[torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in shapes] for _ in range(2)]
    sources = (ExpertWeights.load(model), ExpertWeights.load(tmp_path / "q.onnx"))
    for source, of in zip(sources, (spec, again), strict=True):
        source.check(of)
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            for source, (gate, up, down, *biases) in zip(sources, parts, strict=True):
                source.read(layer, expert, gate, up, down, biases)
            assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fiddlerc.export import onnx_file

    output = tmp_path / "out" / "demo.onnx"
    for error, status in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)):

        def stop(model_dir: Path, spec: Any, draft: Path, dtype: Any, error: BaseException = error) -> None:
            draft.write_bytes(b"half a graph")
            raise error

        monkeypatch.setattr(onnx_file, "_write_rest", stop)
        assert run_command_line(["export-onnx", str(TINY_MIXTRAL), "-o", str(output)]) == status
        assert list(output.parent.iterdir()) == []
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(FiddlerError, match="not enough room"):
        pipeline.export_onnx(str(TINY_MIXTRAL), output)
