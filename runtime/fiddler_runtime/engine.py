"""The engine: one MoE layer = decision, three lanes at once, one sum."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import strategies as rules
from .ahead import Ahead
from .captured.layers import CapturedLayers
from .captured.native import NativeStep
from .counters import PHASES, Counters, Pair, Phase
from .dispatch import Dispatcher
from .drift import LANES, Drift, Setup
from .errors import FiddlerError, FiddlerWarning
from .kernels import require_variant
from .lanes.accelerator import AcceleratorLanes
from .lanes.device import Device, open_device
from .lanes.generated_kernels import kernels_on
from .lanes.routing import route
from .lanes.streamed import StreamedLane
from .loading import load_plan, open_library
from .machine import cpu_lane_threads, lane_cpus, usable_cores
from .makespan import CPU, RESIDENT, SPLIT, STREAMED
from .packed_cache import PackedCache
from .plan import ModelSpec, Plan
from .preflight import survey
from .progress import Progress
from .residents import Place, by_popularity, later, reserve, tell
from .store import place
from .strategies import DeviceChoice
from .weights import ExpertWeights

_EARLY_TOKENS = 64


class Engine:
    """Runs the routed experts of a model through a plan.

    plan        a plan from `load_plan`, or its path
    weights     where the expert weights come from; they are read once, here
    device      the accelerator: auto is the kind the plan was compiled for (a plan for a GPU without one: none)
    isa         the kernel variant; default the best that this CPU runs
    threads     of the CPU lane, the caller included; default all usable cores, less one for a simulated accelerator
    strategies  a subset of ("resident", "streamed", "cpu") to choose from; weights are placed accordingly. Default all,
                and with device none ("cpu",)
    dispatcher  the class that decides, for comparisons with other strategies' rules
    packed_cache  keep the packed experts in this folder, or beside the checkpoint if True, and map them from there:
                the next engine starts at once, and engines share memory (docs/runtime.md). Default: they are packed
                into memory of the engine's own
    whole_model  leave the accelerator memory that the plan counts for a KV cache and activations: where there is less,
                residents are given up for it, with a warning. Whether all fits the caller has checked (`survey`)
    progress    called with (label, done, total) while kernels are built and weights are loaded

    One thread at a time runs `moe`; others wait. An engine does not survive fork: make it in the child.
    Raises FiddlerError for a plan that cannot run here, weights of another model, and too little memory.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        weights: ExpertWeights,
        *,
        device: DeviceChoice = "auto",
        isa: str | None = None,
        threads: int | None = None,
        strategies: Sequence[str] | None = None,
        packed_cache: PackedCache | bool | str | Path | None = False,
        whole_model: bool = False,
        dispatcher: type[Dispatcher] = Dispatcher,
        progress: Progress | None = None,
    ) -> None:
        self.plan = plan if isinstance(plan, Plan) else load_plan(plan)
        self.spec = self.plan.header.model
        self._closed = False
        self._lock = threading.Lock()
        self._stepping: int | None = None  # the thread that is in captured()
        self._process = os.getpid()
        self._phase: Phase = "decode"
        self._counters = Counters()
        self._rows = {layer: row for row, layer in enumerate(self.spec.moe_layers)}

        setup = rules.decide(self.plan, device, strategies, gpu=torch.cuda.is_available())
        self.strategies = setup.strategies
        if isa is not None:
            require_variant(self.plan.header.kernels, isa)  # before anything takes long
        weights.check(self.spec)
        if not isinstance(packed_cache, PackedCache):
            packed_cache = PackedCache.open(packed_cache, self.spec, weights)
        needs = survey(self.plan.header, setup, packed_cache, whole_model=False)
        if not whole_model:  # else hf.load has, before all the rest was in memory
            needs.check()
        weights.drop_behind = needs.crowded
        self._library = open_library(self.plan, progress=progress)
        with ExitStack() as undo:
            self._device = undo.enter_context(open_device(setup.kind))
            # Before the weights take the memory: on a GPU that has not been seen before this measures.
            self._expert_kernels = kernels_on(self._device, self._library, isa)
            undo.callback(self._expert_kernels.close)
            count = _cpu_threads(threads, self._device)
            beside_torch = self._device.kind == "none"
            self._kernels = self._library.open(isa, count, cpus=lane_cpus(count), beside_torch=beside_torch)
            undo.callback(self._kernels.close)
            lane = None
            if setup.streaming:
                with _enough_memory("stream experts", self.spec, "--strategies resident,cpu"):
                    lane = StreamedLane(self._device, self._expert_kernels, prefetch="prefetch" in setup.features)
            rooms = reserve(
                self.spec,
                setup.resident,
                self.plan.tables.popularity,
                self._device,
                keep_bytes=sum(item.bytes for item in later(self.plan.header)) if whole_model else 0,
                all_needed=self.strategies == ("resident",),
            )
            self._store = place(
                self.spec, rooms, weights, self._kernels, self._device, cache=packed_cache, progress=progress
            )
            del rooms  # the kernels repack what is in them, one after another
            undo.callback(self._store.close)
            undo.callback(self._device.close)  # before that: its copies may still read what is given back
            with _enough_memory("lay out the resident experts", self.spec, "a plan for less --gpu-memory"):
                self._lanes = AcceleratorLanes(self._device, self._store, self._expert_kernels, lane)
            # The tables as they apply here: where the weights are decides, not where the plan would have put them.
            tables = dataclasses.replace(self.plan.tables, resident=self._store.places.astype(np.uint8))
            self._features = tuple(sorted(setup.features))
            rows = self.spec.intermediate_size if "split" in setup.features and "cpu" in self.strategies else 0
            # Where all were to be resident there is no streamed lane, also if some had to be given up.
            self._allowed = [strategy for strategy in self.strategies if strategy != "streamed" or lane is not None]
            self._dispatcher = dispatcher(self._library, tables, self.spec.num_experts, allow=self._allowed, rows=rows)
            self._tables = tables
            # What is worth fetching ahead was decided for the plan's own residents.
            self._ahead = Ahead(self.plan.tables.prefetch, self._store) if "prefetch" in setup.features else None
            self._captured: CapturedLayers | None = None
            self._drift = Drift(self.plan, Setup(self._device.kind, self._kernels.threads, self._kernels.isa))
            self._description = self._describe()
            self._undo = undo.pop_all()
        # Of an engine that nobody closes. Not at exit, when the driver may be gone.
        weakref.finalize(self, _let_go, self._undo, self._process).atexit = False

    @property
    def device(self) -> torch.device:
        """Where a model's other layers best live: the GPU, or the CPU."""
        return self._device.torch_device

    def moe(self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The routed experts of one layer: sum over a token's k choices of weight * expert(token).

        layer         the decoder layer's index (one of spec.moe_layers)
        hidden        [T, H], any floating dtype (computed in bf16, summed in fp32), any device; T may be 0
        topk_ids      integer [T, k]; ids outside [0, E) are skipped
        topk_weights  floating [T, k]
        Returns [T, H] in hidden's dtype, on its device. No gradient flows through it.
        Raises FiddlerError for an unknown layer or wrong shapes, and after `close` or fork.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.moe(layer, hidden, topk_ids, topk_weights)
        row = self._check(layer, hidden, topk_ids, topk_weights)
        captured = self._captured
        if captured is not None and captured.within():
            return captured.moe(row, hidden, topk_ids, topk_weights).to(hidden.dtype)
        if hidden.shape[0] == 0:
            return torch.empty_like(hidden)
        self._refuse_between_steps("moe()")
        with self._lock:
            if self._closed:
                raise FiddlerError("the engine is closed", found="a call of moe() after close()")
            out = self._run_within_memory(row, hidden, topk_ids, topk_weights)
        return out.to(device=hidden.device, dtype=hidden.dtype)

    def _check(self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> int:
        row = self._rows.get(layer)
        if row is None:
            raise FiddlerError(
                "no such MoE layer", found=layer, expected=f"one of {list(self.spec.moe_layers)} of {self.spec.name}"
            )
        if hidden.dim() != 2 or hidden.shape[1] != self.spec.hidden_size:
            raise FiddlerError(
                "wrong shape of hidden", found=list(hidden.shape), expected=f"[tokens, {self.spec.hidden_size}]"
            )
        expected = (hidden.shape[0], self.spec.top_k)
        for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            if tensor.shape != expected:
                raise FiddlerError(f"wrong shape of {name}", found=list(tensor.shape), expected=list(expected))
        if not hidden.is_floating_point() or not topk_weights.is_floating_point() or topk_ids.is_floating_point():
            raise FiddlerError(
                "wrong dtypes",
                found=f"hidden {hidden.dtype}, topk_ids {topk_ids.dtype}, topk_weights {topk_weights.dtype}",
                expected="floating hidden and topk_weights, integer topk_ids",
            )
        if os.getpid() != self._process:
            raise FiddlerError(
                "the engine was made in another process and does not survive fork",
                found=f"process {os.getpid()}",
                expected=f"process {self._process}",
                hint="make the Engine in the process that uses it",
            )
        return row

    def _run_within_memory(
        self, row: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """`_run`, giving up one resident after the other while the accelerator's memory does not suffice for it."""
        given_up = 0
        while True:
            try:
                out = self._run(row, hidden, topk_ids, topk_weights)
                break
            except torch.OutOfMemoryError as error:
                left = by_popularity(self._store.places, self.plan.tables.popularity)
                if not left or "cpu" not in self._allowed:
                    raise FiddlerError(
                        "the accelerator's memory does not suffice for a layer",
                        found=f"{hidden.shape[0]} tokens, {len(left)} resident experts: {str(error).splitlines()[0]}",
                        hint="a shorter prompt (transformers: prefill_chunk_size), or a plan for less --gpu-memory",
                    ) from error
            self._give_up(left[-1])
            given_up += 1
        if given_up:
            tell(self.spec, given_up, int(self._store.places.sum()), all_needed=False)
        return out

    def _give_up(self, place: Place) -> None:
        """From now on that expert runs where the others do that are not resident."""
        if self._captured is not None:  # its steps compute with the expert's memory
            self._captured.close()
            self._captured = None
        self._store.give_up(place, self._kernels, self._device)
        self._lanes.give_back(place[0])
        self._dispatcher.move_out(*place)
        self._tables.resident[place] = 0
        self._description = self._describe()

    def _run(self, row: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """One layer; returns fp32 [T, H] on whichever side computed last."""
        started = time.perf_counter_ns()
        device = self._device
        ids, _ = device.to_host("ids", topk_ids, torch.int64)
        weights, routed = device.to_host("weights", topk_weights, torch.float32)
        # Few tokens travel with their routing. Of many the copy would hold up the accelerator's own work.
        early = hidden.shape[0] <= _EARLY_TOKENS
        there = device.to_host("hidden", hidden, torch.bfloat16) if early else None
        device.arrived(routed)
        decided = self._dispatcher
        lent = None if self._ahead is None else self._ahead.fetched_for(row)
        if lent is not None:
            decided.lend(row, lent)
        strategy = decided.decide(row, ids)
        decided.take_back()
        calls = np.bincount(strategy, minlength=SPLIT + 1).tolist()
        ahead = None if self._ahead is None else self._ahead.guess(row, decided.counts)

        # No hand-off to the accelerator's thread without work for it, no kernel call without work for the CPU.
        future = None
        handed = time.perf_counter_ns()
        if calls[RESIDENT] or calls[STREAMED] or calls[SPLIT]:
            split = (int(decided.split[0]), int(decided.split[1])) if calls[SPLIT] else None
            routing = route(ids, weights, decided.counts, strategy, device.send, split=split, lent=lent)
            given = hidden.to(device=device.torch_device, dtype=torch.bfloat16).contiguous()
            future = self._lanes.submit(row, given, routing, ahead)
        elif ahead is not None:
            self._lanes.prefetch(*ahead)
        cpu_us = accelerator_us = 0.0
        out: torch.Tensor | None = None
        try:
            if calls[CPU] or calls[SPLIT] or future is None:
                here, copied = there or device.to_host("hidden", hidden, torch.bfloat16)
                out = device.host_room("out", tuple(here.shape), torch.float32)
                device.arrived(copied)
                before = time.perf_counter_ns()
                rows = int(decided.split[1])
                self._kernels.moe(here, ids, weights, self._store.pointers[row], out, strategy, rows)
                cpu_us = (time.perf_counter_ns() - before) / 1e3
        finally:
            # Also after an error: the queue must be done with this call's tensors.
            if future is not None:
                came = time.perf_counter_ns()
                theirs, done = self._lanes.join(future)
                # A caller that had to wait is woken up again: that is the lane's time too, as in its calibration.
                accelerator_us = ((time.perf_counter_ns() if done > came else done) - handed) / 1e3
        if out is not None:
            out = device.to_device("out", out)
        if future is not None:
            out = theirs if out is None else theirs.add_(out)
        assert out is not None
        layer_us = (time.perf_counter_ns() - started) / 1e3
        actual = (cpu_us, accelerator_us)
        predicted = decided.lane_us.tolist()
        self._counters.add(self._phase, calls, strategy, decided.counts, predicted, actual, layer_us)
        self._watch(predicted, actual)
        if lent is not None:
            self._counters.prefetch_used += int(strategy[lent] == RESIDENT)
        self._counters.prefetched += ahead is not None
        return out

    @contextmanager
    def captured(self) -> Iterator[CapturedLayers]:
        """Steps whose layers run without Python between them; while the context is open, `moe` waits in other threads.

        Raises FiddlerError where there is no such thing: without an accelerator, or where experts may neither be
        resident nor run on the CPU. After residents were given up it is another one, to which older steps mean nothing.
        """
        self._refuse_between_steps("captured()")
        with self._lock:
            if self._closed:
                raise FiddlerError("the engine is closed", found="a captured step after close()")
            if self._captured is None:
                allow = self._captured_strategies()
                if not allow:
                    raise FiddlerError(
                        "experts that are not resident have no lane in captured steps, which stream none",
                        found="strategies " + ",".join(self.strategies),
                        expected="cpu among them",
                        hint="--strategies resident,cpu",
                    )
                decided = Dispatcher(self._library, self._tables, self.spec.num_experts, allow=allow)
                self._captured = CapturedLayers(
                    self.spec.hidden_size,
                    self.spec.top_k,
                    self._device,
                    self._store,
                    self._kernels,
                    decided,
                    self._lanes,
                    done=self._count_captured,
                )
                self._description = self._describe()
            self._stepping = threading.get_ident()
            try:
                yield self._captured
            finally:
                self._stepping = None

    def _refuse_between_steps(self, call: str) -> None:
        """A thread that is in `captured` would wait for itself."""
        if self._stepping == threading.get_ident():
            raise FiddlerError(
                f"{call} was called between captured steps",
                found="with engine.captured() around it, in the same thread",
                hint="leave that first",
            )

    def _captured_strategies(self) -> list[str]:
        """Those of captured steps, in which nobody starts copies once the routing is known. None where experts would be
        left without one."""
        allow: list[str] = [strategy for strategy in self.strategies if strategy != "streamed"]
        return allow if "cpu" in allow or self._tables.resident.all() else []

    def _count_captured(self, step: NativeStep) -> None:
        """Notes a step's layers. How long the accelerator took for each nobody knows: it counts as idle."""
        for row in range(len(step.strategy)):
            cpu_us = float(step.cpu_ns[row]) / 1e3
            calls = np.bincount(step.strategy[row], minlength=SPLIT + 1).tolist()
            predicted = (float(step.lane_us[row, 0]), 0.0)
            actual = (cpu_us if calls[CPU] else 0.0, 0.0)
            self._counters.add(self._phase, calls, step.strategy[row], step.counts[row], predicted, actual, cpu_us)
            self._watch(predicted, actual)

    def _watch(self, predicted_us: Pair, actual_us: Pair) -> None:
        """Warns, once, when a lane is not as fast or slow as the plan says."""
        now_s = time.monotonic()
        for lane, predicted, actual in zip(LANES, predicted_us, actual_us, strict=True):
            # On a GPU the queue's thread is done before the GPU is: its time is not the lane's.
            if predicted > 0 and not (lane == "accelerator" and self._device.kind == "cuda"):
                self._drift.note(lane, now_s, predicted, actual)
        message = self._drift.message()
        if message is not None:
            warnings.warn(message, FiddlerWarning, stacklevel=4)

    def set_phase(self, phase: Phase) -> None:
        """Under which phase the coming layers are counted. `hf.load` sets it by itself; the default is decode."""
        if phase not in PHASES:
            raise FiddlerError("unknown phase", found=repr(phase), expected=" or ".join(PHASES))
        self._phase = phase

    def counters(self) -> dict[str, Any]:
        """What was done since the last reset: see `Counters.snapshot`."""
        return self._counters.snapshot()

    def reset_counters(self) -> None:
        """Sets every counter to zero."""
        self._counters.reset()

    def describe(self) -> dict[str, Any]:
        """What runs where: plain values, for people and logs. Also after `close`.

        captured_strategies: of captured steps, in which nothing is streamed; empty where there can be none.
        captured_entry: how these enter the CPU lane; None before the first.
        """
        return dict(self._description)

    def _describe(self) -> dict[str, Any]:
        resident = int(self._store.places.sum())
        symbols = {variant.isa: variant.symbol for variant in self.plan.header.kernels.variants}
        return {
            "plan": self.plan.path.name,
            "model": self.spec.name,
            "device": self._device.kind,
            "torch_device": str(self._device.torch_device),
            "strategies": list(self.strategies),
            "features": list(self._features),
            "captured_strategies": [] if self._device.kind == "none" else self._captured_strategies(),
            "captured_entry": None if self._captured is None else self._captured.entry.name,
            "isa": self._kernels.isa,
            "other_isas": self._library.others(self._kernels.isa),
            "kernel": symbols[self._kernels.isa],
            "threads": self._kernels.threads,
            "whose_threads": self._kernels.whose_threads,
            "memory_nodes": list(self._kernels.nodes),
            "library": str(self._library.path),
            "accelerator_kernels": str(self._expert_kernels),
            "resident_experts": resident,
            "total_experts": self._store.places.size,
            "resident_bytes": resident * self.spec.expert_bytes,
            "arena_bytes": (self._store.places.size - resident) * self._library.packed_bytes,
        }

    def close(self) -> None:
        """Waits for the call in progress, ends the threads and lets the weights go. Calling it again does nothing."""
        if os.getpid() != self._process:
            return  # all of it is that process's, whose other threads may hold the lock
        self._refuse_between_steps("close()")
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._undo:  # whatever fails before
                self._device.close()  # first: what follows gives memory back that its copies may still read
                if self._captured is not None:
                    self._captured.close()
            self._captured = self._ahead = None  # which hold the weights too
            del self._lanes, self._dispatcher, self._store

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _let_go(undo: ExitStack, process: int) -> None:
    if os.getpid() == process:
        undo.close()


@contextmanager
def _enough_memory(purpose: str, spec: ModelSpec, hint: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FiddlerError(
            f"not enough accelerator memory to {purpose} of {spec.name}", found=str(error).splitlines()[0], hint=hint
        ) from error


def _cpu_threads(asked: int | None, device: Device) -> int:
    """Threads of the CPU lane. A simulated accelerator is one core, which the CPU lane then leaves alone."""
    cores = usable_cores()
    if asked is None:
        return cpu_lane_threads(cores, device.kind)
    if asked > cores:
        warnings.warn(f"{asked} threads on {cores} usable cores take turns", FiddlerWarning, stacklevel=4)
    if asked < 1:
        raise FiddlerError("wrong number of threads", found=asked, expected=f"1 to {cores}, the usable cores")
    return asked
