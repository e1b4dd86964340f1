"""The plan format's types; plans/README.md specifies what each means."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ..machine import Machine

FORMAT_MAJOR = 4
FORMAT_MINOR = 0
ABI_VERSION = 7
LAYOUT_VERSION = 1
"""Of packed experts (docs/kernels.md): packed caches on disk carry it."""

STREAM_SLOTS = 2
"""Unpacked experts of the streamed lane: one arrives while the other is computed. Prefetching has one more."""

HEADER = "plan.json"
TABLES = "tables.safetensors"
BUILD_FILE = "kernels/CMakeLists.txt"
Provenance = Literal["measured", "data sheet", "paper"]
Objective = Literal["decode", "prefill", "beam", "balanced"]
Activation = Literal["silu", "gptoss", "gelu", "gelu_tanh"]
"""What an expert computes between its multiplications, of gate g and up u:
silu       g / (1 + e^-g) * u
gptoss     g / (1 + e^-1.702g) * (u + 1), with g limited to 7 and u to -7 .. 7
gelu       g * Phi(g) * u, with the normal distribution function; gelu_tanh with its usual approximation by tanh
"""
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True)
class ExpertForm:
    """What all experts of a model have in common: what kernels are generated for.

    bias  whether gate, up and down each add a bias
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of one expert's bf16 matrices and biases."""
        biases = (2 * self.intermediate_size + self.hidden_size) * self.bias
        return 2 * (3 * self.hidden_size * self.intermediate_size + biases)

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed expert (docs/kernels.md): 32-output blocks, inputs in pairs, zero-padded; fp32 biases."""
        return packed_bytes(self.hidden_size, self.intermediate_size, self.bias)


@dataclass(frozen=True)
class ExpertTensors:
    """Where one expert's numbers are in a checkpoint; {layer} and {expert} are filled in.

    Names without {expert} are of tensors that hold all experts of a layer, by their first dimension. One name for gate
    and up: the tensor holds both, gate first. Empty names: experts have no biases.
    transposed   matrices are [inputs, outputs] instead of [outputs, inputs]
    interleaved  gate and up in one tensor alternate, output by output, instead of following each other

    initializers  of an ONNX file: name -> the file's own name for it; quantised tensors have NAME_scales, and perhaps
                  NAME_zero_points, beside them. Empty for a Hugging Face directory
    notes         what a user should know of an ONNX file's experts, in words
    """

    gate: str
    up: str
    down: str
    gate_bias: str = ""
    up_bias: str = ""
    down_bias: str = ""
    transposed: bool = False
    interleaved: bool = False
    initializers: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_NOT_SIZES = ("name", "activation", "expert_bias", "expert_tensors")


@dataclass(frozen=True)
class ModelSpec:
    """An MoE model as far as running its experts depends on it.

    moe_layers            indices of the decoder layers that have routed experts
    expert_bias           whether routed experts have biases
    identity              config.json keys and values that a model directory must share to run with the plan
    non_expert_bytes      everything but the routed experts, in the model's dtype
    kv_bytes_per_token    keys and values (or what attention keeps for them) of the layers that keep all tokens
    workspace_bytes_per_token  activations that live at once while a token is processed
    window                tokens that the other layers keep, window_kv_bytes_per_token each; 0: there are none
    state_bytes           what a sequence keeps whatever its length (recurrent and convolutional layers)
    expanded_bytes_per_token  what attention makes anew of each cached token, one layer at a time
    """

    name: str
    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    expert_bias: bool
    vocab_size: int
    max_context: int
    expert_tensors: ExpertTensors
    identity: dict[str, str | int | float | bool]
    non_expert_bytes: int
    kv_bytes_per_token: int
    workspace_bytes_per_token: int
    window: int = 0
    window_kv_bytes_per_token: int = 0
    state_bytes: int = 0
    expanded_bytes_per_token: int = 0

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of one sequence's cache after so many tokens."""
        kept = min(tokens, self.window)
        return self.state_bytes + tokens * self.kv_bytes_per_token + kept * self.window_kv_bytes_per_token

    @property
    def expert(self) -> ExpertForm:
        """What its experts have in common."""
        return ExpertForm(self.hidden_size, self.intermediate_size, self.activation, self.expert_bias)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, unpacked, in bf16."""
        return self.expert.bytes

    def staging_bytes(self, prefetch: bool = False) -> int:
        """Of the accelerator's memory, for experts that are streamed: unpacked ones, and a packed one that arrives."""
        return (STREAM_SLOTS + prefetch) * self.expert_bytes + self.expert.packed_bytes

    @property
    def total_experts(self) -> int:
        """Routed experts of all layers."""
        return len(self.moe_layers) * self.num_experts

    @property
    def from_onnx(self) -> bool:
        """Whether the experts are in an ONNX file, which says nothing of the model's family."""
        return bool(self.expert_tensors.initializers)

    @property
    def fingerprint(self) -> str:
        """Identifies the architecture and sizes: what traces and step times depend on, not names, files or weights."""
        # A field that was added with a default leaves the models that have it as they were.
        sizes = {
            field.name: value
            for field in fields(self)
            if field.name not in _NOT_SIZES and (value := getattr(self, field.name)) != field.default
        }
        return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class NarrowTile:
    """Up to so many tokens, so many vectors of outputs beside each other."""

    tokens: int
    vectors: int


