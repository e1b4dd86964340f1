"""What must hold for a header and its tables beyond their types. Writer and reader both check, before and after."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FiddlerError
from ..machine import KNOWN_ISAS
from .schema import (
    BUILD_FILE,
    HEADER,
    TABLES,
    Blocking,
    ExpertForm,
    ExpertTensors,
    FileEntry,
    Header,
    KernelSpec,
    ModelSpec,
    Tables,
)

# Far above any model, far below where a product of two of them no longer fits 63 bits.
MAX_EXPERTS = 1024
MAX_LAYERS = 4096
MAX_SIZE = 1 << 20
MAX_TOKENS = 1 << 24
MAX_FILES = 4096

_NAME = re.compile(r"[A-Za-z0-9_]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Tables hold float32: shares of a row are each rounded once.
_ROW_SUM_TOLERANCE = 1e-4


def check_header(header: Header) -> None:
    """Raises FiddlerError naming the first field of plan.json whose value contradicts the format or another field."""
    model = header.model
    _check_model(model)
    _check_kernels(header.kernels, model)
    _between("options.context", header.options.context, 1, model.max_context)
    _between("options.batch", header.options.batch, 1, MAX_SIZE)
    _not_negative("options.gpu_memory_bytes", header.options.gpu_memory_bytes)
    _check_machine(header)
    for curve in header.latency:
        _not_negative(f"latency.{curve.quantity}", curve.samples, curve.heldout_median_error, curve.heldout_max_error)
        if not 0.0 < curve.interval_low <= curve.interval_high:
            found = f"an interval from {curve.interval_low} to {curve.interval_high}"
            raise _bad(f"latency.{curve.quantity}", found, "factors above 0, in order")
    _unique("latency", [curve.quantity for curve in header.latency])

    placement = header.placement
    total = model.total_experts
    if placement.total_experts != total:
        raise _bad("placement.total_experts", placement.total_experts, f"{total}, MoE layers x experts")
    _between("placement.resident_experts", placement.resident_experts, 0, total)
    for name, rate in (("hit_rate", placement.hit_rate), ("random_hit_rate", placement.random_hit_rate)):
        if not 0.0 <= rate <= 1.0:
            raise _bad(f"placement.{name}", rate, "0 to 1")

    for name, ratio in placement.relative_time.items():
        _not_negative(f"placement.relative_time.{name}", ratio)
    _unique("features", [feature.name for feature in header.features])
    _unique("memory", [item.item for item in header.memory])
    for item in header.memory:
        _not_negative(f"memory {item.item!r}", item.bytes)
    if header.memory:
        used = sum(item.bytes for item in header.memory) + placement.resident_experts * model.expert_bytes
        if used > header.options.gpu_memory_bytes:
            raise _bad("memory", f"{used} bytes with the resident experts", f"<= {header.options.gpu_memory_bytes}")


def check_files(files: Sequence[FileEntry]) -> None:
    """Raises FiddlerError unless the list is sorted, without repeats, stays inside the plan, and is complete."""
    if len(files) > MAX_FILES:
        raise _bad("files", f"{len(files)} entries", f"at most {MAX_FILES}")
    for entry in files:
        check_path(entry.path)
        _not_negative(f"the size of {entry.path}", entry.bytes)
        if not _SHA256.fullmatch(entry.sha256):
            raise _bad(f"the sha256 of {entry.path}", repr(entry.sha256[:80]), "64 lower-case hexadecimal digits")
    paths = [entry.path for entry in files]
    _unique("files", paths)
    if paths != sorted(paths):
        raise _bad("files", "another order", "entries sorted by path")
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    for path in paths:
        if path in folders:
            raise _bad("files", f"{path!r} both as a file and as a folder", "one of the two")
    for needed in (TABLES, BUILD_FILE):
        if needed not in paths:
            raise _bad("files", f"no {needed}", f"{TABLES} and {BUILD_FILE} among them")


def check_path(path: str) -> None:
    """Raises FiddlerError unless `path` is a relative POSIX path that names a file inside the plan, in one way only."""
    parts = path.split("/")
    plain = all(part not in ("", ".", "..") and not part.startswith("~") for part in parts)
    printable = path.isprintable() and "\\" not in path and ":" not in path
    if not plain or not printable or len(path) > 200 or path == HEADER:
        raise _bad(
            "files", f"the path {path[:80]!r}", "a relative path inside the plan, without '..', '.', ':' or backslashes"
        )


def check_tables(tables: Tables, header: Header) -> None:
    """Raises FiddlerError naming the first table whose dtype, shape or values do not fit the format or the header."""
    model, resident_experts = header.model, header.placement.resident_experts
    grid = (tables.tokens.size,)
    placed = (len(model.moe_layers), model.num_experts)
    _array("tokens", tables.tokens, np.int32, grid)
    regimes = tables.regime_shares.size
    if regimes not in (1, 2):
        raise _bad("tables.regime_shares", f"{regimes} regimes", "1 or 2")
    _array("regime_shares", tables.regime_shares, np.float32, (regimes,))
    _array("cpu_us", tables.cpu_us, np.float32, (regimes, *grid))
    for name in ("gpu_us", "rest_us"):
        _array(name, getattr(tables, name), np.float32, grid)
    _array("rest_kv_us", tables.rest_kv_us, np.float32, (1,))
    _array("scalars_us", tables.scalars_us, np.float32, (3,))
    _array("contention", tables.contention, np.float32, (1,))
    _array("decode_streams", tables.decode_streams, np.int32, (model.top_k + 1,))
    _array("prefetch", tables.prefetch, np.int16, (*placed, 2))
    _array("resident", tables.resident, np.uint8, placed)
    _array("popularity", tables.popularity, np.float32, placed)

    if tables.tokens.size < 2 or tables.tokens[0] != 0 or (np.diff(tables.tokens.astype(np.int64)) <= 0).any():
        raise _bad("tables.tokens", _shown(tables.tokens), "two or more token counts, increasing from 0")
    if tables.tokens[-1] > MAX_TOKENS:
        raise _bad("tables.tokens", f"up to {tables.tokens[-1]}", f"at most {MAX_TOKENS} tokens")
    for name in (
        "cpu_us",
        "regime_shares",
        "gpu_us",
        "rest_us",
        "rest_kv_us",
        "scalars_us",
        "contention",
        "popularity",
    ):
        values = getattr(tables, name)
        if not np.isfinite(values).all() or (values < 0).any():
            raise _bad(f"tables.{name}", "a negative, infinite or undefined number", "finite numbers from 0")
    for name, values in (
        *(("cpu_us", regime) for regime in tables.cpu_us),
        ("gpu_us", tables.gpu_us),
        ("rest_us", tables.rest_us),
    ):
        if values[0] != 0 or (values[1:] < values[:-1]).any():
            raise _bad(f"tables.{name}", _shown(values), "0 for no tokens, and never less for more tokens")
    if (tables.cpu_us[-1] < tables.cpu_us[0]).any():
        raise _bad("tables.cpu_us", "a slow regime that is faster", "the fast regime first")
    if abs(float(tables.regime_shares.sum(dtype=np.float64)) - 1.0) > _ROW_SUM_TOLERANCE:
        raise _bad("tables.regime_shares", _shown(tables.regime_shares), "shares of sum 1")
    if (tables.prefetch < -1).any() or (tables.prefetch >= model.num_experts).any():
        raise _bad("tables.prefetch", _shown(tables.prefetch), f"-1, or an expert below {model.num_experts}")
    misses = np.arange(model.top_k + 1)
    if (tables.decode_streams < 0).any() or (tables.decode_streams > misses).any():
        raise _bad("tables.decode_streams", _shown(tables.decode_streams), "0 to m streamed experts for m misses")
    if (tables.resident > 1).any():
        raise _bad("tables.resident", f"the value {tables.resident.max()}", "0 or 1")
    if (count := int(tables.resident.sum())) != resident_experts:
        raise _bad("tables.resident", f"{count} experts", f"{resident_experts}, as placement.resident_experts says")
    sums = tables.popularity.sum(axis=1, dtype=np.float64)
    if (np.abs(sums - 1.0) > _ROW_SUM_TOLERANCE).any():
        raise _bad("tables.popularity", f"a row that sums to {sums[np.abs(sums - 1.0).argmax()]:.6f}", "rows of sum 1")


def _check_model(model: ModelSpec) -> None:
    _between("model.num_layers", model.num_layers, 1, MAX_LAYERS)
    _between("model.num_experts", model.num_experts, 1, MAX_EXPERTS)
    _between("model.top_k", model.top_k, 1, model.num_experts)
    for name in ("hidden_size", "intermediate_size"):
        _between(f"model.{name}", getattr(model, name), 1, MAX_SIZE)
    for name in ("vocab_size", "max_context"):
        _between(f"model.{name}", getattr(model, name), 1, 1 << 40)
    layers = model.moe_layers
    inside = bool(layers) and layers[0] >= 0 and layers[-1] < model.num_layers
    if not inside or any(a >= b for a, b in pairwise(layers)):
        raise _bad("model.moe_layers", str(layers)[:60], f"one or more layers, increasing, below {model.num_layers}")
    check_patterns(model.expert_tensors)
    if bool(model.expert_tensors.gate_bias) != model.expert_bias:
        raise _bad("model.expert_bias", model.expert_bias, "true exactly where the biases have names")
    for name in (
        "non_expert_bytes",
        "kv_bytes_per_token",
        "workspace_bytes_per_token",
        "window",
        "window_kv_bytes_per_token",
        "state_bytes",
        "expanded_bytes_per_token",
    ):
        _not_negative(f"model.{name}", getattr(model, name))


def check_patterns(names: ExpertTensors) -> None:
    """Raises FiddlerError unless each name has {layer}, may have {expert}, and nothing else in braces."""
    for part in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        pattern = getattr(names, part)
        rest = pattern.replace("{layer}", "").replace("{expert}", "")
        if ("{layer}" not in pattern or "{" in rest or "}" in rest) and (pattern or not part.endswith("_bias")):
            raise _bad(f"model.expert_tensors.{part}", repr(pattern[:80]), "a name with {layer} in it")
    biases = [bool(name) for name in (names.gate_bias, names.up_bias, names.down_bias)]
    if len(set(biases)) > 1:
        raise _bad("model.expert_tensors", "some biases without a name", "all three or none")
    if names.interleaved and names.gate != names.up:
        raise _bad("model.expert_tensors", "interleaved matrices of two names", "gate and up in one tensor")


def _check_kernels(kernels: KernelSpec, model: ModelSpec) -> None:
    if kernels.expert != model.expert:
        raise _bad("kernels", f"kernels for {_form(kernels.expert)}", f"{_form(model.expert)}, the model's")
    if not kernels.variants:
        raise _bad("kernels.variants", "none", "one or more of " + ", ".join(KNOWN_ISAS))
    _unique("kernels.variants", [variant.isa for variant in kernels.variants])
    for name in (kernels.name, *(variant.symbol for variant in kernels.variants)):
        if not _NAME.fullmatch(name):
            raise _bad("kernels", f"the name {name[:80]!r}", "letters, digits and underscores")
    for variant in kernels.variants:
        if variant.isa not in KNOWN_ISAS:
            raise _bad("kernels.variants", f"the instruction set {variant.isa!r}", "one of " + ", ".join(KNOWN_ISAS))
        _check_blocking(f"kernels.{variant.symbol}", variant.blocking)
    tuning = kernels.tuning
    if tuning is None:
        return
    chosen = [candidate.blocking for candidate in tuning.candidates if candidate.chosen]
    if chosen != [variant.blocking for variant in kernels.variants if variant.isa == tuning.isa]:
        raise _bad("kernels.tuning", f"{len(chosen)} chosen blockings", f"one, that of the {tuning.isa} variant")
    _between("kernels.tuning.threads", tuning.threads, 1, MAX_SIZE)
    _between("kernels.tuning.rounds", tuning.rounds, 1, MAX_SIZE)
    for candidate in tuning.candidates:
        _check_blocking("kernels.tuning", candidate.blocking)
        if len(candidate.speed) != len(tuning.tokens) or not 0 < candidate.low <= candidate.median <= candidate.high:
            raise _bad(
                "kernels.tuning", f"the figures of {candidate.change!r}"[:80], "a speed by token count, quartiles"
            )


def _check_blocking(where: str, blocking: Blocking) -> None:
    for name in ("tile_tokens", "tile_vectors", "k_block", "fetch_tokens", "fetch_bytes"):
        _between(f"{where}.{name}", getattr(blocking, name), 1, MAX_SIZE)
    steps = [0, *(tile.tokens for tile in blocking.narrow_tiles), blocking.tile_tokens]
    if any(a >= b for a, b in pairwise(steps)) or any(tile.vectors < 1 for tile in blocking.narrow_tiles):
        raise _bad(f"{where}.narrow_tiles", f"{len(steps) - 2} tiles", "ever more tokens, below tile_tokens")


def _check_machine(header: Header) -> None:
    machine = header.hardware.machine
    for name in ("cores", "l1d_bytes", "l2_bytes", "l3_bytes", "numa_nodes", "memory_bytes"):
        _not_negative(f"hardware.machine.{name}", getattr(machine, name))
    _not_negative("hardware.machine.accelerator.memory_bytes", machine.accelerator.memory_bytes)
    if machine.accelerator.kind == "none" and header.placement.resident_experts:
        raise _bad("placement.resident_experts", header.placement.resident_experts, "0, as there is no accelerator")


def _form(expert: ExpertForm) -> str:
    biases = " with biases" if expert.bias else ""
    return f"{expert.hidden_size} x {expert.intermediate_size} {expert.activation}{biases}"


def _array(name: str, value: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if value.dtype != np.dtype(dtype) or value.shape != shape:
        expected = f"{np.dtype(dtype).name} {list(shape)}"
        raise _bad(f"tables.{name}", f"{value.dtype.name} {list(value.shape)}", expected)


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _bad(name, value, f"{low} to {high}")


def _not_negative(name: str, *values: float) -> None:
    for value in values:
        if value < 0:
            raise _bad(name, value, "0 or more")


def _unique(name: str, values: Sequence[str]) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1}) if len(set(values)) < len(values) else []
    if repeated:
        raise _bad(name, f"{repeated[0]!r} twice", "each once")


def _shown(values: npt.NDArray[Any]) -> str:
    return np.array2string(values, threshold=6, edgeitems=3, separator=", ").replace("\n", "")


def _bad(where: str, found: object, expected: str) -> FiddlerError:
    return FiddlerError(f"the plan's {where} cannot be", found=found, expected=expected)
