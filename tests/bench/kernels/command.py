"""What the command does: for each shape prepare the contenders, then measure row by row."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import KernelLibrary
from fiddler_runtime.machine import Machine, this_machine
from fiddler_runtime.whole_file import write_whole
from fiddlerc.hardware import load_hardware

from . import check, plot, pool, table
from .both import Both
from .contender import Contender, Ours, Weights, build_library, open_library, random_weights
from .limits import Limits
from .measure import Peaks, Race, regions
from .shapes import Shape, draw_routings, load_shape, rotation, too_large
from .statistics import Work

_SEED = 1
_ROUTINGS = 8
_LONG_PROBE = 256 << 20
_SETTLE_SECONDS = 0.02  # until threads of the call before have stopped spinning


def run(args: argparse.Namespace) -> None:
    if args.plot:
        plot.require_matplotlib()
    for path in filter(None, (args.json, args.plot)):
        if not path.parent.is_dir():
            raise FiddlerError(f"cannot write {path}", found="no such folder", hint=f"mkdir -p {path.parent}")
    if args.read:
        rows = [row for path in args.read for row in _read(path)]
        print(f"{table.pivot(rows)}\n\n{table.best_peers(rows)}")
        if args.plot:
            plot.draw(rows, args.plot)
        return
    if args.pool:
        rows = [row for threads in args.threads for row in pool.measure(threads)]
        print(pool.text(rows))
        _write(args.json, {"machine": dataclasses.asdict(this_machine("none")), "pool": rows})
        return
    shapes = [load_shape(name) for name in args.shapes]
    if args.experts:
        for shape in shapes:
            if args.experts < shape.top_k:
                raise FiddlerError(
                    f"too few experts for a layer of {shape.name}",
                    found=args.experts,
                    expected=f"at least {shape.top_k}",
                )
        shapes = [dataclasses.replace(shape, num_experts=args.experts) for shape in shapes]
    if args.build:
        _build(shapes, args.build, args.hw)
        return
    machine = this_machine("none")
    peers = _peers(args, machine)
    record: dict[str, Any] = {
        "command": "python -m tests.bench.kernels " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": dataclasses.asdict(machine),
        "torch": torch.__version__,
        "complete": False,
        "rows": [],
    }
    deadline = time.monotonic() + args.time_budget
    left = len(shapes) * len(args.threads) * len(args.tokens)
    peaks = {threads: Peaks() for threads in args.threads}
    with torch.inference_mode():
        for shape in shapes:
            for row in _measure_shape(args, shape, machine, peers, peaks, deadline, left):
                left -= 1
                record["rows"].append(row)
                _write(args.json, record)
    record["complete"] = True
    _write(args.json, record)
    print(table.pivot(record["rows"]))
    if args.plot:
        plot.draw(record["rows"], args.plot)


def _measure_shape(
    args: argparse.Namespace,
    shape: Shape,
    machine: Machine,
    peers: Sequence[Contender],
    peaks: Mapping[int, Peaks],
    deadline: float,
    left: int,
) -> Iterator[dict[str, Any]]:
    """The rows of one shape, each as it is done."""
    ours = Ours(open_library(args.library, shape) if args.library else build_library(shape), args.isa)
    contenders: list[Contender] = [ours]
    if args.against:
        contenders.append(Ours(open_library(args.against, shape), args.isa, "against"))
    if args.both:
        contenders.append(Both(ours, shape, args.isa or machine.isa[0]))
    contenders += [peer for peer in peers if (peer.has_layer if args.layer else peer.has_expert)]
    generator = torch.Generator().manual_seed(_SEED)
    weights = _prepare(args, shape, machine, contenders, generator)
    tasks = (_Layer if args.layer else _Expert)(shape, weights, max(args.tokens), generator)
    probe_bytes, away = _probes(max(machine.l3_bytes, 1 << 25), weights.count, shape.expert_bytes)
    try:
        for threads in args.threads:
            for contender in contenders:
                contender.set_threads(threads)
            limits = Limits(ours.kernels)
            if not peaks[threads].best:
                peaks[threads].search(limits)
            loops = limits.choose_read_loop(regions(ours, weights.count, 0, probe_bytes))
            mode = f"layer of {shape.num_experts} experts, top-{shape.top_k}" if args.layer else "one expert per call"
            _say(
                f"{shape.name} {shape.hidden_size}x{shape.intermediate_size}, {mode}, {threads} threads, "
                f"{ours.kernels.isa}; {weights.count} experts in memory; read loop: {limits.read_loop} "
                f"({max(loops.values()):.1f} GB/s, plain {loops[limits.names[0]]:.1f})"
            )
            for tokens in args.tokens:
                task = tasks.at(tokens)
                errors = _check(contenders, task, tokens, threads)
                race = Race(
                    [c for c in contenders if c.name in errors],
                    weights.count,
                    task.call,
                    task.work,
                    task.first,
                    probe_bytes,
                    away,
                )
                seconds = max(0.0, deadline - time.monotonic()) / left
                race.run(limits, args.rounds, seconds, peaks[threads], functools.partial(_progress, tokens))
                row = table.row(race.samples, peaks[threads])
                row = {
                    "shape": dataclasses.asdict(shape),
                    "mode": "layer" if args.layer else "expert",
                    "threads": threads,
                    "isa": ours.kernels.isa,
                    "tokens": tokens,
                    "experts_in_memory": weights.count,
                    "read_loops_gbps": loops,
                    "errors": errors,
                    **row,
                }
                left -= 1
                _say("\r" + table.line(row))
                yield row
    finally:
        for contender in contenders:
            contender.close()
        del tasks, weights
        gc.collect()


def _probes(l3_bytes: int, experts: int, expert_bytes: int) -> tuple[int, int]:
    """How much a probe reads, and how many experts behind those with which the next call begins.

    From there on, more than the last-level cache holds; where that takes long and there are enough weights, a part that
    is half of the rotation away.
    """
    if 4 * l3_bytes <= _LONG_PROBE or experts * expert_bytes < 4 * l3_bytes:
        return 4 * l3_bytes, 0
    return _LONG_PROBE, experts // 2


def _prepare(
    args: argparse.Namespace,
    shape: Shape,
    machine: Machine,
    contenders: Sequence[Contender],
    generator: torch.Generator,
) -> Weights:
    budget = int(args.memory * 2**30)
    layouts = 1 + sum(contender.packs for contender in contenders)
    if args.layer:
        count = shape.num_experts
        if count * shape.expert_bytes * layouts > budget:
            raise too_large(count * shape.expert_bytes * layouts, budget)
        if count * shape.expert_bytes < 4 * machine.l3_bytes:
            _say(
                f"{shape.name}: all weights of this layer are less than four last-level caches: above 100% is possible"
            )
    else:
        count = rotation(shape.expert_bytes, max(machine.l3_bytes, 1 << 25), budget, layouts)
    _say(f"{shape.name}: making {count} experts", end="")
    weights = random_weights(shape, count, generator)
    for contender in contenders:
        _say(f"\r{shape.name}: packing for {contender.name:20}", end="")
        contender.prepare(weights, shape, args.layer)
    _say("\r" + " " * 60, end="\r")
    return weights


@dataclasses.dataclass(frozen=True)
class _Task:
    """One row's calls."""

    call: Any
    work: list[Work]
    first: list[int]
    errors: Any


