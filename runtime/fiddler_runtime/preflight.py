"""What running a plan takes of host memory, accelerator memory and disk, item by item, before any work is begun."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .errors import FiddlerError, FiddlerWarning
from .machine import available_bytes, require_cuda
from .packed_cache import PackedCache
from .plan import Header, ModelSpec
from .reading import BUFFERS
from .residents import later
from .strategies import Setup
from .text import format_bytes

Where = Literal["host memory", "accelerator memory", "disk"]


@dataclass(frozen=True)
class Need:
    """So many bytes of something, for something."""

    where: Where
    item: str
    bytes: int


@dataclass(frozen=True)
class Preflight:
    """What is needed, and what is there.

    available      what is free, of what is known
    mapped_bytes   packed experts that lie on disk and take memory as far as there is some
    source_bytes   experts that are read from the checkpoint
    resident_bytes  of the accelerator's memory: resident experts, as far as they may run elsewhere
    """

    model: str
    needs: tuple[Need, ...]
    available: dict[Where, int]
    mapped_bytes: int
    source_bytes: int
    resident_bytes: int = 0

    def needed(self, where: Where) -> int:
        """Bytes of all items there."""
        return sum(need.bytes for need in self.needs if need.where == where)

    @property
    def crowded(self) -> bool:
        """Whether the checkpoint's own pages had better not stay in memory beside the packed experts."""
        free = self.available.get("host memory", 0) - self.needed("host memory")
        return free < self.mapped_bytes + self.source_bytes

    def lines(self) -> list[str]:
        """For people: a line per place, then one per item of it."""
        out = []
        for where in get_args(Where):
            items = [need for need in self.needs if need.where == where and need.bytes]
            free = f" of {format_bytes(self.available[where])} free" if where in self.available else ""
            if items:
                out.append(f"{format_bytes(self.needed(where)):>10} {where}{free}")
                out += [f"{format_bytes(need.bytes):>14} {need.item}" for need in items]
        if self.mapped_bytes:
            out.append(
                f"{format_bytes(self.mapped_bytes):>10} packed experts mapped from disk, in memory as far as it goes"
            )
        return out

    def check(self) -> None:
        """Raises FiddlerError where more is needed than there is.

        Warns (FiddlerWarning) where mapped experts do not all fit: they run, at the disk's speed.
        """
        for where in get_args(Where):
            # Residents are given up where there is no room for them (residents.py).
            needed = self.needed(where) - (self.resident_bytes if where == "accelerator memory" else 0)
            if where in self.available and needed > self.available[where]:
                items = ", ".join(
                    f"{need.item} {format_bytes(need.bytes)}"
                    for need in self.needs
                    if need.where == where and need.bytes
                )
                raise FiddlerError(
                    f"not enough {where} for {self.model}",
                    found=f"{format_bytes(self.available[where])} free",
                    expected=f"{format_bytes(self.needed(where))} ({items})",
                    hint=self._hint(where),
                )
        if "host memory" in self.available:
            free = self.available["host memory"] - self.needed("host memory")
            if self.mapped_bytes > free:
                warnings.warn(
                    f"{format_bytes(self.mapped_bytes)} of packed experts of {self.model}, but only "
                    f"{format_bytes(max(0, free))} of memory are free: the rest is read from the disk, again and again",
                    FiddlerWarning,
                    stacklevel=3,
                )

    def _hint(self, where: Where) -> str:
        if where == "disk":
            return "--packed-cache OTHER_FOLDER, on a disk with more room"
        if where == "accelerator memory":
            return "compile a plan for less: fiddlerc compile MODEL --hw HW --gpu-memory SIZE -o PLAN"
        if self.mapped_bytes:
            return "close other programs, or run on a machine with more memory"
        return (
            "--packed-cache (in Python: packed_cache=True) keeps the packed experts on disk and maps them; or "
            "compile a plan with more of them on the GPU: fiddlerc compile MODEL --hw HW --gpu-memory SIZE -o PLAN"
        )


def survey(header: Header, setup: Setup, cache: PackedCache | None, *, whole_model: bool) -> Preflight:
    """Counts what an engine with that setup needs; whole_model: and the rest of the model, by transformers, with it."""
    spec = header.model
    packed = spec.expert.packed_bytes
    total, residents = setup.resident.size, int(setup.resident.sum())
    on_device = [Need("accelerator memory", f"{residents} resident experts", residents * spec.expert_bytes)]
    if setup.streaming:
        staging = spec.staging_bytes("prefetch" in setup.features)
        on_device.append(Need("accelerator memory", "staging of streamed experts", staging))
    rest: list[Need] = []
    if whole_model:
        rest = [
            Need("accelerator memory", "all but the routed experts", spec.non_expert_bytes),
            *(Need("accelerator memory", item.item, item.bytes) for item in later(header)),
        ]
    needs = [*on_device, *rest]
    if setup.kind != "cuda":  # the accelerator, if any, is the host
        needs = [Need("host memory", need.item, need.bytes) for need in needs]
    elif whole_model:  # it is read to the host and then moved
        needs.append(Need("host memory", rest[0].item, rest[0].bytes))
    on_host = (total - residents) * packed
    if cache is None:
        needs.append(Need("host memory", f"{total - residents} packed experts", on_host))
        needs.append(Need("host memory", f"{BUFFERS} experts while they are read", BUFFERS * spec.expert_bytes))
    else:
        needs += _packing(spec, cache)
    available = _available(cache)
    if setup.kind == "cuda":
        require_cuda()
        available["accelerator memory"] = int(torch.cuda.mem_get_info()[0])
        if cache is None and setup.strategies != ("resident",):
            short = sum(need.bytes for need in (*on_device, *rest)) - available["accelerator memory"]
            given_up = min(residents, max(0, -(-short // spec.expert_bytes)))
            needs.append(
                Need("host memory", f"{given_up} experts that the accelerator has no room for", given_up * packed)
            )
    source = total * spec.expert_bytes if cache is None else cache.missing_bytes()
    optional = 0 if setup.strategies == ("resident",) else residents * spec.expert_bytes
    return Preflight(spec.name, tuple(needs), available, 0 if cache is None else on_host, source, optional)


def survey_packing(spec: ModelSpec, cache: PackedCache) -> Preflight:
    """Counts what making a packed cache needs, without running anything."""
    missing = cache.missing_bytes()
    return Preflight(
        spec.name, tuple(_packing(spec, cache)), _available(cache), mapped_bytes=0, source_bytes=2 * missing
    )


def _packing(spec: ModelSpec, cache: PackedCache) -> list[Need]:
    missing = cache.missing_bytes()
    packed = spec.expert.packed_bytes
    on_their_way = BUFFERS * spec.expert_bytes + packed if missing else spec.expert_bytes
    return [
        Need("disk", f"packed experts in {cache.path}", missing),
        Need("host memory", "experts on their way", on_their_way),
    ]


def _available(cache: PackedCache | None) -> dict[Where, int]:
    free = available_bytes()
    available: dict[Where, int] = {"host memory": free} if free > 0 else {}
    if cache is not None:
        available["disk"] = cache.free_bytes()
    return available
