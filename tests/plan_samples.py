"""A small valid plan, made without the compiler, for tests to write, read and damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fiddler_runtime.machine import Accelerator, Machine
from fiddler_runtime.plan import (
    ABI_VERSION,
    FORMAT_MAJOR,
    FORMAT_MINOR,
    Blocking,
    CurveSummary,
    ExpertTensors,
    Feature,
    HardwareSummary,
    Header,
    KernelSpec,
    KernelVariant,
    MemoryItem,
    ModelSpec,
    NarrowTile,
    Options,
    PlacementSummary,
    Plan,
    Tables,
    TunedCandidate,
    Tuning,
    write_plan,
)

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 4, 2, 64, 96

FILES = {
    "kernels/CMakeLists.txt": b"# made up\n",
    "kernels/include/fiddler/abi.h": b"/* made up */\n",
    "report.html": b"<!doctype html>\n",
}

SAMPLE_TUNING = Tuning(
    "avx2",
    2,
    (1, 64),
    3,
    (
        TunedCandidate("", Blocking(2, 2, (NarrowTile(1, 4),), 256, 1, 8192), (1.0, 1.0), 1.0, 1.0, 1.0, False),
        TunedCandidate(
            "k_block 512", Blocking(2, 2, (NarrowTile(1, 4),), 512, 1, 8192), (1.0, 1.1), 1.05, 1.0, 1.1, True
        ),
    ),
)


def sample_model(**changes: Any) -> ModelSpec:
    """Two MoE layers (1 and 2) of three, four experts of 64 x 96, top-2."""
    model = ModelSpec(
        name="sample",
        architecture="MixtralForCausalLM",
        num_layers=3,
        moe_layers=(1, 2),
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        activation="silu",
        expert_bias=False,
        vocab_size=128,
        max_context=256,
        expert_tensors=ExpertTensors(
            gate="layers.{layer}.experts.{expert}.w1.weight",
            up="layers.{layer}.experts.{expert}.w3.weight",
            down="layers.{layer}.experts.{expert}.w2.weight",
        ),
        identity={"model_type": "mixtral", "hidden_size": HIDDEN, "rope_theta": 1e6, "tie_word_embeddings": False},
        non_expert_bytes=100_000,
        kv_bytes_per_token=512,
        workspace_bytes_per_token=1024,
    )
    return replace(model, **changes)


def sample_machine(**changes: Any) -> Machine:
    """A machine with every instruction set of ours and a simulated accelerator."""
    machine = Machine(
        cpu="Made-up CPU",
        cores=8,
        isa=("avx512_bf16", "avx512f", "avx2", "scalar"),
        l1d_bytes=32 << 10,
        l2_bytes=1 << 20,
        l3_bytes=32 << 20,
        numa_nodes=1,
        memory_bytes=64 << 30,
        accelerator=Accelerator("simulated", "simulated", 16 << 30, ""),
    )
    return replace(machine, **changes)


def sample_header(**changes: Any) -> Header:
    """The header of `sample_tables`: three experts resident."""
    header = Header(
        format_major=FORMAT_MAJOR,
        format_minor=FORMAT_MINOR,
        abi=ABI_VERSION,
        model=sample_model(),
        kernels=KernelSpec(
            name="sample",
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            activation="silu",
            bias=False,
            variants=(
                KernelVariant(
                    "avx512_bf16", "fdl_bf16_moe_h64_i96__avx512bf16", Blocking(4, 4, (), 1024, 5, 8192), ("because",)
                ),
                KernelVariant(
                    "avx2", "fdl_bf16_moe_h64_i96__avx2", Blocking(2, 2, (NarrowTile(1, 4),), 512, 1, 8192), ()
                ),
            ),
            tuning=SAMPLE_TUNING,
        ),
        hardware=HardwareSummary("made-up", "measured", "tests", sample_machine()),
        options=Options("decode", 128, 1, 1 << 20),
        memory=(MemoryItem("non-expert weights", 100_000), MemoryItem("KV cache", 65_536)),
        latency=(
            CurveSummary(
                "cpu_expert", "linear", "1 + 2 n", 0.01, 0.02, 0.9, 1.1, 20, True, {"linear": 0.01, "flat": 0.5}
            ),
        ),
        placement=PlacementSummary(
            "uniform assumption", "popularity", 3, LAYERS * EXPERTS, 0.375, 0.375, {"placed": 0.9, "worst": 1.2}
        ),
        features=(Feature("split", False, 0.0, 0.01, 0.0), Feature("prefetch", False, 0.0, 0.0, 0.0)),
        assumptions=("made up",),
        tools={"fiddlerc": "0"},
        files=(),
        digest="",
    )
    return replace(header, **changes)


def sample_tables(**changes: Any) -> Tables:
    """Latencies under which a miss of one token stays on the CPU."""
    tokens = np.array([0, 1, 2, 3, 4, 8, 64, 512], np.int32)
    tables = Tables(
        tokens=tokens,
        cpu_us=(tokens * 10.0).astype(np.float32)[None],
        regime_shares=np.ones(1, np.float32),
        rest_us=np.where(tokens > 0, 100 + tokens, 0).astype(np.float32),
        rest_kv_us=np.array([0.01], np.float32),
        prefetch=np.full((LAYERS, EXPERTS, 2), -1, np.int16),
        gpu_us=np.where(tokens > 0, 5 + 0.01 * tokens, 0).astype(np.float32),
        scalars_us=np.array([1, 2, 25], np.float32),
        contention=np.array([0.1], np.float32),
        decode_streams=np.zeros(TOP_K + 1, np.int32),
        resident=np.array([[1, 0, 0, 0], [0, 1, 1, 0]], np.uint8),
        popularity=np.full((LAYERS, EXPERTS), 1 / EXPERTS, np.float32),
    )
    return replace(tables, **changes)


def write_sample(dest: Path, **changes: Any) -> Plan:
    """Writes the sample plan; `changes` are header fields."""
    return write_plan(dest, sample_header(**changes), sample_tables(), FILES)
