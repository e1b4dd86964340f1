"""The tests of this folder run on a GPU or not at all, and say which."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

REASON = "no NVIDIA GPU that torch can use"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the log is a log of."""
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"tests/gpu: nothing was run: {REASON}. No result of this project comes from one.")
        return
    properties = torch.cuda.get_device_properties(0)
    terminalreporter.write_line(
        f"tests/gpu: {properties.name}, {properties.total_memory >> 20} MiB, compute capability "
        f"{properties.major}.{properties.minor}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
    smi = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.current,pcie.link.width.current", "--format=csv"]
    try:
        done = subprocess.run(smi, capture_output=True, text=True, timeout=30, check=True)
        terminalreporter.write_line(done.stdout.strip())
    except (OSError, subprocess.SubprocessError) as error:
        terminalreporter.write_line(f"nvidia-smi: {error}")


@pytest.fixture
def where() -> torch.device:
    """Where tensors of the tests live."""
    return torch.device("cuda", torch.cuda.current_device())
