"""Every type that flows between the compiler's stages.

Those that end in the plan are defined by the plan's format (`fiddler_runtime.plan`) and named here again; the others
are defined here. All are frozen; units are in the field names; docstrings give shapes and dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fiddler_runtime.machine import Accelerator, Machine
from fiddler_runtime.plan import (
    ACTIVATIONS,
    Activation,
    Blocking,
    CurveSummary,
    ExpertForm,
    ExpertTensors,
    Feature,
    KernelSpec,
    KernelVariant,
    MemoryItem,
    ModelSpec,
    NarrowTile,
    Objective,
    Options,
    PlacementSummary,
    Provenance,
    Tables,
    TunedCandidate,
    Tuning,
)

__all__ = [
    "ACTIVATIONS",
    "ONNX_DOMAIN",
    "ONNX_METADATA",
    "ONNX_NODE",
    "Accelerator",
    "Activation",
    "Blocking",
    "Calibration",
    "CurveSummary",
    "ExpertForm",
    "ExpertTensors",
    "Feature",
    "KernelSources",
    "KernelSpec",
    "KernelVariant",
    "LatencyModel",
    "Limits",
    "Machine",
    "MemoryBudget",
    "MemoryItem",
    "ModelSpec",
    "NarrowTile",
    "Objective",
    "OnnxDescription",
    "Options",
    "Placement",
    "PlacementSummary",
    "PolicyResult",
    "Prediction",
    "Provenance",
    "Regime",
    "Sample",
    "Scenario",
    "StepSample",
    "Steps",
    "Tables",
    "Trace",
    "TunedCandidate",
    "Tuning",
]

Regime = Literal["fast", "slow"]
Scenario = Literal["decode", "prefill", "beam"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
Quantity = Literal[
    "cpu_expert",
    "gpu_expert",
    "host_to_device",
    "host_to_device_pageable",
    "device_to_host",
    "cpu_expert_while_copying",
    "launch",
]
COPIES: tuple[Quantity, ...] = ("host_to_device", "host_to_device_pageable", "device_to_host", "launch")
"""Quantities of so many bytes, and of no expert's shape."""


@dataclass(frozen=True)
class Sample:
    """One measured point.

    Experts: hidden_size, intermediate_size and tokens are set and bytes is the weights read.
    Copies: bytes is the amount copied and the shape fields are 0.
    regime: of the host's memory, see Limits; "fast" is also what a machine with one regime has.
    """

    quantity: Quantity
    hidden_size: int
    intermediate_size: int
    tokens: int
    bytes: int
    threads: int
    isa: str
    median_us: float
    spread_us: float
    repeats: int
    regime: Regime


@dataclass(frozen=True)
class StepSample:
    """One measured step of a model without its routed experts: attention, norms, router, head, the runtime's own work.

    tokens     computed by the step, of all sequences together
    sequences  side by side;  context: tokens that each had in its cache before
    The other fields are the model's: what a step of another model can be extrapolated from.
    """

    model: str
    model_fingerprint: str
    num_layers: int
    non_expert_bytes: int
    kv_bytes_per_token: int
    tokens: int
    sequences: int
    context: int
    median_us: float
    spread_us: float
    repeats: int


@dataclass(frozen=True)
class Limits:
    """The machine's ceilings: measured, or read from a data sheet. 0 where there is no such device.

    Some machines' memory switches between two bandwidths every few seconds. cpu_read_gbps is then the fast regime's,
    cpu_read_slow_gbps the slow one's (0 on a machine with one), cpu_slow_share how much of the time it was seen.
    """

    cpu_threads: int
    cpu_read_gbps: float
    cpu_read_slow_gbps: float
    cpu_slow_share: float
    cpu_peak_gflops: float
    gpu_read_gbps: float
    gpu_peak_gflops: float
    host_to_device_gbps: float
    device_to_host_gbps: float
    cpu_entry_us: float
    gpu_entry_us: float


@dataclass(frozen=True)
class Calibration:
    """hw.json: a machine, its limits and raw samples. A data sheet has limits and no samples."""

    schema: Literal["fiddlerc-hw/2"]
    name: str
    provenance: Provenance
    source: str
    machine: Machine
    limits: Limits
    samples: tuple[Sample, ...]
    steps: tuple[StepSample, ...]


