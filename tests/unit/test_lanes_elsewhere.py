"""The accelerator's lanes on memory that is neither the host's nor readable: torch's meta tensors stand for a GPU's.

Nothing is computed. But an operation on tensors of both sides is an error there, as it is on a GPU, and so is looking
at a value, for which a GPU's queue would have to be waited for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_samples import FORMS
from runtime_samples import small_spec, write_sample_plan

from fiddler_runtime import Engine, ExpertWeights
from fiddler_runtime import engine as engine_module
from fiddler_runtime.lanes.device import SimulatedDevice, Ticket, UnpackedExpert
from fiddler_runtime.lanes.resident_kernels import Choice, ExpertKernels
from fiddler_runtime.lanes.routing import Share
from fiddler_runtime.plan import ExpertForm, Feature

META = torch.device("meta")
CHOICES = (
    Choice("matrix", ((0, "linear"),), "a test"),
    Choice("matrix", ((0, "grouped_mm"),), "a test"),
    Choice("packed", ((0, "unpacked"),), "a test"),
)


class Elsewhere(SimulatedDevice):
    """What is asked back from it has been said before: `known`."""

    def __init__(self, known: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.torch_device = META
        self._known = known

    def to_host(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Ticket]:
        assert tensor.device == META
        return self._known[name].to(dtype), None


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.kernels[0][1])
def test_lanes_need_nothing_of_the_host(choice: Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = small_spec(hidden_size=64, intermediate_size=200)
    plan = write_sample_plan(tmp_path / "plan", spec, features=(Feature("split", True, 0.1, 0.1, 0.1),))
    generator = torch.Generator().manual_seed(0)
    known: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        engine_module, "kernels_on", lambda _, library, isa: ExpertKernels(library.spec.expert, META, choice)
    )
    monkeypatch.setattr(engine_module, "open_device", lambda kind: Elsewhere(known))
    with Engine(plan, ExpertWeights.random()) as engine:
        assert engine.device == META
        for tokens in (1, 25, 160):
            scores = torch.rand(tokens, spec.num_experts, generator=generator)
            scores += torch.linspace(0, 1.2, spec.num_experts)
            weights, ids = scores.topk(spec.top_k)
            # Rows of a wider tensor: what the kernels are given is contiguous all the same.
            wide = torch.randn(tokens, 2 * spec.hidden_size, generator=generator).bfloat16()
            known |= {"ids": ids, "weights": weights, "hidden": wide[:, : spec.hidden_size].contiguous()}
            for layer in spec.moe_layers:
                out = engine.moe(layer, wide.to(META)[:, : spec.hidden_size], ids.to(META), weights.to(META))
                assert (out.device, out.shape, out.dtype) == (META, (tokens, spec.hidden_size), torch.bfloat16)
        calls = engine.counters()["expert_calls"]
        assert calls["resident"] and calls["streamed"] and calls["split"] and calls["cpu"], "all lanes had work"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.activation}{'-bias' * form.bias}")
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.kernels[0][1])
def test_kernels_need_nothing_of_the_host(choice: Choice, form: ExpertForm):
    """Within captured steps and without."""
    kernels = ExpertKernels(form, META, choice)
    held = kernels.hold({expert: UnpackedExpert.empty(form, META) for expert in range(3)})
    hidden = torch.zeros(4, form.hidden_size, dtype=torch.bfloat16, device=META)
    ids = torch.zeros(4, 2, dtype=torch.int64, device=META)
    weights, out = ids.float(), hidden.float()
    kernels.run_masked(hidden, ids, weights, held, out)
    kernels.run(hidden, ids.view(-1), weights.view(-1), held, [Share(2, 0, 3), Share(0, 3, 8)], out)
    slot = kernels.slot()
    kernels.landed(kernels.landing(slot), slot)
    assert out.device == META
