"""Every order in which a checkpoint may keep experts is read to the same numbers."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from kernel_samples import Expert, random_expert
from runtime_samples import small_spec
from safetensors.torch import save_file

from fiddler_runtime import ExpertWeights
from fiddler_runtime.errors import FiddlerWarning
from fiddler_runtime.lanes.expert import UnpackedExpert
from fiddler_runtime.orders import StoredExpert
from fiddler_runtime.plan import ExpertTensors
from fiddler_runtime.weights import CheckpointWeights

# all experts in one tensor, gate and up in one, [inputs, outputs], gate and up in turn, biases
ORDERS = [order for order in itertools.product([False, True], repeat=5) if order[1] or not order[3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("stacked", "joined", "transposed", "interleaved", "bias"), ORDERS)
def test_read(
    tmp_path: Path, stacked: bool, joined: bool, transposed: bool, interleaved: bool, bias: bool, dtype: torch.dtype
) -> None:
    place = "l{layer}." + ("" if stacked else "e{expert}.")
    gate, up = (place + name for name in (("both", "both") if joined else ("gate", "up")))
    biases = tuple(f"{name}.b" for name in (gate, up, place + "down")) if bias else ("", "", "")
    names = ExpertTensors(gate, up, place + "down", *biases, transposed, interleaved)
    spec = small_spec(hidden_size=10, intermediate_size=6, expert_tensors=names, expert_bias=bias, num_experts=3)
    generator = torch.Generator().manual_seed(1)
    keys = [(layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)]
    experts = {key: random_expert((10, 6), generator, bias) for key in keys}

    def stored(expert: Expert) -> dict[str, torch.Tensor]:
        matrices = {gate: expert.gate, up: expert.up, place + "down": expert.down}
        if joined:
            matrices[gate] = join(expert.gate, expert.up)
        held = {name: matrix.T if transposed else matrix for name, matrix in matrices.items()}
        if bias:
            b_gate, b_up, b_down = expert.biases
            held |= {biases[0]: b_gate, biases[1]: b_up, biases[2]: b_down}
            if joined:
                held[biases[0]] = join(b_gate, b_up)
        return held

    def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([a, b], 1).flatten(0, 1) if interleaved else torch.cat([a, b])

    tensors: dict[str, torch.Tensor] = {}
    for layer in spec.moe_layers:
        of_layer = [stored(experts[layer, expert]) for expert in range(spec.num_experts)]
        for name in of_layer[0]:
            if stacked:
                tensors[name.format(layer=layer)] = torch.stack([held[name] for held in of_layer])
            else:
                tensors |= {name.format(layer=layer, expert=e): held[name] for e, held in enumerate(of_layer)}
    save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(spec.identity))
    weights = ExpertWeights.load(tmp_path)
    assert isinstance(weights, CheckpointWeights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        weights.check(spec)
    for room in (lambda: StoredExpert.empty(spec.expert, names), lambda: UnpackedExpert.empty(spec.expert)):
        for (layer, index), expert in experts.items():
            read = room()
            for part in (*read.matrices, *read.biases):
                part.fill_(torch.nan)
            weights.read(layer, index, *read.matrices, read.biases)
            expected = (expert.gate, expert.up, expert.down, *expert.biases)
            copied = UnpackedExpert.empty(spec.expert)
            copied.fill(read)
            for found in (read, copied):
                parts = zip((*found.matrices, *found.biases), expected, strict=True)
                assert all(torch.equal(a, b) for a, b in parts)
            if isinstance(read, StoredExpert) and dtype == torch.bfloat16:
                assert not weights._scratch, "bytes go from the file to where they are packed from"