@dataclass(frozen=True)
class Trace:
    """Which experts a text chose, in one model.

    counts    int64 [layers, experts]  choices per phase: 0 prefill, 1 decode; shape [2, layers, experts]
    experts   uint16 [tokens, layers, top_k], or None for imported counts
    sequence  int32 [tokens], position int32 [tokens], phase uint8 [tokens] (0 prefill, 1 decode), or None alike
    """

    model_fingerprint: str
    model_name: str
    source: str
    counts: npt.NDArray[np.int64]
    experts: npt.NDArray[np.uint16] | None
    sequence: npt.NDArray[np.int32] | None
    position: npt.NDArray[np.int32] | None
    phase: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Steps:
    """Steps of one scenario, as placement and simulation replay them.

    counts    int32 [steps, layers, experts]  how many tokens of the step chose each expert
    tokens    int32 [steps]     computed by the step, of all sequences together
    kv        int32 [steps]     cached tokens that the step attends to, summed over its sequences
    heldout   bool [steps]      not to be fitted to: what a choice is judged by
    """

    scenario: Scenario
    counts: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    kv: npt.NDArray[np.int32]
    heldout: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LatencyModel:
    """Fitted latencies of one expert shape on one machine; what the dispatch tables are sampled from.

    tokens int32 [n] grid; cpu_us float64 [r, n], gpu_us, rest_us float64 [n], non-decreasing; regime_shares
    float64 [r]; all as in plan.Tables. Scalars in microseconds.
    """

    tokens: npt.NDArray[np.int32]
    cpu_us: npt.NDArray[np.float64]
    regime_shares: npt.NDArray[np.float64]
    gpu_us: npt.NDArray[np.float64]
    rest_us: npt.NDArray[np.float64]
    rest_kv_us: float
    cpu_overhead_us: float
    gpu_overhead_us: float
    stream_us: float
    contention: float
    curves: tuple[CurveSummary, ...]

    @property
    def prevailing_us(self) -> npt.NDArray[np.float64]:
        """c(n) in the regime that was seen most, float64 [n]."""
        prevailing: npt.NDArray[np.float64] = self.cpu_us[int(np.argmax(self.regime_shares))]
        return prevailing


@dataclass(frozen=True)
class MemoryBudget:
    """The accelerator's memory, item by item, and how many experts fit in what is left."""

    total_bytes: int
    items: tuple[MemoryItem, ...]
    resident_experts: int


@dataclass(frozen=True)
class Placement:
    """resident bool [layers, experts]; popularity float64 [layers, experts], rows sum to 1."""

    resident: npt.NDArray[np.bool_]
    popularity: npt.NDArray[np.float64]
    summary: PlacementSummary


@dataclass(frozen=True)
class PolicyResult:
    """What one strategy is predicted to reach. kernels: whose CPU kernels its times are of."""

    policy: str
    kernels: str
    decode_tokens_per_s: float
    ttft_s: float
    prefill_tokens: int
    beam_tokens_per_s: float
    beam_width: int
    hit_rate: float


@dataclass(frozen=True)
class Prediction:
    """Our strategy first, then those of the literature.

    regimes     decode tokens/s of ours in the (slow, fast) memory regime; None on machines with one
    interval    factors on our times between which 90 % of them are expected; None where something is unmeasured
    unmeasured  quantities (CurveSummary) that were not measured of this model's own shapes
    """

    results: tuple[PolicyResult, ...]
    regimes: tuple[float, float] | None
    interval: tuple[float, float] | None
    unmeasured: tuple[str, ...]


# Our own node in ONNX files (docs/onnx.md), and the key of a file's metadata under which an OnnxDescription is.
ONNX_DOMAIN, ONNX_NODE, ONNX_METADATA = "fiddlerc", "Experts", "fiddlerc.model"


@dataclass(frozen=True)
class OnnxDescription:
    """What an exported graph does not tell of its model, as JSON in the file; fields as in ModelSpec."""

    name: str
    architecture: str
    num_layers: int
    vocab_size: int
    max_context: int
    kv_bytes_per_token: int
    workspace_bytes_per_token: int
    window: int
    window_kv_bytes_per_token: int
    state_bytes: int
    expanded_bytes_per_token: int
    identity: dict[str, str | int | float | bool]


@dataclass(frozen=True)
class KernelSources:
    """Generated text by its path below the plan's kernels/ folder."""

    spec: KernelSpec
    files: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Writes them below the folder, and returns it. Raises OSError."""
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return folder