@dataclass(frozen=True)
class Blocking:
    """How a kernel cuts its work (docs/kernels.md, Selection).

    tile_tokens, tile_vectors  the register tile: tokens x vectors of outputs
    narrow_tiles  wider tiles that fewer tokens leave registers for, by increasing tokens
    k_block       inputs whose weights stay in the second-level cache while several tiles pass over them
    fetch_tokens  from so many tokens on one pass over the weights fetches them explicitly, fetch_bytes ahead
    """

    tile_tokens: int
    tile_vectors: int
    narrow_tiles: tuple[NarrowTile, ...]
    k_block: int
    fetch_tokens: int
    fetch_bytes: int


@dataclass(frozen=True)
class KernelVariant:
    """One instruction set's kernel. reasons: why it is cut as it is, in words."""

    isa: str
    symbol: str
    blocking: Blocking
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class TunedCandidate:
    """One blocking that `compile --tune` measured.

    change    what differs from the one that the cost model chose, in words; empty for that one itself
    speed     times as fast as that one, by token count: medians over rounds
    median, low, high  of the rounds' geometric means over the token counts: median and quartiles
    """

    change: str
    blocking: Blocking
    speed: tuple[float, ...]
    median: float
    low: float
    high: float
    chosen: bool


@dataclass(frozen=True)
class Tuning:
    """What `compile --tune` measured, on the plan's machine; the cost model's choice first."""

    isa: str
    threads: int
    tokens: tuple[int, ...]
    rounds: int
    candidates: tuple[TunedCandidate, ...]


@dataclass(frozen=True)
class KernelSpec:
    """The generated kernels of one form of experts. tuning: None where the cost model's word was taken."""

    name: str
    hidden_size: int
    intermediate_size: int
    activation: Activation
    bias: bool
    variants: tuple[KernelVariant, ...]
    tuning: Tuning | None

    @property
    def expert(self) -> ExpertForm:
        """What the kernels are made for."""
        return ExpertForm(self.hidden_size, self.intermediate_size, self.activation, self.bias)

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed expert."""
        return self.expert.packed_bytes


def packed_bytes(hidden_size: int, intermediate_size: int, bias: bool = False) -> int:
    """Size of one packed expert: gate/up blocks of 16+16 outputs over hidden pairs, down blocks of 32 over pairs.

    With biases, 32 fp32 for each block follow.
    """

    def blocks(n: int, by: int) -> int:
        return -(-n // by)

    gate_up = blocks(intermediate_size, 16) * blocks(hidden_size, 2) * 32 * 2 * 2
    down = blocks(hidden_size, 32) * blocks(intermediate_size, 2) * 32 * 2 * 2
    biases = (blocks(intermediate_size, 16) + blocks(hidden_size, 32)) * 32 * 4 if bias else 0
    return gate_up + down + biases


@dataclass(frozen=True)
class Options:
    """What the user asked of the compiler, as far as decisions depend on it."""

    objective: Objective
    context: int
    batch: int
    gpu_memory_bytes: int


@dataclass(frozen=True)
class MemoryItem:
    """One line of the accelerator's memory budget."""

    item: str
    bytes: int


