"""Calibrating this machine with real kernels. What is measured is checked for sense, never for speed."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fiddler_runtime.build import build_kernels
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.kernels import KernelLibrary, Kernels
from fiddler_runtime.machine import this_machine
from fiddlerc import codegen, latency
from fiddlerc.hardware import calibrate, load_hardware, measure, write_hardware
from fiddlerc.hardware.regimes import Regimes
from fiddlerc.ir import ExpertTensors, ModelSpec

# Kernels are built first.
pytestmark = pytest.mark.slow

SHAPE = (128, 256)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    sources = codegen.generate(*SHAPE)
    return KernelLibrary(build_kernels(sources.write(tmp_path_factory.mktemp("kernels"))), sources.spec)


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"tokens": (1, 2, 4, 8, 16, 32), "copy_widths": (32, 512)}
    effort = replace(calibrate.QUICK, seconds=0.1, **sizes)  # type: ignore[arg-type]
    monkeypatch.setattr(calibrate, "QUICK", effort)
    # What the machine's memory does meanwhile is no matter of these tests.
    monkeypatch.setattr(calibrate, "split_regimes", lambda reads: Regimes(max(reads)))


def spec(hidden: int, intermediate: int) -> ModelSpec:
    names = ExpertTensors("g", "u", "d")
    return ModelSpec("m", "A", 1, (0,), 8, 2, hidden, intermediate, "silu", False, 10, 10, names, {}, 1, 1, 1)


def test_a_calibration_has_every_quantity_and_makes_a_latency_model(
    library: KernelLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int, int]] = []
    threads = threading.active_count()
    monkeypatch.setattr(Kernels, "settle_probed", lambda *_: False)
    with pytest.warns(FiddlerWarning, match="bandwidth lie on other memory nodes"):
        calibration = measure(
            {SHAPE: library},
            quick=True,
            accelerator="simulated",
            name="here",
            source="A test.",
            progress=lambda *step: steps.append(step),
        )
    assert threading.active_count() == threads
    assert [done for _, done, _ in steps] == list(range(1, steps[-1][2] + 1))

    assert (calibration.name, calibration.provenance) == ("here", "measured")
    assert calibration.source.startswith("A test.")
    assert calibration.machine.accelerator.kind == "simulated"
    assert calibration.limits.cpu_entry_us > 0 and calibration.limits.gpu_entry_us > 0
    count = Counter(sample.quantity for sample in calibration.samples)
    assert count["cpu_expert"] == count["gpu_expert"] == 6
    assert count["cpu_expert_while_copying"] == 3
    assert count["host_to_device"] == count["device_to_host"] >= 4
    assert count["launch"] == 1
    assert count["host_to_device_pageable"] == 0, "only a GPU's copies need memory that is locked"
    assert all(sample.median_us > 0 for sample in calibration.samples)
    cpu = [sample for sample in calibration.samples if sample.quantity == "cpu_expert"]
    assert {sample.isa for sample in cpu} == {library.open().isa}
    assert {sample.threads for sample in cpu} == {calibration.limits.cpu_threads}
    assert all(sample.median_us > 0 for sample in cpu)

    write_hardware(calibration, tmp_path / "hw.json")
    assert load_hardware(str(tmp_path / "hw.json")) == calibration
    own, other = latency.fit(calibration, spec(*SHAPE)), latency.fit(calibration, spec(2048, 768))
    assert [curve.interpolated for curve in own.curves] == [True] * 3 + [False], "no model's steps were measured"
    assert [curve.interpolated for curve in other.curves[:2]] == [False] * 2


def test_without_an_accelerator_only_the_cpu_is_measured(library: KernelLibrary) -> None:
    calibration = measure({SHAPE: library}, quick=True, accelerator="none", name="cpu", source="A test.")
    assert {sample.quantity for sample in calibration.samples} == {"cpu_expert"}
    assert calibration.limits.gpu_read_gbps == calibration.limits.host_to_device_gbps == 0
    assert latency.fit(calibration, spec(*SHAPE)).stream_us > 1e9


def test_an_interruption_leaves_no_thread_behind(library: KernelLibrary) -> None:
    threads = threading.active_count()

    def interrupt(label: str, done: int, total: int) -> None:
        if "copying" in label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({SHAPE: library}, quick=True, accelerator="simulated", name="x", source="x", progress=interrupt)
    assert threading.active_count() == threads


@pytest.mark.parametrize(("attention", "displaced"), [(1, 2 << 20), (3 << 20, 3 << 20), (90 << 20, 8 << 20)])
def test_attention_displaces_its_weights_from_the_caches(attention: int, displaced: int) -> None:
    machine = replace(this_machine("none"), l2_bytes=1 << 20, cores=2)
    assert calibrate.displaced_bytes(calibrate.ModelBytes(1 << 30, attention), machine) == displaced


def test_nothing_to_measure() -> None:
    with pytest.raises(FiddlerError, match="no expert shape"):
        measure({}, quick=True, name="x", source="x")


def test_a_gpu_that_is_not_there(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(FiddlerError, match="no CUDA device"):
        measure({SHAPE: library}, quick=True, accelerator="cuda", name="x", source="x")
