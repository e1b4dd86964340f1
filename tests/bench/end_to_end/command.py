"""What the command does, top to bottom."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fiddler_runtime
from fiddler_runtime import hf
from fiddler_runtime.captured.forward import CapturedForward
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.machine import AcceleratorKind, cpu_lane_threads, this_machine, usable_cores
from fiddler_runtime.plan import Options, Plan
from fiddler_runtime.text import format_bytes
from fiddlerc import pipeline
from fiddlerc.execution.compare import OUR_TEXT
from fiddlerc.execution.loading import read_text
from fiddlerc.execution.rest import measure_rest_of, on_both_sides
from fiddlerc.hardware import load_hardware, write_hardware
from fiddlerc.ir import Trace

from . import measure, memory, plot, prediction, table
from .configurations import Configuration, select
from .models import Model, open_model
from .record import Record
from .replay import Replay, read_routing
from .strategies import CONTENDERS, NAMES, Contender, Machine, usable

CONTEXT = 4096
_SPEAK_S = 2.0
_KEPT = 16  # tokens between two savings of a round


def run(args: argparse.Namespace) -> None:
    """Everything that the arguments ask for. Raises FiddlerError for what they cannot have."""
    results = args.output / "results.json"
    if args.show:
        print(_written(Record.read(results), args.output), end="")
        return
    names, wanted = select(args.only, NAMES)
    kind: AcceleratorKind = args.device
    if args.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "simulated"
    contenders, left_out = usable(names, kind)
    if not contenders:
        raise FiddlerError("nothing is left to measure", found=f"{', '.join(left_out)} on --device none")
    model = open_model(args.model, args.output, random=args.random_weights, layers=args.layers)
    longest = max(c.prompt + c.new for c in wanted)
    if longest > model.spec.max_context:
        raise FiddlerError(
            f"a configuration is longer than the context of {model.spec.name}",
            found=f"{longest} tokens",
            expected=f"at most {model.spec.max_context}",
            hint="--only with shorter configurations",
        )
    context = min(model.spec.max_context, max(CONTEXT, longest))
    options, residents = memory.budget(model, Options("balanced", context, 1, args.gpu_memory), kind)
    memory.check(model, residents, options, contenders, kind)
    trace = None if args.routing is None else read_routing(args.routing, model.full)
    _cap(kind, options.gpu_memory_bytes)

    machine = Machine(kind, cpu_lane_threads(usable_cores(), kind))
    hardware = args.hw or str(_calibrated(args, model, kind))
    plan = _compiled(args.output, model, hardware, options, args.routing)
    if args.hw is None and _measured_rest(model, plan, machine, Path(hardware)):
        plan = _compiled(args.output, model, hardware, options, args.routing)
    record = Record.open(results, _setup(args, machine, plan))
    record.about["asked"] = [
        dataclasses.asdict(c)
        for c in dict.fromkeys([*(Configuration(**a) for a in record.about.get("asked", [])), *wanted])
    ]
    record.about["lines"] = _about(args, model, plan, machine, residents)
    for name, by_label in prediction.predict(plan, trace, contenders, wanted).items():
        record.predicted.setdefault(name, {}).update(by_label)
    record.write()
    for line in record.about["lines"]:
        _say(line)
    if left_out:
        _say(f"without {', '.join(left_out)}: they need an accelerator")
    try:
        _measure(args, model, plan, machine, record, contenders, wanted, trace)
    finally:
        record.write()
        text = _written(record, args.output)
    print(text, end="")


def _measure(
    args: argparse.Namespace,
    model: Model,
    plan: Plan,
    machine: Machine,
    record: Record,
    contenders: Sequence[Contender],
    wanted: Sequence[Configuration],
    trace: Trace | None,
) -> None:
    """Every strategy's missing rounds, one strategy after another: only one's weights are held at a time."""
    todo = {contender.name: _missing(record, contender.name, wanted, args.rounds) for contender in contenders}
    total = sum(record.predicted[name][c.label] for name, missing in todo.items() for c in missing)
    if not any(todo.values()):
        _say("everything asked for is measured already")
        return
    _say(f"predicted to take {total / 60:.1f} minutes, and the loading")
    whole = None
    for contender in contenders:
        missing = todo[contender.name]
        if not missing:
            continue
        if whole is None:
            whole = _whole(model, machine)
            ids = _prompt(model, max(c.prompt for c in wanted))
        experts = contender.open(model, plan, machine, _Progress(contender.name))
        try:
            found = measure.logits(whole, experts, ids, model.spec)
            others = {name: values for name, values in record.checks.items() if name != contender.name}
            measure.compare(contender.name, found, others, model.spec)
            record.checks[contender.name] = found
            replay = None
            if trace is not None and trace.experts is not None:
                replay = Replay(trace.experts, model.spec, whole.device)
            with measure.attached(whole, experts, replay, capture=contender.capture):
                _begin(replay, measure.WARM_UP)
                measure.generate(whole, ids, measure.WARM_UP, lambda *_: None)
                if contender.capture and not _captures(whole.captured):
                    _say(f"without {contender.name}: not a step was replayed, as the warnings say")
                    continue
                for configuration in missing:
                    if configuration.scenario == "prefill":  # one step alone: not the first of its size
                        _begin(replay, configuration)
                        measure.generate(whole, ids, configuration, lambda *_: None)
                    _one(whole, experts, ids, configuration, contender.name, record, replay)
        finally:
            experts.close()
            del experts
            gc.collect()
            if machine.kind == "cuda":
                torch.cuda.empty_cache()


def _captures(captured: CapturedForward | None) -> bool:
    return captured is not None and captured.steps["replayed"] > 0


def _begin(replay: Replay | None, configuration: Configuration) -> None:
    if replay is not None:
        replay.begin(configuration.prompt, configuration.beams)


def _missing(record: Record, name: str, wanted: Sequence[Configuration], rounds: int) -> list[Configuration]:
    """What is to be run, the quickest first: of each generation the longest answer, as often as rounds are missing."""
    longest: dict[str, Configuration] = {}
    lacking: dict[str, int] = {}
    for c in wanted:
        lack = rounds - len(record.rounds(name, c))
        if lack > 0:
            lacking[c.generation] = max(lacking.get(c.generation, 0), lack)
            if c.generation not in longest or c.new > longest[c.generation].new:
                longest[c.generation] = c
    todo = [c for c in longest.values() for _ in range(lacking[c.generation])]
    return sorted(todo, key=lambda c: record.predicted[name][c.label])


def _one(
    model: Any, experts: Any, ids: Any, wanted: Configuration, name: str, record: Record, replay: Replay | None
) -> None:
    """A round, kept as far as it got when it is interrupted, and now and then before.

    One that was interrupted goes on: the tokens it had are given with the prompt, and that takes none of its time.
    """
    one = record.partial(name, wanted)
    before, tokens, calls = list(one["seconds"]), list(one["tokens"]), dict(one["expert_calls"])
    speak, stamps = _Speaker(f"{name} {wanted.label}"), list[float]()
    _begin(replay, dataclasses.replace(wanted, prompt=wanted.prompt + len(tokens)))
    experts.reset_counters()

    def on_token(second: float, so_far: Any) -> None:
        stamps.append(second)
        if before:  # the first token now is the last one then
            one["seconds"] = [*before, *(before[-1] + stamp - stamps[0] for stamp in stamps[1:])]
        else:
            one["seconds"] = list(stamps)
        one["tokens"] = so_far[0, wanted.prompt :].tolist() if wanted.beams == 1 else []
        speak(len(one["seconds"]), wanted.new, one["seconds"][-1])
        if len(one["seconds"]) % _KEPT == 0:
            keep()

    def keep() -> None:
        now = experts.counters()["expert_calls"]
        one["expert_calls"] = {key: int(value) + calls.get(key, 0) for key, value in now.items()}
        one["seconds"] = [round(second, 6) for second in one["seconds"]]
        record.note(name, wanted, one)
        record.write()

    try:
        measure.generate(model, ids, wanted, on_token, tokens)
    finally:
        if stamps:
            keep()
        speak.end()


def _prompt(model: Model, tokens: int) -> torch.Tensor:
    """Token ids [1, n] of text, over and over if it is short; of a random model, any."""
    if model.random:
        generator = torch.Generator().manual_seed(1)
        size = max(tokens, measure.CHECK_TOKENS)
        return torch.randint(1, model.spec.vocab_size, (1, size), generator=generator)
    ids = hf.load_tokenizer(model.source)(read_text(OUR_TEXT), return_tensors="pt")["input_ids"]
    return ids.repeat(1, -(-max(tokens, measure.CHECK_TOKENS) // ids.shape[1]))


def _calibrated(args: argparse.Namespace, model: Model, kind: AcceleratorKind) -> Path:
    """This machine's latencies for the model's experts: measured once for an output folder."""
    path = Path(args.output, f"hw-{kind}-{model.full.name}.json")
    if not path.exists():
        _say(f"calibrating this machine, which a second run will not ({path})")
        source = f"python -m tests.bench.end_to_end, {time.strftime('%Y-%m-%d')}"
        name = args.model if model.random else str(model.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        pipeline.calibrate(
            path,
            quick=True,
            accelerator=kind,
            models=[name],
            name="this machine",
            source=source,
            progress=_Progress(""),
        )
    return path


def _measured_rest(model: Model, plan: Plan, machine: Machine, path: Path) -> bool:
    """Adds steps without the routed experts to the calibration, once for each model; whether there were none."""
    calibration = load_hardware(str(path))
    if any(step.model_fingerprint == model.spec.fingerprint for step in calibration.steps):
        return False
    _say("measuring all of a step but its experts, which a second run will not")
    whole = _whole(model, machine)
    whole.fiddler = CONTENDERS[0].open(model, on_both_sides(plan), machine, _Progress("ours"))
    noting = whole.register_forward_pre_hook(hf._note_phase, with_kwargs=True)
    try:
        with measure.attached(whole, whole.fiddler, None):
            steps = measure_rest_of(whole, plan, progress=_Progress(""))
    finally:
        noting.remove()
        whole.fiddler.close()
    write_hardware(dataclasses.replace(calibration, steps=(*calibration.steps, *steps)), path)
    return True


def _whole(model: Model, machine: Machine) -> Any:
    _say(f"making {model.spec.name}, without its experts")
    return model.without_experts().to("cuda" if machine.kind == "cuda" else "cpu")


def _compiled(output: Path, model: Model, hardware: str, options: Options, routing: Path | None) -> Plan:
    folder = output / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    trace = routing if model.spec == model.full else None  # a trace is of the whole model
    request = pipeline.CompileRequest(
        str(model.source),
        hardware,
        folder,
        trace=trace,
        gpu_memory_bytes=options.gpu_memory_bytes,
        objective=options.objective,
        context=options.context,
        batch=options.batch,
    )
    pipeline.compile_plan(request, _Progress(""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiddlerWarning)
        return fiddler_runtime.load_plan(folder)


def _cap(kind: AcceleratorKind, memory_bytes: int) -> None:
    """Holds torch to that much of the GPU. On a simulated one the plan alone is held to it."""
    if kind == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total))


def _setup(args: argparse.Namespace, machine: Machine, plan: Plan) -> dict[str, Any]:
    here = this_machine("none")
    routing = None if args.routing is None else hashlib.sha256(args.routing.read_bytes()).hexdigest()[:16]
    return {
        "model": plan.header.model.name,
        "random_weights": args.random_weights,
        "device": machine.kind,
        "gpu_memory": args.gpu_memory,
        "threads": machine.threads,
        "routing": routing,
        "machine": f"{here.cpu}, {here.cores} cores",
        "latencies": plan.header.hardware.source,
    }


def _about(args: argparse.Namespace, model: Model, plan: Plan, machine: Machine, residents: int) -> list[str]:
    here, spec, hardware = this_machine("none"), model.spec, plan.header.hardware
    where = {
        "cuda": f"cuda: {torch.cuda.get_device_name() if torch.cuda.is_available() else ''}",
        "simulated": "simulated: one CPU core. No figure here says anything about a GPU",
        "none": "none: everything on the CPU. No figure here says anything about a GPU",
    }[machine.kind]
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {here.cpu}, {here.cores} cores, {machine.threads} threads in the CPU lane; "
        f"torch {torch.__version__}",
        f"accelerator {where}",
        f"{spec.name}, {'random weights' if model.random else 'its own weights'}, "
        f"{residents} of {spec.total_experts} experts fit the accelerator",
        f"predictions from {hardware.name} ({hardware.provenance}): {hardware.source}",
        f"routing: {'the trace ' + args.routing.name if args.routing else 'as the routers choose'}"
        + (", nearly uniform since they are random" if model.random and not args.routing else ""),
    ]
    if spec.num_layers < model.full.num_layers:
        lines.append(
            f"SCALED DOWN: {spec.num_layers} of {model.full.num_layers} layers, with the same share of the experts on "
            f"the accelerator as {format_bytes(args.gpu_memory)} hold of the whole model: no rates of that model"
        )
    return lines


def _written(record: Record, output: Path) -> str:
    text = table.render(record)
    (output / "results.md").write_text(text, encoding="utf-8")
    plot.draw(record, output / "results.svg")
    return text


class _Speaker:
    """Says how far something is, every two seconds on a terminal and every half minute elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._every = _SPEAK_S if sys.stderr.isatty() else 15 * _SPEAK_S
        self._last = time.monotonic()
        self._text = ""

    def __call__(self, done: int, total: int, seconds: float) -> None:
        self._text = f"{self._label}: {done}/{total} tokens, {seconds:.1f} s"
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            _say(self._text, end="\r" if sys.stderr.isatty() else "\n")

    def end(self) -> None:
        if self._text:
            _say(self._text)


class _Progress:
    """The same for loading, building and calibrating."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._every = _SPEAK_S if sys.stderr.isatty() else 15 * _SPEAK_S
        self._last = time.monotonic()

    def __call__(self, label: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            text = f"{self._label} {label}: {100 * done // max(1, total)} %".strip()
            _say(text, end="\r" if sys.stderr.isatty() else "\n")


def _say(text: str, end: str = "\n") -> None:
    print(f"{text:<100}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)
