"""Calibrating with --accelerator cuda: the code, on a torch.cuda of the tests' own. No figure means anything."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from pathlib import Path

import fake_cuda
import pytest
import runtime_samples
import torch
from fake_cuda import FakeCuda
from fake_driver import FakeDriver

from fiddler_runtime import FiddlerWarning, loading
from fiddler_runtime.machine import Accelerator
from fiddlerc.hardware import calibrate, lanes

pytestmark = pytest.mark.slow
SPEC = runtime_samples.small_spec()
SHAPE = (SPEC.hidden_size, SPEC.intermediate_size)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = FakeDriver(tmp_path)
    yield fake_cuda.install(monkeypatch, fake)
    assert fake.native.fake_registered() == 0
    fake.close()


@pytest.fixture
def library(tmp_path: Path):
    return loading.open_library(runtime_samples.write_sample_plan(tmp_path / "plan", SPEC))


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"tokens": (1, 2, 4, 8), "copy_widths": (32, 64)}
    effort = dataclasses.replace(calibrate.QUICK, seconds=0.05, **sizes)
    monkeypatch.setattr(calibrate, "QUICK", effort)
    here = calibrate.this_machine("none")
    gpu = dataclasses.replace(here, l3_bytes=1 << 20, accelerator=Accelerator("cuda", "none, really", 1 << 30, "1.0"))
    monkeypatch.setattr(calibrate, "this_machine", lambda _: gpu)
    monkeypatch.setattr(calibrate, "accelerator_read_gbps", lambda *_: 1.0)
    monkeypatch.setattr(calibrate, "accelerator_peak_gflops", lambda *_: 1.0)
    monkeypatch.setattr(calibrate, "_GPU_CACHE", 1 << 20)
    monkeypatch.setattr(calibrate, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(lanes, "_LEAST_PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(lanes, "_ATTENTION_S", 1e-6)
    monkeypatch.setattr(calibrate, "_TORCH_SPINS_S", 0)


def measure(library):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never been run on a GPU", FiddlerWarning)
        return calibrate.measure({SHAPE: library}, quick=True, accelerator="cuda", name="x", source="A test.")


def test_every_quantity_of_a_gpu_is_measured(cuda: FakeCuda, library) -> None:
    points = {(sample.quantity, sample.tokens, sample.bytes) for sample in measure(library).samples}
    count = Counter(quantity for quantity, *_ in points)
    assert count["cpu_expert"] == count["gpu_expert"] == 4
    assert count["cpu_expert_while_copying"] == 3
    assert count["host_to_device"] == count["host_to_device_pageable"] == count["device_to_host"] >= 4
    assert count["launch"] == 1


def test_copies_whose_memory_may_not_be_locked_are_measured_and_it_is_said(cuda: FakeCuda, library) -> None:
    cuda.fake.native.fake_lock_limit(256 << 10)
    with pytest.warns(FiddlerWarning, match="memory may not be locked here: copies to the GPU are measured as slow"):
        measure(library)


def test_times_are_of_one_launch(cuda: FakeCuda, library) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        device = calibrate.open_device("cuda")
    with device:
        assert 0 < lanes.launches(device)(0) < 1e4
        assert torch.get_num_threads() > 0