class _Expert:
    """One expert per call, in turn."""

    def __init__(self, shape: Shape, weights: Weights, most_tokens: int, generator: torch.Generator) -> None:
        self.shape, self.weights = shape, weights
        self.x = torch.randn(most_tokens, shape.hidden_size, generator=generator).bfloat16()
        self.expected: dict[int, torch.Tensor] = {}

    def at(self, tokens: int) -> _Task:
        x = self.x[:tokens]
        expected = check.reference(self.weights, 0, x[[0, -1]])
        count = self.weights.count
        return _Task(
            call=lambda contender, i: contender.expert(i, x),
            work=[Work(self.shape.expert_bytes, self.shape.row_flops * tokens)] * count,
            first=list(range(count)),
            errors=lambda contender: [check.error(contender.expert(0, x)[[0, -1]], expected)],
        )


class _Layer:
    """Whole layers, each call with a routing of its own."""

    def __init__(self, shape: Shape, weights: Weights, most_tokens: int, generator: torch.Generator) -> None:
        self.shape, self.weights, self.generator = shape, weights, generator
        self.x = torch.randn(most_tokens, shape.hidden_size, generator=generator).bfloat16()

    def at(self, tokens: int) -> _Task:
        shape, x = self.shape, self.x[:tokens]
        ids = draw_routings(shape, tokens, _ROUTINGS, self.generator)
        gates = torch.rand(tokens, shape.top_k, generator=self.generator) + 0.1
        gates = gates / gates.sum(dim=1, keepdim=True)
        ends = [0, -1]
        expected = check.layer_reference(self.weights, x[ends], ids[0][ends], gates[ends])
        return _Task(
            call=lambda contender, i: contender.layer(x, ids[i], gates),
            work=[
                Work(shape.expert_bytes * len(chosen.unique()), shape.row_flops * tokens * shape.top_k)
                for chosen in ids
            ],
            first=[int(chosen.min()) for chosen in ids],
            errors=lambda contender: [check.error(contender.layer(x, ids[0], gates)[ends], expected)],
        )


