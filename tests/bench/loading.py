"""How a large model starts: from shards, into a packed cache, from that cache; and what it takes of memory.

    python -m tests.bench.loading --layers 4 --dir /tmp/loading

Writes a model of Mixtral-8x7B's shapes with that many layers as real shards (tests.bench.random_model) and removes it
at the end; on disk it takes its size twice, in memory its packed experts once. Every row is a process of its own;
"cold" means that the page cache has nothing of the files that are read. The first table is the packing alone:
`fdl_pack` beside memcpy of the same bytes in as many threads, in pieces of 1 MiB and in one piece each, interleaved,
into memory that was never touched, which the system zeroes first, and into memory that was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fiddler_runtime
from fiddler_runtime import arena, hf
from fiddler_runtime.loading import open_library
from fiddler_runtime.machine import this_machine
from fiddler_runtime.text import format_bytes
from fiddlerc import pipeline

from . import random_model

ROUNDS = 7
LEAVE_FREE = 20 << 30
PROMPT = 16


def packing_table(plan: Path) -> None:
    """GB/s read and written: packing one expert, and copying as many bytes."""
    loaded = fiddler_runtime.load_plan(plan)
    spec = loaded.header.model
    with open_library(loaded).open() as kernels:
        size = kernels.library.packed_bytes
        sources = [arena.allocate(size).fill_(index + 1) for index in range(2)]
        touched = [arena.allocate(size).fill_(0) for _ in range(3)]
        wide = spec.intermediate_size * spec.hidden_size
        shape = (spec.intermediate_size, spec.hidden_size)
        pool = ThreadPoolExecutor(kernels.threads)

        def pack(source: torch.Tensor, target: torch.Tensor) -> None:
            gate, up, down = (source[n * wide : (n + 1) * wide] for n in range(3))
            kernels.pack(gate.view(shape), up.view(shape), down.view(shape[::-1]), target)

        def copy(piece: int, source: torch.Tensor, target: torch.Tensor) -> None:
            to, start = target.data_ptr(), source.data_ptr()

            def copy_at(at: int) -> None:
                ctypes.memmove(to + at, start + at, min(piece, size - at))

            list(pool.map(copy_at, range(0, size, piece)))

        times: dict[tuple[str, str], list[float]] = {}
        for round_ in range(ROUNDS):
            for name, work in (
                ("pack", pack),
                ("1 MiB", partial(copy, 1 << 20)),
                ("whole", partial(copy, -(-size // kernels.threads))),
            ):
                for where in ("never touched", "touched before"):
                    fresh = where == "never touched"
                    target = arena.allocate(size) if fresh else touched[round_ % len(touched)]
                    times.setdefault((name, where), []).append(_seconds(work, sources[round_ % 2], target))
        pool.shutdown()
        print(f"packing one expert of {spec.hidden_size} x {spec.intermediate_size}, {format_bytes(size)},")
        print(f"{kernels.threads} threads; GB/s read + written, median of {ROUNDS}, interleaved")
        print(f"{'destination':16} {'pack':>6}  {'memcpy 1 MiB':>14}  {'memcpy whole':>14}   (times that)")
        for where in ("never touched", "touched before"):
            mine = times["pack", where]
            line = f"{where:16} {_rate(size, mine):6.1f}"
            for name in ("1 MiB", "whole"):
                other = times[name, where]
                ratio = statistics.median(c / p for p, c in zip(mine, other, strict=True))
                line += f"  {_rate(size, other):6.1f}  ({ratio:.2f})"
            print(line)


def _rate(size: int, seconds: list[float]) -> float:
    return 2 * size / statistics.median(seconds) / 1e9


def _seconds(work: Callable[..., None], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def start(plan: Path, model_dir: Path, cache: str) -> dict[str, float]:
    """Loads the model as a user would and writes two tokens: seconds, bytes of peak memory."""
    loaded = fiddler_runtime.load_plan(plan)
    open_library(loaded).open(threads=1).close()
    from transformers import MixtralForCausalLM  # noqa: F401  what it takes itself is not the model's

    before = _status("VmRSS")
    marks: list[float] = []

    def note(label: str, done: int, total: int) -> None:
        marks.append(time.perf_counter())

    started = time.perf_counter()
    model = hf.load(model_dir, loaded, device="none", packed_cache=cache or False, progress=note)
    ready = time.perf_counter()
    peak = _status("VmHWM") - before
    described = model.fiddler.describe()
    spec = loaded.header.model
    ids = torch.arange(PROMPT)[None]
    steps = []
    for new in (1, 1, 9):
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        steps.append(time.perf_counter() - begun)
    return {
        "ready_s": ready - started,
        "experts_s": marks[-1] - marks[0] if marks else 0.0,
        "experts_bytes": described["arena_bytes"],
        "peak_bytes": peak,
        "promised_bytes": described["arena_bytes"] + spec.non_expert_bytes + spec.expert_bytes,
        "anonymous_bytes": _status("RssAnon"),
        "first_s": steps[0],
        "second_s": steps[1],
        "decode_per_s": 8 / (steps[2] - steps[1]),
    }


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget(files: Iterable[Path]) -> None:
    """Drops the files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _child(*arguments: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.loading", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(random_model.SHAPES), default="mixtral")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "fiddlerc-loading"))
    parser.add_argument("--keep", action="store_true", help="leave the model, for another run")
    parser.add_argument("--start", nargs=3, metavar=("PLAN", "MODEL", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        plan, model, cache = arguments.start
        print(json.dumps(start(Path(plan), Path(model), cache)))
        return
    folder: Path = arguments.dir
    model_dir, plan, cache = folder / "model", folder / "plan", folder / "cache"
    try:
        if not model_dir.exists():
            folder.mkdir(parents=True, exist_ok=True)
            hidden, intermediate, experts = random_model.SHAPES[arguments.shape][:3]
            needed = 2 * arguments.layers * experts * 6 * hidden * intermediate
            free = shutil.disk_usage(folder).free
            if free - needed < LEAVE_FREE:
                sys.exit(
                    f"not enough disk: {format_bytes(needed)} needed, {format_bytes(free)} free, {LEAVE_FREE} stay free"
                )
            random_model.write(arguments.shape, arguments.layers, model_dir)
        shutil.rmtree(plan, ignore_errors=True)
        pipeline.compile_plan(pipeline.CompileRequest(str(model_dir), "epyc-zen5-2c", plan))
        report(plan, model_dir, cache)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def report(plan: Path, model_dir: Path, cache: Path) -> None:
    """Both tables."""
    machine = this_machine()
    print(f"{machine.cpu}, {machine.cores} cores, {format_bytes(machine.memory_bytes)}")
    packing_table(plan)
    shards = sorted(model_dir.glob("*.safetensors"))
    rows = []
    for name, where, cold in (
        ("from shards, cold", "", shards),
        ("shards into the cache, cold", str(cache), shards),
        ("from the cache, warm", str(cache), []),
        ("from the cache, cold", str(cache), [*shards, cache]),
        ("from the cache, warm again", str(cache), []),
    ):
        forget(file for path in cold for file in (sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]))
        rows.append((name, _child("--start", str(plan), str(model_dir), where)))
    spec = fiddler_runtime.load_plan(plan).header.model
    total = rows[0][1]["experts_bytes"]
    print(
        f"\n{spec.name}: {len(spec.moe_layers)} layers, {format_bytes(total)} of experts, "
        f"{format_bytes(spec.non_expert_bytes)} of all else"
    )
    print(f"{'start':28} {'ready s':>8} {'experts':>10} {'peak':>9} {'of it own':>9} {'promised':>9}"
          f" {'first s':>8} {'second s':>8} {'tokens/s':>8}")  # fmt: skip
    for name, row in rows:
        rate = f"{row['experts_bytes'] / row['experts_s'] / 1e9:.2f} GB/s" if row["experts_s"] > 0.1 else "mapped"
        own = min(row["anonymous_bytes"], row["peak_bytes"])
        print(
            f"{name:28} {row['ready_s']:8.1f} {rate:>10} {_gb(row['peak_bytes'])} {_gb(own)} "
            f"{_gb(row['promised_bytes'])} {row['first_s']:8.2f} {row['second_s']:8.2f} {row['decode_per_s']:8.2f}"
        )
    print(f"promised: packed experts + all else + one expert; the limit is 10 % more. first, second: {PROMPT} prompt")
    print("tokens to the first new one, when nothing but loading was done before, and once more. tokens/s: the next 8")


def _gb(count: float) -> str:
    return f"{count / 1e9:6.2f} GB"


if __name__ == "__main__":
    main()
