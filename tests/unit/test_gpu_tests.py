"""The tests of tests/gpu, as far as a torch.cuda of our own carries them: that they would run where there is a GPU.

Not those that need what only a GPU does: memory that runs out, events that take times, a capture that computes nothing.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import fake_cuda
import pytest
from fake_driver import FakeDriver
from gpu import test_gpu_captured as captured
from gpu import test_gpu_engine as lanes

from fiddler_runtime import Engine, ExpertWeights, FiddlerWarning

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = FakeDriver(tmp_path)
    installed = fake_cuda.install(monkeypatch, fake)
    monkeypatch.setattr(captured, "Driver", type(captured.cuda.Driver()))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    yield installed
    fake.close()


@pytest.fixture
def engine(tmp_path: Path):
    plan = lanes.write_sample_plan(tmp_path / "plan", captured.SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        opened = Engine(plan, ExpertWeights.random(), device="cuda", strategies=("resident", "cpu"))
    yield opened
    opened.close()


def test_lanes(tmp_path: Path) -> None:
    lanes.test_the_gpu_computes_what_the_cpu_computes(("resident", "streamed"), 200, tmp_path, fake_cuda.CPU)
    lanes.test_tensors_of_the_host_go_there_and_come_back(tmp_path / "other", fake_cuda.CPU)
    lanes.test_unpacking_there_is_unpacking_here((40, 24), fake_cuda.CPU)


def test_captured_steps(engine: Engine) -> None:
    captured.test_which_way_this_machine_has(fake_cuda.CPU)
    captured.test_replayed_steps_compute_what_the_plain_path_computes(engine, captured.WAYS[0], 1, fake_cuda.CPU)
    captured.test_replays_take(engine, captured.WAYS[0], fake_cuda.CPU)


def test_the_watchdog(engine: Engine) -> None:
    captured.test_a_stream_that_nobody_answers_is_let_go(engine, fake_cuda.CPU)
