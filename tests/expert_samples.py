"""Experts on an accelerator for tests, and what they compute in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fiddler_runtime.lanes.expert import UnpackedExpert
from fiddler_runtime.lanes.resident_kernels import Choice, ExpertKernels, Kernel
from fiddler_runtime.lanes.routing import Share
from fiddler_runtime.plan import ExpertForm

CPU = torch.device("cpu")
# Tails of every block and tile: 17 blocks of 16 rows and half of one, 3 blocks of 32 columns and a quarter.
FORMS = [
    ExpertForm(104, 280),
    ExpertForm(104, 280, "gptoss", bias=True),
    ExpertForm(104, 280, "gelu"),
    ExpertForm(64, 32, "gelu_tanh", bias=True),
]


def experts_of(form: ExpertForm, count: int) -> dict[int, UnpackedExpert]:
    """Experts 3, 4, ...: not their places."""
    generator = torch.Generator().manual_seed(form.hidden_size)
    made = {}
    for expert in range(3, 3 + count):
        made[expert] = UnpackedExpert.empty(form)
        for part in (*made[expert].matrices, *made[expert].biases):
            # Large enough for gpt-oss's limits to matter.
            part.normal_(0.0, 4.0 * float(part.shape[-1]) ** -0.5, generator=generator)
    return made


def in_float64(expert: UnpackedExpert, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The expert's result for x [n, H], and a bound of what roundings to bf16 may add up to in each number."""
    gate, up, down = (matrix.double() for matrix in expert.matrices)
    gate_bias, up_bias, down_bias = (b.double() for b in expert.biases) if expert.biases else (0.0, 0.0, 0.0)
    g, u = x.double() @ gate.T + gate_bias, x.double() @ up.T + up_bias
    if expert.activation == "silu":
        inner = F.silu(g) * u
    elif expert.activation == "gptoss":
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        inner = g * torch.sigmoid(1.702 * g) * (u + 1)
    else:
        inner = F.gelu(g, approximate="tanh" if expert.activation == "gelu_tanh" else "none") * u
    # How far inner moves when gate and up are rounded: no activation here is steeper than 1.2, plus the product's own.
    moved = 1.2 * g.abs() * (u.abs() + 1) + inner.abs()
    return inner @ down.T + down_bias, moved @ down.abs().T + abs(down_bias) + 1e-3


def check_kernel(kernel: Kernel, form: ExpertForm, counts: list[int], device: torch.device = CPU) -> None:
    """Holds a kernel against float64: experts with so many tokens each, in another order than they are held."""
    experts = experts_of(form, len(counts))
    generator = torch.Generator().manual_seed(1)
    tokens = 70
    hidden = torch.randn(tokens, form.hidden_size, generator=generator).bfloat16()
    rows = torch.cat([torch.randperm(tokens, generator=generator)[:count] for count in counts])
    weights = torch.rand(len(rows), generator=generator)
    stops = torch.tensor(counts).cumsum(0).tolist()
    shares = [Share(e, stop - n, stop) for e, n, stop in zip(experts, counts, stops, strict=True)]
    expected, bound = (torch.zeros(tokens, form.hidden_size, dtype=torch.float64) for _ in range(2))
    for share in shares:
        part = slice(share.start, share.stop)
        result, moved = in_float64(experts[share.expert], hidden[rows[part]])
        expected.index_add_(0, rows[part], result * weights[part, None].double())
        bound.index_add_(0, rows[part], moved * weights[part, None].double())
    choice = Choice(kernel.layout, ((0, kernel.name),), "a test")
    kernels = ExpertKernels(form, device, choice)
    held = kernels.hold({expert: matrices.to(device) for expert, matrices in experts.items()})
    out = torch.full((tokens, form.hidden_size), 2.0, device=device)
    kernels.run(hidden.to(device), rows.to(device), weights.to(device), held, shares[::-1], out)
    error = (out.cpu().double() - 2.0 - expected).abs()
    assert (error <= 2.0**-8 * bound).all(), float((error / bound).max())
