"""The accelerator's memory, counted item by item."""

from __future__ import annotations

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.text import format_bytes

from ..ir import MemoryBudget, MemoryItem, ModelSpec, Options

PREFILL_TOKENS = 2048
"""Tokens whose activations live at once. Longer prompts are given in chunks (transformers: prefill_chunk_size)."""

SLACK = 0.03
"""Share of the whole that is left alone: the driver's context (0.3 to 0.5 GiB of a 16 to 24 GiB card) and what the
allocator loses to blocks of 2 MiB. An assumption, to be replaced by a measurement on the GPU concerned."""


def count_memory(spec: ModelSpec, options: Options, *, prefetching: bool = False) -> MemoryBudget:
    """What everything but resident experts takes of options.gpu_memory_bytes, and how many experts fit in the rest.

    prefetching: the runtime keeps one more slot, for what it fetches ahead. Residents lie unpacked, spec.expert_bytes
    each. Raises FiddlerError, naming the smallest --gpu-memory that works, if the other parts do not fit.
    """
    total = options.gpu_memory_bytes
    cached = options.context * options.batch
    alive = min(cached, PREFILL_TOKENS)
    cache = options.batch * spec.cache_bytes(options.context)
    fixed: tuple[MemoryItem, ...] = (
        MemoryItem("non-expert weights", spec.non_expert_bytes),
        MemoryItem(f"KV cache ({options.batch} x {options.context} tokens)", cache),
        MemoryItem(f"activations ({alive} tokens)", alive * spec.workspace_bytes_per_token),
        MemoryItem("staging of streamed experts", spec.staging_bytes()),
    )
    if spec.expanded_bytes_per_token:
        expanded = cached * spec.expanded_bytes_per_token
        fixed = (*fixed, MemoryItem(f"keys and values of a layer ({cached} tokens)", expanded))
    if prefetching:
        fixed = (*fixed, MemoryItem("staging of prefetched experts", spec.expert_bytes))
    used = sum(item.bytes for item in fixed)
    slack = int(total * SLACK)
    if used + slack > total:
        raise _too_small(spec, options, fixed)
    experts = spec.total_experts
    room = (total - used - slack) // spec.expert_bytes
    return MemoryBudget(total, (*fixed, MemoryItem("allocator slack", slack)), min(room, experts))


def _too_small(spec: ModelSpec, options: Options, fixed: tuple[MemoryItem, ...]) -> FiddlerError:
    least = int(sum(item.bytes for item in fixed) / (1 - SLACK)) + 1
    parts = ", ".join(f"{item.item} {format_bytes(item.bytes)}" for item in fixed)
    return FiddlerError(
        f"the GPU budget is below the non-expert part of {spec.name}",
        found=f"--gpu-memory {format_bytes(options.gpu_memory_bytes)}",
        expected=f"at least {format_bytes(least)} ({parts}, {SLACK:.0%} slack)",
        hint=f"--gpu-memory {_whole(least)}, or a smaller --context or --batch",
    )


def _whole(count: int) -> str:
    """The value of an option that is enough and at most a quarter more than that: 5.2 GiB -> '6GiB'."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 4 * size:
            return f"{-(-count // size)}{unit}"
    return f"{count}B"
