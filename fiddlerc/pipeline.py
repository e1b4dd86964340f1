"""Every stage of the compiler, in order, top to bottom. The only module that imports them all.

`compile_plan` is the compiler; the other functions are what the rest of the command line does with the same stages.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fiddler_runtime import compat, drift, makespan, strict
from fiddler_runtime import plan as plan_format
from fiddler_runtime.build import build_kernels, find_toolchain
from fiddler_runtime.checkpoint import has_weights
from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.kernels import KernelLibrary
from fiddler_runtime.machine import available_bytes, refused, this_machine
from fiddler_runtime.plan import HardwareSummary, Header, Plan
from fiddler_runtime.progress import Progress
from fiddler_runtime.text import format_bytes

from . import __version__, codegen, export, frontend, hardware, latency, placement, report, simulate
from . import execution as execution
from . import trace as tracing
from .ir import (
    Calibration,
    ExpertForm,
    Feature,
    KernelSources,
    Machine,
    MemoryBudget,
    ModelSpec,
    Objective,
    Options,
    Placement,
    PolicyResult,
    Prediction,
    Scenario,
    Steps,
    StepSample,
    Tables,
    Trace,
    Tuning,
)

DEFAULT_CONTEXT = 4096
BEAM_BATCH = 4
DEFAULT_SHAPES = ((4096, 14336), (2048, 768))
QUICK_SHAPES = ((2048, 768),)
TRACE_MARGIN = 1.2
"""Tracing by transformers takes the model's own bytes, and some more while it loads and runs."""


@dataclass(frozen=True)
class CompileRequest:
    """What `fiddlerc compile` was asked. None means: take the default that `compile_plan` documents."""

    model: str
    hardware: str
    output: Path | None = None
    trace: Path | None = None
    gpu_memory_bytes: int | None = None
    objective: Objective = "balanced"
    context: int | None = None
    batch: int | None = None
    kv_bytes_per_token: int | None = None
    isas: tuple[str, ...] | None = None
    build: bool = True
    tune: bool = False
    include_binaries: bool = False
    dump_dir: Path | None = None
    plots_dir: Path | None = None


@dataclass(frozen=True)
class Compiled:
    """The plan that was written and the kernel library built from it (None when building was declined)."""

    plan: Plan
    library: Path | None


