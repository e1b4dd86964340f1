"""Where a GPU's memory, or what may be locked of the host's, does not suffice."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from runtime_samples import small_spec, write_sample_plan

from fiddler_runtime import Engine, ExpertWeights, FiddlerError, FiddlerWarning
from fiddler_runtime.lanes.driver import Driver

SPEC = small_spec(hidden_size=1024, intermediate_size=2048)


@pytest.fixture
def little_memory(where: torch.device):
    """So much of the GPU that torch may take no more than two experts of SPEC: 12 MiB each, of segments of 20 MiB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(where).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(where) + (44 << 20)) / total, where)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, where)
    torch.cuda.empty_cache()


def test_residents_that_find_no_room_run_elsewhere(tmp_path: Path, little_memory: None, where: torch.device) -> None:
    plan = write_sample_plan(tmp_path / "plan", SPEC)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine = Engine(plan, ExpertWeights.random(), device="cuda", strategies=("resident", "cpu"))
    assert any("resident experts of small were given up" in str(w.message) for w in told)
    with engine:
        assert 0 < engine.describe()["resident_experts"] < 4
        hidden = torch.randn(5, SPEC.hidden_size, device=where, dtype=torch.bfloat16)
        ids = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 3], [1, 2]], device=where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FiddlerWarning)  # what cuBLAS takes may cost the others their place
            out = engine.moe(SPEC.moe_layers[0], hidden, ids, torch.full((5, 2), 0.5, device=where))
        assert bool(out.isfinite().all())


def test_a_layer_that_finds_no_memory_takes_residents(tmp_path: Path, where: torch.device) -> None:
    plan = write_sample_plan(tmp_path / "plan", SPEC)
    torch.cuda.empty_cache()
    with pytest.warns(FiddlerWarning, match="never been run"):
        engine = Engine(plan, ExpertWeights.random(), device="cuda", strategies=("resident", "cpu"))
    with engine:
        before = engine.describe()["resident_experts"]
        total = torch.cuda.get_device_properties(where).total_memory
        hidden = torch.randn(2048, SPEC.hidden_size, device=where, dtype=torch.bfloat16)
        weights, ids = torch.rand(2048, SPEC.num_experts, device=where).softmax(-1).topk(SPEC.top_k)
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (4 << 20)) / total, where)
        try:
            with pytest.warns(FiddlerWarning, match="were given up, the least popular first"):
                out = engine.moe(SPEC.moe_layers[0], hidden, ids, weights)
        except FiddlerError as error:  # all were, and the layer itself does not fit
            assert "does not suffice for a layer" in str(error)
        else:
            assert bool(out.isfinite().all())
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, where)
        assert engine.describe()["resident_experts"] < before


def test_the_driver_locks_memory_and_finds_it_again(where: torch.device) -> None:
    torch.cuda.synchronize()
    driver = Driver()
    print(
        f"driver: CUDA {driver.version()}, stream memory operations: {driver.has_memory_operations(where.index or 0)}"
    )
    memory = torch.zeros(1 << 22, dtype=torch.uint8)
    address = driver.register(memory.data_ptr(), memory.nbytes)
    assert address
    assert memory.is_pinned(), "torch copies from it asynchronously"
    with pytest.raises(FiddlerError, match="cuMemHostRegister_v2"):
        driver.register(memory.data_ptr(), memory.nbytes)
    assert torch.equal(memory.to(where, non_blocking=True).cpu(), memory), "the refusal is nobody else's error"
    driver.unregister(memory.data_ptr())
