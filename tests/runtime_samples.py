"""Plans for the runtime's tests: real kernels, and latencies made up so that every strategy is chosen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from fiddler_runtime.machine import Accelerator, AcceleratorKind, cpu_isas, this_machine
from fiddler_runtime.plan import (
    ABI_VERSION,
    FORMAT_MAJOR,
    FORMAT_MINOR,
    ExpertTensors,
    Feature,
    HardwareSummary,
    Header,
    MemoryItem,
    ModelSpec,
    Options,
    PlacementSummary,
    Plan,
    write_plan,
)
from fiddlerc import codegen, ir, placement

Tensors = dict[str, torch.Tensor]
TINY_MIXTRAL = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
# Of sample plans: what runs here, and the oracle. To compile them all takes twice as long.
ISAS = tuple(dict.fromkeys((cpu_isas()[0], "scalar")))


def small_spec(**changes: object) -> ModelSpec:
    """A model without a checkpoint: 2 MoE layers (1 and 2) of 3, 6 experts of 64 x 96, top-2."""
    values: dict[str, object] = {
        "name": "small",
        "architecture": "MixtralForCausalLM",
        "num_layers": 3,
        "moe_layers": (1, 2),
        "num_experts": 6,
        "top_k": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "activation": "silu",
        "expert_bias": False,
        "vocab_size": 128,
        "max_context": 256,
        "expert_tensors": ExpertTensors(
            gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
            down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        ),
        "identity": {"model_type": "small"},
        "non_expert_bytes": 1 << 20,
        "kv_bytes_per_token": 1024,
        "workspace_bytes_per_token": 1024,
    }
    return ModelSpec(**{**values, **changes})  # type: ignore[arg-type]


def every_third(spec: ModelSpec) -> npt.NDArray[np.bool_]:
    """Every third expert resident, shifted by one from layer to layer."""
    rows, columns = np.indices((len(spec.moe_layers), spec.num_experts))
    return (rows + columns) % 3 == 0


def write_sample_plan(
    dest: Path,
    spec: ModelSpec,
    *,
    resident: npt.NDArray[np.bool_] | None = None,
    accelerator: AcceleratorKind = "simulated",
    features: tuple[Feature, ...] = (),
    prefetch: npt.NDArray[np.int16] | None = None,
    us: float = 1.0,
    speed_up: float = 1.0,
    copy: float = 25.0,
) -> Plan:
    """A plan whose CPU takes `us` a token, its accelerator `speed_up` times less, copying an expert `copy` times `us`.

    So few tokens are computed on the CPU, and many are parted between all three strategies. Where an accelerator takes
    time for copies alone, it pays to split an expert.
    """
    mask = every_third(spec) if resident is None else resident
    tokens = np.array([*range(65), 128, 1024, 8192], np.int32)
    latency = ir.LatencyModel(
        tokens=tokens,
        cpu_us=us * tokens[None],
        regime_shares=np.ones(1),
        gpu_us=us / speed_up * tokens,
        rest_us=0.0 * tokens,
        rest_kv_us=0.0,
        cpu_overhead_us=1.0,
        gpu_overhead_us=1.0,
        stream_us=copy * us,
        contention=0.1,
        curves=(),
    )
    uniform = np.full(mask.shape, 1.0 / spec.num_experts)
    summary = PlacementSummary(
        basis="made up",
        method="popularity",
        resident_experts=int(mask.sum()),
        total_experts=mask.size,
        hit_rate=float(mask.mean()),
        random_hit_rate=float(mask.mean()),
        relative_time={},
    )
    tables = placement.make_tables(spec, latency, ir.Placement(mask, uniform, summary), prefetch)
    sources = codegen.generate(
        spec.hidden_size, spec.intermediate_size, ISAS, activation=spec.activation, bias=spec.expert_bias
    )
    if accelerator == "cuda":
        gpu = Accelerator("cuda", "a made up GPU", 1 << 30, "1.0")
        machine = dataclasses.replace(this_machine("none"), accelerator=gpu)
    else:
        machine = this_machine(accelerator)
    header = Header(
        format_major=FORMAT_MAJOR,
        format_minor=FORMAT_MINOR,
        abi=ABI_VERSION,
        model=spec,
        kernels=sources.spec,
        hardware=HardwareSummary("made-up", "measured", "tests", machine),
        options=Options("balanced", 128, 1, 1 << 30),
        memory=(MemoryItem("KV cache (1 x 128 tokens)", 128 * spec.kv_bytes_per_token),),
        latency=(),
        placement=summary,
        features=features,
        assumptions=(),
        tools={},
        files=(),
        digest="",
    )
    return write_plan(dest, header, tables, {f"kernels/{n}": t.encode() for n, t in sources.files.items()})


def checkpoint_tensors(spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Every expert of a checkpoint, by name."""
    generator = torch.Generator().manual_seed(2)
    names = spec.expert_tensors
    wide = (spec.intermediate_size, spec.hidden_size)
    return {
        pattern.format(layer=layer, expert=expert): torch.randn(shape, generator=generator).to(dtype) / 8
        for layer in spec.moe_layers
        for expert in range(spec.num_experts)
        for pattern, shape in ((names.gate, wide), (names.up, wide), (names.down, wide[::-1]))
    }


def write_checkpoint(folder: Path, spec: ModelSpec, tensors: Tensors, shards: int = 1) -> Path:
    """config.json and the tensors, dealt out to that many shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(spec.identity))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def matrices(tensors: Tensors, spec: ModelSpec, layer: int, expert: int) -> list[torch.Tensor]:
    """gate, up and down of one expert."""
    names = spec.expert_tensors
    return [tensors[p.format(layer=layer, expert=expert)] for p in (names.gate, names.up, names.down)]