def compile_plan(request: CompileRequest, progress: Progress | None = None) -> Compiled:
    """Model + machine + trace -> plan directory.

    Defaults: output `<model>-<machine>` in the current directory; GPU memory that of the machine's accelerator; context
    the model's, at most 4096; batch 1, or 4 where the objective includes beams; kernels for every known ISA.
    Raises FiddlerError for everything a user can get wrong; nothing is left behind then, but a whole plan whose
    plots could not be written.
    """
    model = frontend.with_cache(frontend.load_model(request.model), request.model, request.kv_bytes_per_token)
    calibration = hardware.load_hardware(request.hardware)
    output = request.output or Path(f"{model.name}-{calibration.name}")
    _check_apart(output, request.dump_dir, request.plots_dir)  # before anything is written
    plan_format.check_destination(output)
    if request.plots_dir is not None and (found := _not_writable(Path(os.path.realpath(request.plots_dir)))):
        raise _no_plots(request.plots_dir, found)

    dump = _Dump(request.dump_dir)
    dump("model", model)
    dump("hardware", calibration)
    if request.tune:
        _require_tunable(request, calibration)

    trace = None if request.trace is None else tracing.read_trace(request.trace, model)
    popularity = tracing.popularity(trace, model, request.objective)
    dump("popularity", {"source": None if trace is None else trace.source, "popularity": popularity})

    fitted = latency.fit(calibration, model)
    dump("latency", fitted)

    options = _options(request, model, calibration)
    steps = tracing.sample_steps(trace, popularity, model, options)
    dump("steps", {scenario: len(part.tokens) for scenario, part in steps.items()})

    # Memory, placement, tables and features: each rests on the one before, and prefetching takes memory again.
    decided = _decide(
        model,
        options,
        calibration.machine.accelerator.kind,
        placement.latencies(fitted),
        lambda placed, prefetch: placement.make_tables(model, fitted, placed, prefetch),
        _Known(trace, popularity, steps, "uniform assumption" if trace is None else f"trace: {trace.source}"),
        progress,
    )
    budget, placed, tables, features = decided.budget, decided.placed, decided.tables, decided.features
    dump("memory", {"options": options, "budget": budget})
    dump("placement", placed)
    dump("tables", tables)
    dump("features", features)

    tuning = _tune(request, model.expert, calibration, progress) if request.tune else None
    sources = _generate(model.expert, calibration.machine, request.isas, tuning)
    dump.files("kernels", sources.files)

    # Built before the plan is published: a plan whose kernels do not compile must not exist.
    files = {f"kernels/{name}": text.encode() for name, text in sources.files.items()}
    library = None
    if request.build:
        library = _build(sources, progress)
        if request.include_binaries:
            files[f"kernels/{library.name}"] = library.read_bytes()
    elif request.include_binaries:
        raise FiddlerError(
            "--include-binaries needs the kernels built", found="--no-build", hint="leave out --no-build"
        )

    assumptions = _assumptions(calibration, trace, model, options)
    header = Header(
        format_major=plan_format.FORMAT_MAJOR,
        format_minor=plan_format.FORMAT_MINOR,
        abi=plan_format.ABI_VERSION,
        model=model,
        kernels=sources.spec,
        hardware=HardwareSummary(calibration.name, calibration.provenance, calibration.source, calibration.machine),
        options=options,
        memory=budget.items,
        latency=fitted.curves,
        placement=placed.summary,
        features=features,
        assumptions=assumptions,
        tools={"fiddlerc": __version__},
        files=(),
        digest="",
    )
    workload = simulate.default_workload(model)
    prediction = simulate.predict(header, tables, steps, workload, progress)
    dump("prediction", prediction)

    told = report.Inputs(header, calibration, fitted, placed, budget, tables, steps, prediction)
    files["report.html"] = report.render(told)
    plan = plan_format.write_plan(output, header, tables, files)
    if request.plots_dir is not None:
        _write_plots(request.plots_dir, report.plots(told))
    return Compiled(plan, library)


@dataclass(frozen=True)
class PredictRequest:
    """What `fiddlerc predict` was asked. target: a plan directory, or a model for which a plan is made in passing.

    sweep_bytes  amounts of accelerator memory to predict our strategy for, each with a placement of its own
    """

    target: str
    hardware: str | None = None
    trace: Path | None = None
    gpu_memory_bytes: int | None = None
    workloads: tuple[str, ...] = ("all",)
    sweep_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class SweepPoint:
    """Ours with another amount of accelerator memory: None where the model does not fit."""

    gpu_memory_bytes: int
    resident_experts: int
    result: PolicyResult | None


@dataclass(frozen=True)
class Predicted:
    """A prediction, what it rests on, and a sweep where one was asked for."""

    header: Header
    workload: simulate.Workload
    prediction: Prediction
    assumptions: tuple[str, ...]
    sweep: tuple[SweepPoint, ...]


