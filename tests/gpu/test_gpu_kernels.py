"""The kernels that compute experts on a GPU, and the choice between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_samples import FORMS, check_kernel

from fiddler_runtime.lanes import kernel_choice
from fiddler_runtime.lanes.resident_kernels import KERNELS
from fiddler_runtime.plan import ExpertForm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]


@pytest.mark.parametrize("form", [*FORMS, ExpertForm(4096, 1536)], ids=lambda form: f"{form.activation}")
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_equals_float64(name: str, form: ExpertForm):
    device = torch.device("cuda")
    missing = KERNELS[name].missing(form, device)
    if missing is not None:
        pytest.skip(missing)
    check_kernel(KERNELS[name], form, [1, 0, 33, 2, 70], device)


def test_kernels_are_measured_and_one_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path))
    form, device = ExpertForm(2048, 768), torch.device("cuda")
    chosen = kernel_choice.choose(form, device)
    (path,) = (tmp_path / "accelerator").iterdir()
    print(chosen, path.read_text())
    assert chosen.reason.startswith("measured on")
    assert kernel_choice.recorded(form, device) == chosen
    record = kernel_choice._read(path, kernel_choice._empty(form, device))
    assert record is not None
    wrong = {name: why for name, why in record.left_out.items() if "from those of torch" in why}
    assert not wrong, "a kernel that computes something else"