@dataclass(frozen=True)
class CurveSummary:
    """How one latency table came about. Errors are relative, over held-out sizes; 0 where nothing was measured.

    interval_low, interval_high  factors on the prediction between which 90 % of held-out times lie; 1 where nothing was
                                 measured
    """

    quantity: Literal["cpu_expert", "gpu_expert", "host_to_device", "rest_of_step"]
    model: str
    formula: str
    heldout_median_error: float
    heldout_max_error: float
    interval_low: float
    interval_high: float
    samples: int
    interpolated: bool
    candidates: dict[str, float]


@dataclass(frozen=True)
class HardwareSummary:
    """Where the latencies come from."""

    name: str
    provenance: Provenance
    source: str
    machine: Machine


@dataclass(frozen=True)
class PlacementSummary:
    """Experts on the accelerator, and what that buys.

    method        "expected time": the least on sampled steps; "popularity": where that was no worse on held-out ones
    hit_rate      share of expert choices that find their expert resident; random_hit_rate: for as many chosen blindly
    relative_time by "placed", "popularity", "random" and "worst": a step's time in its MoE layers, over that of the
                  placement by popularity; the mean of the objective's scenarios, on held-out steps of the trace
    """

    basis: str
    method: Literal["expected time", "popularity"]
    resident_experts: int
    total_experts: int
    hit_rate: float
    random_hit_rate: float
    relative_time: dict[str, float]


@dataclass(frozen=True)
class Feature:
    """Something that the runtime can do and the plan switches on where the simulation says that it pays.

    gain_decode, gain_prefill, gain_beam  the simulated saving, as a share of a step's expert time
    """

    name: Literal["split", "prefetch"]
    on: bool
    gain_decode: float
    gain_prefill: float
    gain_beam: float


@dataclass(frozen=True)
class FileEntry:
    """A file of the plan, by its POSIX path inside the directory."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Header:
    """plan.json. digest is the sha256 of the canonical header with digest set to the empty text."""

    format_major: int
    format_minor: int
    abi: int
    model: ModelSpec
    kernels: KernelSpec
    hardware: HardwareSummary
    options: Options
    memory: tuple[MemoryItem, ...]
    latency: tuple[CurveSummary, ...]
    placement: PlacementSummary
    features: tuple[Feature, ...]
    assumptions: tuple[str, ...]
    tools: dict[str, str]
    files: tuple[FileEntry, ...]
    digest: str


@dataclass(frozen=True)
class Tables:
    """tables.safetensors. r is 2 where the machine's memory has two regimes (docs/calibration.md), else 1; fast first.

    tokens          int32 [n]       grid of the curves: dense from 0, then log-spaced, increasing
    cpu_us          float32 [r, n]  one expert with that many tokens on the CPU, microseconds, non-decreasing
    regime_shares   float32 [r]     how much of the time each regime was seen; sums to 1
    gpu_us          float32 [n]     the same on the accelerator
    rest_us         float32 [n]     a step of that many tokens without its routed experts, the whole model; 0 if unknown
    rest_kv_us      float32 [1]     what each cached token that a step attends to adds to that
    scalars_us      float32 [3]     CPU lane entry c0, accelerator lane entry g0, copy of one expert w
    contention      float32 [1]     gamma, relative slow-down of the CPU lane while copies run
    decode_streams  int32 [top_k + 1]  for a one-token step with that many misses: how many of them to stream whole
    prefetch        int16 [layers, experts, 2]  for a token whose first choice was an expert: the experts off the
                    accelerator that it most likely chooses in the next layer (after the last: in the first, of
                    the next token); or -1
    resident        uint8 [layers, experts]  1 where the expert lives on the accelerator
    popularity      float32 [layers, experts]  share of the layer's choices; rows sum to 1
    """

    tokens: npt.NDArray[np.int32]
    cpu_us: npt.NDArray[np.float32]
    regime_shares: npt.NDArray[np.float32]
    gpu_us: npt.NDArray[np.float32]
    rest_us: npt.NDArray[np.float32]
    rest_kv_us: npt.NDArray[np.float32]
    scalars_us: npt.NDArray[np.float32]
    contention: npt.NDArray[np.float32]
    decode_streams: npt.NDArray[np.int32]
    prefetch: npt.NDArray[np.int16]
    resident: npt.NDArray[np.uint8]
    popularity: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """A plan that was read and verified, and where it lies."""

    path: Path
    header: Header
    tables: Tables