def predict(request: PredictRequest, progress: Progress | None = None) -> Predicted:
    """Tokens per second of a plan, ours beside the literature's, before anyone has the machine.

    Replays the trace; without one, tokens drawn from the plan's popularity. Raises FiddlerError for a model without
    --hw, for a plan with --hw or --gpu-memory (it has both), and for workloads that are none.
    """
    plan = _plan_for(request, progress)
    header, tables = plan.header, plan.tables
    model = header.model
    workload = simulate.parse_workload(request.workloads, model)
    trace = None if request.trace is None else tracing.read_trace(request.trace, model)
    popularity = tables.popularity.astype(np.float64)
    steps = tracing.sample_steps(trace, popularity, model, header.options)
    prediction = simulate.predict(header, tables, steps, workload, progress)
    sweep = []
    if request.sweep_bytes and header.hardware.machine.accelerator.kind == "none":
        raise FiddlerError(
            "a sweep over GPU memory needs a GPU",
            found=f"{header.hardware.name}, which has no accelerator",
            expected="a machine with one",
            hint="fiddlerc predict MODEL --hw a100 --sweep gpu-memory=8GiB..80GiB",
        )
    for index, memory in enumerate(request.sweep_bytes):
        if progress is not None:
            progress("sweeping GPU memory", index, len(request.sweep_bytes))
        sweep.append(_sweep_point(plan, memory, trace, steps, workload))
    lines = list(header.assumptions)
    if trace is None or trace.experts is None:
        lines.append(
            "routing is drawn from the popularity of each expert, independently of the other layers and tokens; "
            "a recorded --trace replays real text"
        )
    rest = [curve for curve in header.latency if curve.quantity == "rest_of_step" and curve.samples]
    if not any(curve.interpolated for curve in rest):
        basis = "other models' steps" if rest else "the machine's limits"
        lines.append(
            "attention and all else outside the routed experts was not measured of this model: its time follows from "
            f"{basis}; `fiddlerc calibrate --model MODEL_DIR` measures it, with {model.name}'s weights"
        )
    return Predicted(header, workload, prediction, tuple(lines), tuple(sweep))


def _plan_for(request: PredictRequest, progress: Progress | None) -> Plan:
    if Path(request.target, plan_format.HEADER).is_file():
        if request.hardware is not None or request.gpu_memory_bytes is not None:
            raise FiddlerError(
                "a plan has its machine and its memory",
                found="--hw" if request.hardware is not None else "--gpu-memory",
                expected="a model, or neither option",
                hint=f"fiddlerc predict {request.target}",
            )
        return plan_format.read_plan(Path(request.target))
    if request.hardware is None:
        raise FiddlerError(
            "predicting for a model needs a machine",
            found="no --hw",
            expected="a calibration file or a name of the catalogue, or a plan",
            hint=f"fiddlerc predict {request.target} --hw a100",
        )
    with tempfile.TemporaryDirectory(prefix="fiddlerc-") as folder:
        compiling = CompileRequest(
            model=request.target,
            hardware=request.hardware,
            output=Path(folder, "plan"),
            trace=request.trace,
            gpu_memory_bytes=request.gpu_memory_bytes,
            build=False,
        )
        return compile_plan(compiling, progress).plan


def _sweep_point(
    plan: Plan, memory: int, trace: Trace | None, steps: dict[Scenario, Steps], workload: simulate.Workload
) -> SweepPoint:
    """The plan's model, latencies and trace, placed anew in another amount of memory."""
    header, tables = plan.header, plan.tables
    model, accelerator = header.model, header.hardware.machine.accelerator.kind
    options = dataclasses.replace(header.options, gpu_memory_bytes=memory)
    known = _Known(trace, tables.popularity.astype(np.float64), steps, header.placement.basis)

    def tables_of(placed: Placement, prefetch: npt.NDArray[np.int16]) -> Tables:
        return dataclasses.replace(tables, resident=placed.resident.astype(np.uint8), prefetch=prefetch)

    try:
        decided = _decide(model, options, accelerator, makespan.dense(tables), tables_of, known)
    except FiddlerError:  # what is not an expert does not fit
        return SweepPoint(memory, 0, None)
    header = dataclasses.replace(header, options=options, features=decided.features)
    result = simulate.predict(header, decided.tables, steps, workload, policies=simulate.POLICIES[:1]).results[0]
    return SweepPoint(memory, decided.budget.resident_experts, result)