def _check(contenders: Sequence[Contender], task: _Task, tokens: int, threads: int) -> dict[str, float]:
    """The error of each contender that can do this task on so many threads; the others are named with the reason."""
    errors = {}
    for contender in contenders:
        time.sleep(_SETTLE_SECONDS)
        wall, own = time.perf_counter(), time.process_time()
        try:
            found = task.errors(contender)
        except RuntimeError as error:  # what a peer's operator raises for what it does not support
            _say(f"{tokens} tokens without {contender.name}: {str(error).splitlines()[0]}")
            continue
        cpus = (time.process_time() - own) / (time.perf_counter() - wall)
        if cpus > threads + 0.5:  # as zentorch's layer does unless OMP_NUM_THREADS is that
            _say(f"{tokens} tokens without {contender.name}: it used {cpus:.1f} CPUs, for {threads} threads")
            continue
        errors[contender.name] = check.require(contender.name, tokens, found) if contender.computes else 0.0
    return errors


def _peers(args: argparse.Namespace, machine: Machine) -> list[Contender]:
    """Those asked for that can be had; the others are named with the reason."""
    from ..peers.registry import PEERS, load_peer

    asked = list(PEERS) if args.peers == ("all",) else [name for name in args.peers if name != "none"]
    if asked and args.isa is not None and args.isa != machine.isa[0]:
        _say(f"no peers: they use {machine.isa[0]} and have another roofline than {args.isa}")
        return []
    found = []
    for name in asked:
        try:
            found.append(load_peer(name))
        except (ImportError, OSError) as error:
            _say(f"without {name}: {str(error).splitlines()[0]}")
    return found


def _build(shapes: Sequence[Shape], folder: Path, hw: str | None) -> None:
    """Copies this checkout's libraries to a folder that --library and --against take."""
    machine = load_hardware(hw).machine if hw else None
    folder.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        library: KernelLibrary = build_library(shape, machine)
        to = folder / f"lib{library.spec.name}.so"
        to.unlink(missing_ok=True)  # a process may have mapped the old one
        shutil.copyfile(library.path, to)
        print(to)


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run's --json."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FiddlerError(f"cannot read {path}", found=repr(error), expected="what --json wrote") from None
    return rows


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise FiddlerError(f"cannot write {path}", found=error.strerror) from None


def _progress(tokens: int, done: int) -> None:
    _say(f"\r{tokens:6} tokens: round {done}", end="")


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
