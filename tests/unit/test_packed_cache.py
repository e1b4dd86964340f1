"""Packed caches: what is in them, how they are shared, and what a second start reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runtime_samples
import torch
from runtime_samples import checkpoint_tensors, matrices, write_checkpoint

from fiddler_runtime import preflight
from fiddler_runtime.checkpoint import Checkpoint
from fiddler_runtime.engine import Engine
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.packed_cache import FOLDER, PackedCache
from fiddler_runtime.plan import Plan
from fiddler_runtime.weights import CheckpointWeights, ExpertWeights

SPEC = runtime_samples.small_spec()


class NeverRead(CheckpointWeights):
    """A checkpoint whose experts must not be read."""

    def read(self, *args: object) -> None:
        pytest.fail("experts were read though the cache has them")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return runtime_samples.write_sample_plan(tmp_path_factory.mktemp("plans") / "small", SPEC)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SPEC, checkpoint_tensors(SPEC), shards=3)


def layer_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("layer-*.safetensors"))


def outputs(engine: Engine) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(7, SPEC.hidden_size, generator=generator)
    ids = torch.rand(7, SPEC.num_experts, generator=generator).topk(SPEC.top_k).indices
    weights = torch.full(ids.shape, 0.5)
    return torch.cat([engine.moe(layer, hidden, ids, weights) for layer in SPEC.moe_layers])


@pytest.mark.parametrize("strategies", [("cpu",), ("resident",), ("streamed",), None])
def test_engines_from_the_cache_compute_the_same(plan: Plan, model: Path, strategies: tuple[str, ...] | None) -> None:
    with Engine(plan, ExpertWeights.load(model), strategies=strategies) as engine:
        expected = outputs(engine)
    with Engine(plan, ExpertWeights.load(model), strategies=strategies, packed_cache=True) as engine:
        assert torch.equal(outputs(engine), expected)
    assert len(layer_files(model / FOLDER)) == len(SPEC.moe_layers)
    with Engine(plan, NeverRead(model), strategies=strategies, packed_cache=True) as engine:
        assert torch.equal(outputs(engine), expected)


def test_a_cache_serves_every_placement_and_moves_with_its_checkpoint(plan: Plan, model: Path, tmp_path: Path) -> None:
    with Engine(plan, ExpertWeights.load(model), strategies=("cpu",), packed_cache=tmp_path / "c") as engine:
        expected = outputs(engine)
    shutil.copytree(model, tmp_path / "copy")
    shutil.move(tmp_path / "c", tmp_path / "elsewhere")
    cache = tmp_path / "elsewhere"
    with Engine(plan, NeverRead(tmp_path / "copy"), strategies=("cpu",), packed_cache=cache) as engine:
        assert torch.equal(outputs(engine), expected)
    with Engine(plan, NeverRead(model), packed_cache=str(cache)) as engine:
        assert engine.describe()["resident_experts"] == int(runtime_samples.every_third(SPEC).sum())


def test_the_layers_are_ordinary_safetensors(plan: Plan, model: Path) -> None:
    from safetensors import safe_open

    with Engine(plan, ExpertWeights.load(model), strategies=("cpu",), packed_cache=True) as engine:
        for row, path in enumerate(layer_files(model / FOLDER)):
            with safe_open(path, "pt") as file:
                experts = file.get_tensor("experts")
                assert file.metadata()["model"] == SPEC.name
            for expert, packed in engine._store.packed[row].items():
                assert torch.equal(experts[expert], packed)
                assert packed.data_ptr() % 64 == 0


@pytest.mark.filterwarnings("ignore:.* are stored as float32")
@pytest.mark.parametrize("change", ["value", "name", "dtype"])
def test_other_weights_get_another_cache(plan: Plan, model: Path, tmp_path: Path, change: str) -> None:
    tensors = checkpoint_tensors(SPEC)
    if change == "value":
        tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    if change == "dtype":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    other = write_checkpoint(tmp_path / "other", SPEC, tensors, shards=2 if change == "name" else 3)
    caches = [PackedCache.open(tmp_path / "c", SPEC, checked(folder)) for folder in (model, other)]
    assert caches[0] is not None and caches[1] is not None
    assert caches[0].path != caches[1].path


def checked(folder: Path) -> ExpertWeights:
    weights = ExpertWeights.load(folder)
    weights.check(SPEC)
    return weights


def test_shards_are_read_in_file_order(model: Path) -> None:
    """Also where tensors lie in another order than layers and experts count."""
    tensors = checkpoint_tensors(SPEC)
    shutil.rmtree(model)
    write_checkpoint(model, SPEC, dict(sorted(tensors.items(), reverse=True)), shards=2)
    weights = checked(model)
    order = weights.order(SPEC)
    assert sorted(order) == [(layer, expert) for layer in SPEC.moe_layers for expert in range(SPEC.num_experts)]
    infos = Checkpoint.open(model).tensors
    names = (SPEC.expert_tensors.gate, SPEC.expert_tensors.up, SPEC.expert_tensors.down)
    first = [
        min((infos[n.format(layer=la, expert=e)].file, infos[n.format(layer=la, expert=e)].offset) for n in names)
        for la, e in order
    ]
    assert first == sorted(first)


def test_weights_without_a_name_or_a_home(plan: Plan, model: Path) -> None:
    experts = {
        (layer, expert): tuple(matrices(checkpoint_tensors(SPEC), SPEC, layer, expert))
        for layer in SPEC.moe_layers
        for expert in range(SPEC.num_experts)
    }
    with pytest.raises(FiddlerError, match="these weights cannot have a packed cache"):
        Engine(plan, ExpertWeights.from_tensors(experts), packed_cache=model)  # type: ignore[arg-type]
    with pytest.raises(FiddlerError, match="no place for a packed cache"):
        Engine(plan, ExpertWeights.random(), packed_cache=True)


def test_random_weights_may_be_kept(plan: Plan, tmp_path: Path) -> None:
    with Engine(plan, ExpertWeights.random(5), strategies=("cpu",)) as engine:
        expected = outputs(engine)
    for seed in (5, 6, 5):
        with Engine(plan, ExpertWeights.random(seed), strategies=("cpu",), packed_cache=tmp_path) as engine:
            assert torch.equal(outputs(engine), expected) == (seed == 5)
    assert len(list(tmp_path.iterdir())) == 2


def test_experts_that_do_not_all_fit_warn_and_run(plan: Plan, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(plan, ExpertWeights.load(model), strategies=("cpu",), packed_cache=True) as engine:
        expected = outputs(engine)
    monkeypatch.setattr(preflight, "available_bytes", lambda: SPEC.expert_bytes * 6)
    with pytest.raises(FiddlerError, match="not enough host memory"):
        Engine(plan, ExpertWeights.load(model), strategies=("cpu",))
    with pytest.warns(FiddlerWarning, match="of packed experts of small, but only .* again and again"):
        engine = Engine(plan, ExpertWeights.load(model), strategies=("cpu",), packed_cache=True)
    with engine:
        assert torch.equal(outputs(engine), expected)


def test_needs_are_listed_item_by_item(plan: Plan, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fiddler_runtime import strategies

    setup = strategies.decide(plan, "simulated", None, gpu=False)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1 << 40)
    needs = preflight.survey(plan.header, setup, None, whole_model=True)
    items = {need.item: need.bytes for need in needs.needs}
    assert items["4 resident experts"] == 4 * SPEC.expert_bytes
    assert items["8 packed experts"] == 8 * plan.header.kernels.packed_bytes
    assert items["all but the routed experts"] == SPEC.non_expert_bytes
    assert items["KV cache (1 x 128 tokens)"] == 128 * SPEC.kv_bytes_per_token
    assert needs.needed("host memory") == sum(items.values())
    assert "1.0 TiB free" in needs.lines()[0]
    assert not needs.crowded
    cache = PackedCache.open(True, SPEC, checked(model))
    needs = preflight.survey(plan.header, setup, cache, whole_model=False)
    assert needs.needed("disk") == needs.mapped_bytes // 8 * 12 == 12 * plan.header.kernels.packed_bytes


def test_residents_that_have_no_room_are_counted_on_the_host(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from fiddler_runtime import strategies

    setup = strategies.decide(plan, "cuda", None, gpu=True)
    free = SPEC.staging_bytes() + SPEC.expert_bytes * 3 // 2
    monkeypatch.setattr(preflight, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    needs = preflight.survey(plan.header, setup, None, whole_model=False)
    items = {need.item: need.bytes for need in needs.needs if need.where == "host memory"}
    assert items["3 experts that the accelerator has no room for"] == 3 * plan.header.kernels.packed_bytes


RUN = """
import sys, json
from fiddler_runtime import Engine, ExpertWeights
with Engine(sys.argv[1], ExpertWeights.load(sys.argv[2]), strategies=("cpu",), packed_cache=sys.argv[3]) as engine:
    print(json.dumps(engine.describe()["arena_bytes"]))
"""


@pytest.mark.slow
def test_processes_that_pack_at_the_same_time(plan: Plan, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(plan.path), str(model), str(tmp_path / "c")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate(timeout=120)[0] for process in both} == {f"{12 * plan.header.kernels.packed_bytes}\n"}
    cache = PackedCache.open(tmp_path / "c", SPEC, checked(model))
    assert cache is not None
    cache.verify(threads=1)
    assert [path.name for path in cache.path.glob(".*")] == [".lock"]


def test_read_pages_are_dropped_when_asked(model: Path) -> None:
    """As far as a test can tell: reading gives the same, and files stay as they are."""
    before = {path: path.read_bytes() for path in model.glob("*.safetensors")}
    kept, dropped = checked(model), checked(model)
    dropped.drop_behind = True
    wide = (SPEC.intermediate_size, SPEC.hidden_size)
    results = []
    for weights in (kept, dropped):
        tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in (wide, wide, wide[::-1])]
        weights.read(1, 2, *tensors)
        results.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(path.read_bytes() == data for path, data in before.items())