def calibrate(
    output: Path,
    *,
    quick: bool,
    accelerator: Literal["auto", "cuda", "simulated", "none"],
    models: Sequence[str],
    name: str | None,
    source: str,
    progress: Progress | None = None,
) -> Calibration:
    """Measures this machine with kernels generated for `models` (default: two typical shapes) and writes hw.json.

    A model's experts are measured where they will lie when it runs: in the caches as far as the model fits there.
    """
    _require_writable(output)
    hardware.require_name(name or output.stem, "--name")
    sizes: dict[tuple[int, int], hardware.ModelBytes] = {}
    forms = {shape: ExpertForm(*shape) for shape in (QUICK_SHAPES if quick else DEFAULT_SHAPES)} if not models else {}
    for model in models:
        spec = frontend.load_model(model)
        shape = (spec.hidden_size, spec.intermediate_size)
        experts = spec.total_experts * spec.expert_bytes
        size = hardware.ModelBytes(experts, spec.non_expert_bytes // spec.num_layers)
        sizes[shape] = max(size, sizes.get(shape, size), key=lambda known: known.experts)
        forms[shape] = spec.expert  # latencies are kept by shape: activation and biases change them little
    libraries = {}
    machine = this_machine(accelerator)
    for shape, form in forms.items():
        sources = _generate(form, machine)
        libraries[shape] = KernelLibrary(_build(sources, progress), sources.spec)
    calibration = hardware.measure(
        libraries,
        quick=quick,
        accelerator=accelerator,
        models=sizes,
        name=name or output.stem,
        source=source,
        progress=progress,
    )
    steps = [step for model in models for step in _measure_rest(model, calibration, progress)]
    calibration = dataclasses.replace(calibration, steps=tuple(steps))
    for line in hardware.contradictions(steps):
        warnings.warn(line, FiddlerWarning, stacklevel=2)
    output.parent.mkdir(parents=True, exist_ok=True)
    hardware.write_hardware(calibration, output)
    return calibration


def _measure_rest(model: str, calibration: Calibration, progress: Progress | None) -> tuple[StepSample, ...]:
    """Steps of the model without its experts; none of what has no weights to run, as a built-in name."""
    if not _runs(model):
        return ()
    # Through a plan of its own, so that a layer costs what it costs in use: with the lanes that this calibration is of.
    with tempfile.TemporaryDirectory(prefix="fiddlerc-") as folder:
        hw = Path(folder, "hw.json")
        hardware.write_hardware(calibration, hw)
        compiled = compile_plan(CompileRequest(model, str(hw), Path(folder, "plan")))
        return execution.measure_rest(compiled.plan, Path(model), progress=progress)


def _runs(model: str) -> bool:
    return Path(model).is_dir() and has_weights(Path(model))


def record_trace(
    model: str,
    texts: Sequence[Path],
    output: Path,
    *,
    sequence_tokens: int,
    prompt_tokens: int,
    batch: int,
    generate_tokens: int,
    num_beams: int,
    max_tokens: int | None,
    packed_cache: bool | Path = False,
    progress: Progress | None = None,
) -> Trace:
    """Runs the model over text files and writes which experts they chose.

    By transformers; with a packed cache, or where that would not fit the memory, through kernels of ours.
    """
    _require_writable(output)
    spec = frontend.load_model(model)
    if not Path(model).is_dir():
        raise FiddlerError(
            "tracing runs the model, so it needs its weights",
            found=f"the {'ONNX file' if spec.from_onnx else 'built-in name'} {model!r}, which has shapes only",
            expected="a Hugging Face directory",
            hint="fiddlerc trace MODEL_DIR --text FILE -o trace.safetensors",
        )
    contents = [execution.read_text(path) for path in texts]
    experts = spec.total_experts * spec.expert_bytes
    with tempfile.TemporaryDirectory(prefix="fiddlerc-") as folder:
        plan = None
        if packed_cache or TRACE_MARGIN * (spec.non_expert_bytes + experts) > available_bytes():
            # For its kernels: on the CPU nothing else of it is used, and its latencies mean nothing.
            request = CompileRequest(model, "a100", Path(folder, "plan"), batch=1)
            plan = compile_plan(request, progress).plan
        with drift.unheeded():
            trace = tracing.record(
                Path(model),
                spec,
                contents,
                sequence_tokens=sequence_tokens,
                prompt_tokens=prompt_tokens,
                batch=batch,
                generate_tokens=generate_tokens,
                num_beams=num_beams,
                max_tokens=max_tokens,
                plan=plan,
                packed_cache=packed_cache,
                progress=progress,
            )
    tracing.write_trace(trace, output)
    return trace


def import_counts(model: str, counts: Path, output: Path) -> Trace:
    """Published expert counts (JSON) -> trace file."""
    _require_writable(output)
    trace = tracing.from_counts(counts, frontend.load_model(model))
    tracing.write_trace(trace, output)
    return trace


def export_onnx(
    model: str, output: Path, *, dtype: export.DType = "bfloat16", progress: Progress | None = None
) -> tuple[ModelSpec, Path]:
    """Writes a Hugging Face directory as an ONNX file with an Experts node per MoE layer; returns its data file too."""
    spec = frontend.load_model(model)
    if not Path(model).is_dir():
        raise FiddlerError(
            "exporting needs the model's weights",
            found=f"{model!r}, which is no directory",
            expected="a Hugging Face directory",
            hint="fiddlerc export-onnx MODEL_DIR -o FILE.onnx",
        )
    return spec, export.export_onnx(Path(model), spec, output, dtype=dtype, progress=progress)


def inspect_plan(path: Path) -> dict[str, Any]:
    """What a plan says, as plain JSON values. A plan of another format still tells its version."""
    try:
        plan = plan_format.read_plan(path, verify=False)
    except FiddlerError as error:
        version = plan_format.peek_version(path)
        if version is None:
            raise
        raise FiddlerError(
            error.what + f" (this plan says it is of format {version[0]}.{version[1]})",
            found=error.found,
            expected=error.expected,
            hint=error.hint,
        ) from None
    value: dict[str, Any] = strict.encode(plan.header)
    value["model"]["fingerprint"] = plan.header.model.fingerprint
    value["kernels"]["packed_bytes"] = plan.header.kernels.packed_bytes
    value["tables"] = {
        "decode_streams": plan.tables.decode_streams.tolist(),
        "residents_per_layer": plan.tables.resident.sum(axis=1).tolist(),
        "scalars_us": dict(
            zip(("cpu_entry", "accelerator_entry", "stream"), plan.tables.scalars_us.tolist(), strict=True)
        ),
        "contention": plan.tables.contention.tolist()[0],
    }
    return value


def verify_plan(path: Path, model_dir: Path | None = None) -> tuple[Plan, tuple[str, ...]]:
    """Checks every byte of a plan, then this machine (and a model directory) against it; returns soft mismatches."""
    from fiddler_runtime import loading

    plan = plan_format.read_plan(path)
    if model_dir is not None:
        execution.check_model(plan, model_dir)
    return plan, compat.check(plan.header, this_machine(loading.device_here(plan)))


def run(plan: Path, request: execution.RunRequest, **hooks: Any) -> execution.RunResult:
    """Generates text through a plan."""
    return execution.run(plan, request, **hooks)


def bench(plan: Path, request: execution.BenchRequest, **hooks: Any) -> execution.BenchResult:
    """Compares a plan's tokens/s with transformers' own, interleaved in one process."""
    return execution.bench(plan, request, **hooks)


def pack(plan: Path, request: execution.PackRequest, **hooks: Any) -> execution.PackResult:
    """Makes a model's packed cache ahead of time."""
    return execution.pack(plan, request, **hooks)


def doctor() -> tuple[hardware.Check, ...]:
    """What this machine has and lacks."""
    return hardware.doctor()


def _options(request: CompileRequest, model: ModelSpec, calibration: Calibration) -> Options:
    context = min(model.max_context, DEFAULT_CONTEXT) if request.context is None else request.context
    if not 1 <= context <= model.max_context:
        raise FiddlerError(
            "--context is out of range",
            found=context,
            expected=f"1 to {model.max_context}, the most {model.name} was trained for",
            hint=f"--context {min(max(context, 1), model.max_context)}",
        )
    batch = request.batch
    if batch is None:
        batch = BEAM_BATCH if request.objective in ("beam", "balanced") else 1
    memory = request.gpu_memory_bytes
    if memory is None:
        memory = calibration.machine.accelerator.memory_bytes
    return Options(request.objective, context, batch, memory)


@dataclass(frozen=True)
class _Known:
    """What is known of the text that the model will see; basis in words."""

    trace: Trace | None
    popularity: npt.NDArray[np.float64]
    steps: dict[Scenario, Steps]
    basis: str


@dataclass(frozen=True)
class _Decided:
    budget: MemoryBudget
    placed: Placement
    tables: Tables
    features: tuple[Feature, ...]


def _decide(
    model: ModelSpec,
    options: Options,
    accelerator: str,
    latencies: makespan.Latencies,
    tables_of: Callable[[Placement, npt.NDArray[np.int16]], Tables],
    known: _Known,
    progress: Progress | None = None,
) -> _Decided:
    """Which experts are resident, the tables that follow, and what pays beyond them; twice if prefetching does."""
    successors = tracing.successors(known.trace, model)
    steps = None if known.trace is None else known.steps
    for prefetching in (False, True):
        budget = MemoryBudget(0, (), 0)
        if accelerator != "none":
            budget = placement.count_memory(model, options, prefetching=prefetching)
        placed = placement.place(
            model, latencies, steps, known.popularity, budget, options.objective, known.basis, progress=progress
        )
        # What is worth fetching ahead is what is not resident.
        tables = tables_of(placed, placement.make_prefetch(successors, placed.resident))
        features = simulate.features(model, tables, accelerator, known.steps, options.objective)
        if not any(feature.name == "prefetch" and feature.on for feature in features):
            break
    return _Decided(budget, placed, tables, features)


def _assumptions(calibration: Calibration, trace: Trace | None, model: ModelSpec, options: Options) -> tuple[str, ...]:
    lines = list(model.expert_tensors.notes)
    accelerator = calibration.machine.accelerator
    if 0 < accelerator.memory_bytes < options.gpu_memory_bytes:
        lines.append(
            f"--gpu-memory is {format_bytes(options.gpu_memory_bytes)}, more than the "
            f"{format_bytes(accelerator.memory_bytes)} of {accelerator.name}"
        )
    lines += hardware.contradictions(calibration.steps)
    if trace is not None and trace.model_fingerprint != model.fingerprint:
        lines.append(f"the trace is of {trace.model_name}: for an ONNX file its shapes are all that was compared")
    if calibration.provenance != "measured":
        lines.append(
            f"latencies come from a {calibration.provenance} of {calibration.name}, not from a measurement; "
            "run `fiddlerc calibrate` on the machine for real ones"
        )
    elif (model.hidden_size, model.intermediate_size) not in {
        (s.hidden_size, s.intermediate_size) for s in calibration.samples
    }:
        lines.append(
            "latencies are extrapolated from other expert shapes; "
            f"`fiddlerc calibrate --model {model.name}` measures this one"
        )
    if calibration.machine.accelerator.kind == "simulated":
        lines.append("the accelerator is simulated on the CPU: its figures say nothing about a GPU")
    if trace is None:
        lines.append(
            "placement rests on a uniform assumption: every expert taken as equally popular; give --trace for real ones"
        )
    elif trace.experts is None:
        lines.append("popularity comes from imported counts, which do not tell prefill from decode")
    return tuple(lines)


def _generate(
    form: ExpertForm, machine: Machine, isas: Sequence[str] | None = None, tuning: Tuning | None = None
) -> KernelSources:
    """The kernels of such experts, cut for a machine: as the cost model says, or as was measured."""
    measured = {} if tuning is None else {tuning.isa: next(c.blocking for c in tuning.candidates if c.chosen)}
    sources = codegen.generate(
        form.hidden_size,
        form.intermediate_size,
        isas,
        activation=form.activation,
        bias=form.bias,
        machine=machine,
        blockings=measured,
    )
    return dataclasses.replace(sources, spec=dataclasses.replace(sources.spec, tuning=tuning))


def _require_writable(output: Path) -> None:
    """Before anything slow: that a file can be written there."""
    output = Path(os.path.realpath(output))
    found = _not_writable(output.parent)
    if os.path.exists(output) and not os.path.isfile(output):
        found = "a directory" if os.path.isdir(output) else "a device or pipe"
    if found:
        raise FiddlerError(
            f"cannot write to {output}", found=found, expected="a file in a folder to write to", hint="-o ANOTHER_FILE"
        )


def _not_writable(folder: Path) -> str:
    """Why no file can be put there, as a message's `found`; empty where one can. The folder need not be there yet."""
    folder = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if folder.is_dir() and os.access(folder, os.W_OK):
        return ""
    return f"{folder}, which is {'read-only' if folder.is_dir() else 'a file'}"


def _require_tunable(request: CompileRequest, calibration: Calibration) -> None:
    """Before anything slow: --tune needs a build, the calibration's machine and a compiler."""
    if not request.build:
        raise FiddlerError("--tune builds the kernels to measure them", found="--no-build", hint="leave out --no-build")
    hardware.require_this_machine(calibration)
    find_toolchain()


def _tune(request: CompileRequest, form: ExpertForm, calibration: Calibration, progress: Progress | None) -> Tuning:
    """Measures the candidates of the best instruction set that runs here."""
    here = this_machine("none")
    wanted = request.isas or codegen.KNOWN_ISAS
    isa = next((isa for isa in here.isa if isa in wanted), None)
    if isa is None:
        raise FiddlerError(
            "--tune measures kernels that run here",
            found=f"--isa {','.join(wanted)}" + "".join(f" ({refused(isa)})" for isa in wanted if refused(isa)),
            expected="one of " + ", ".join(here.isa),
            hint=f"--isa {here.isa[0]}",
        )
    builds = []
    candidates = codegen.candidates(isa, form, calibration.machine)
    for index, (change, candidate) in enumerate(candidates):
        if progress is not None:
            progress("building candidates", index, len(candidates))
        sources = codegen.generate(
            form.hidden_size,
            form.intermediate_size,
            (isa,),
            activation=form.activation,
            bias=form.bias,
            machine=calibration.machine,
            blockings={isa: candidate.blocking},
        )
        builds.append((change, candidate.blocking, KernelLibrary(_build(sources, None), sources.spec)))
    if progress is not None:
        progress("building candidates", len(candidates), len(candidates))
    return hardware.tune(builds, isa, calibration, progress=progress)


def _build(sources: KernelSources, progress: Progress | None) -> Path:
    with tempfile.TemporaryDirectory(prefix="fiddlerc-") as folder:
        return build_kernels(sources.write(Path(folder)), progress=progress)


def _check_apart(output: Path, *folders: Path | None) -> None:
    """Raises FiddlerError if one of the folders is the plan's or lies in it: a plan holds what plan.json lists."""
    for folder in folders:
        if folder is not None and folder.resolve().is_relative_to(output.resolve()):
            raise FiddlerError(
                f"{folder} is in the plan {output}",
                found="--dump-dir or --plots inside of --output",
                expected="a folder outside of the plan",
                hint=f"give --dump-dir or --plots {output}-report, or another folder",
            )


def _write_plots(folder: Path, plots: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in plots.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise _no_plots(folder, str(error.strerror)) from None


def _no_plots(folder: Path, found: str) -> FiddlerError:
    return FiddlerError(
        f"cannot write to --plots {folder}",
        found=found,
        expected="a folder to write to",
        hint="--plots OTHER_FOLDER, or none",
    )


class _Dump:
    """Writes each stage's result below a folder, numbered in the order in which the stages ran."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.number = 0

    def __call__(self, stage: str, value: Any) -> None:
        self.files(stage, {".json": json.dumps(_plain(value), indent=1, sort_keys=True) + "\n"})

    def files(self, stage: str, files: dict[str, str]) -> None:
        self.number += 1
        if self.folder is None:
            return
        base = self.folder / f"{self.number:02}-{stage}"
        try:
            for name, text in files.items():
                path = base.with_name(base.name + name) if name.startswith(".") else base / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        except OSError as error:
            raise FiddlerError(
                f"cannot write to --dump-dir {self.folder}",
                found=error.strerror,
                expected="a folder to write to",
                hint="--dump-dir OTHER_FOLDER, or none",
            ) from None


def _plain(value: Any) -> Any:
    """Dataclasses and arrays to JSON values."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
