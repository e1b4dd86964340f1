"""Arguments in, text out. Data goes to stdout, everything else to stderr; an error is one line and a hint.

Commands import the pipeline, and with it torch, when they run: help and wrong usage are answered at once.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from fiddler_runtime.errors import FiddlerError, FiddlerWarning
from fiddler_runtime.progress import BYTES
from fiddler_runtime.text import PLACEMENTS, format_bytes

from . import __version__

app = typer.Typer(
    name="fiddlerc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
err = Console(stderr=True, highlight=False, soft_wrap=True)
# Data: paths and model output are printed as they are, without markup.
out = Console(highlight=False, soft_wrap=True, markup=False)


INTERRUPTED = 130
SWEEP_POINTS = 10
MOST_BEAMS = 4096  # more is a slip of the pen, and so is more memory than 1 PiB
MOST_MEMORY = 1 << 50
LINES_APART_S = 10.0  # of progress that is told in lines


class ObjectiveOption(StrEnum):
    decode = "decode"
    prefill = "prefill"
    beam = "beam"
    balanced = "balanced"


class DTypeOption(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class DeviceOption(StrEnum):
    auto = "auto"
    cuda = "cuda"
    simulated = "simulated"
    none = "none"


def parse_bytes(text: str) -> int:
    """'24GiB', '24GB', '512MiB', '1.5TiB' or plain bytes. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not an amount of memory, such as 24GiB, 24GB or 512MiB")
    number, prefix, binary = match.groups()
    power = "kMGT".index("k" if prefix == "K" else prefix) + 1 if prefix else 0
    size = float(number) * (1024 if binary else 1000) ** power
    if size > MOST_MEMORY:
        raise typer.BadParameter(f"{text!r} is more than {format_bytes(MOST_MEMORY)}")
    return int(size)


def parse_isas(text: str) -> tuple[str, ...]:
    """'avx512_bf16,avx2' to its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_sweep(text: str) -> tuple[int, ...]:
    """'gpu-memory=8GiB..80GiB' to ten amounts, evenly spaced, the ends included; a bare number has the other's unit."""
    match = re.fullmatch(r"gpu-memory=([\d.]+)(\w*)\.\.([\d.]+)(\w*)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a sweep, such as gpu-memory=8GiB..80GiB")
    low, low_unit, high, high_unit = match.groups()
    if not low_unit + high_unit:
        raise typer.BadParameter(f"{text!r} has no unit, such as gpu-memory={low}GiB..{high}GiB")
    first, last = parse_bytes(low + (low_unit or high_unit)), parse_bytes(high + (high_unit or low_unit))
    if not 0 < first <= last - (SWEEP_POINTS - 1):
        raise typer.BadParameter(f"{text!r} does not go from less to more, such as gpu-memory=8GiB..80GiB")
    return tuple(first + (last - first) * step // (SWEEP_POINTS - 1) for step in range(SWEEP_POINTS))


def parse_cache(text: str) -> bool | Path:
    """--packed-cache's folder; without one: True, beside the checkpoint."""
    return Path(text) if text else True


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan directory.")]
ModelDir = Annotated[Path, typer.Option("--model", metavar="DIR", help="The model's Hugging Face directory.")]
Device = Annotated[DeviceOption, typer.Option(help="Where strategies (a) and (b) run; auto: what the plan is for.")]
Isa = Annotated[str | None, typer.Option(metavar="NAME", help="Run this kernel variant rather than the best.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU lane.")]
TrustBinaries = Annotated[
    bool, typer.Option("--trust-binaries", help="Load a kernel library that the plan brings, instead of building it.")
]
Capture = Annotated[
    bool, typer.Option("--capture", help="Run decode steps without Python between their layers; streams no experts.")
]
PackedCache = Annotated[
    Any,
    typer.Option(
        parser=parse_cache,
        metavar="[DIR]",
        help="Keep the packed experts on disk, in DIR or beside the model, and map them.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fiddlerc {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Compile a Mixture-of-Experts model and a machine into a plan, and run it."""


@app.command("compile")
def compile_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, an ONNX file, or a built-in name.")
    ],
    hw: Annotated[
        str, typer.Option("--hw", metavar="HW", help="A calibration file, or a built-in machine: a100 or a100.json.")
    ],
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Which experts real text chooses.")] = None,
    gpu_memory: Annotated[
        Any, typer.Option(parser=parse_bytes, metavar="SIZE", help="GPU memory to use, such as 24GiB.")
    ] = None,
    objective: Annotated[ObjectiveOption, typer.Option(help="The workload to place experts for.")] = (
        ObjectiveOption.balanced
    ),
    context: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence that memory is kept for.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time, beams counted.")] = None,
    kv_bytes: Annotated[
        Any,
        typer.Option(
            parser=parse_bytes, metavar="SIZE", help="Of an ONNX file: the KV cache of one token, all layers."
        ),
    ] = None,
    isa: Annotated[str | None, typer.Option(metavar="LIST", help="Kernel variants to generate; default: all.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Directory to write.")] = None,
    build: Annotated[bool, typer.Option(help="Build the kernels now; otherwise at first load.")] = True,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure the best candidate kernels here, on the machine HW, and choose.")
    ] = False,
    include_binaries: Annotated[
        bool, typer.Option("--include-binaries", help="Ship the built library inside the plan.")
    ] = False,
    dump_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each stage's result there.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the report's figures there, as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL for the machine HW into a plan."""
    from . import pipeline

    request = pipeline.CompileRequest(
        model=model,
        hardware=hw,
        output=output,
        trace=trace,
        gpu_memory_bytes=gpu_memory,
        objective=objective.value,
        context=context,
        batch=batch,
        kv_bytes_per_token=kv_bytes,
        isas=None if isa is None else parse_isas(isa),
        build=build,
        tune=tune,
        include_binaries=include_binaries,
        dump_dir=dump_dir,
        plots_dir=plots,
    )
    with _progress() as progress:
        compiled = pipeline.compile_plan(request, progress)
    plan, header = compiled.plan, compiled.plan.header
    report = plan.path / "report.html"
    if as_json:
        _print_json(
            {
                "plan": str(plan.path),
                "report": str(report),
                "digest": header.digest,
                "library": None if compiled.library is None else str(compiled.library),
                "placement": dataclasses.asdict(header.placement),
                "tuning": None if header.kernels.tuning is None else dataclasses.asdict(header.kernels.tuning),
                "assumptions": list(header.assumptions),
            }
        )
        return
    for line in header.assumptions:
        err.print(f"[yellow]note:[/] {_escape(line)}")
    placed = header.placement
    out.print(f"plan       {plan.path}")
    out.print(f"machine    {header.hardware.name} ({header.hardware.provenance})")
    out.print(
        f"placement  {placed.resident_experts} of {placed.total_experts} experts on the accelerator, "
        f"expected hit rate {placed.hit_rate:.1%} (random {placed.random_hit_rate:.1%})"
    )
    out.print(f"kernels    {header.kernels.name}: {', '.join(v.isa for v in header.kernels.variants)}")
    if header.kernels.tuning is not None:
        out.print(f"tuned      {_tuned(dataclasses.asdict(header.kernels.tuning))}")
    out.print(f"report     {report}")


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="HW.json", help="File to write.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Measure this model's expert shape. Repeatable.")
    ] = None,
    accelerator: Annotated[DeviceOption, typer.Option(help="The accelerator to measure.")] = DeviceOption.auto,
    name: Annotated[str | None, typer.Option(help="The machine's name in plans; default: the file's.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine."""
    from . import pipeline

    day = datetime.datetime.now(datetime.UTC).date()
    # Without paths: plans repeat it, and must not tell where the user keeps files.
    options = [*(["--quick"] if quick else []), *(f"--model {Path(name).name}" for name in model or [])]
    source = f"{' '.join(['fiddlerc calibrate', *options])}, {day}"
    with _progress() as progress:
        calibration = pipeline.calibrate(
            output,
            quick=quick,
            accelerator=accelerator.value,
            models=model or [],
            name=name,
            source=source,
            progress=progress,
        )
    if as_json:
        told = {"source": calibration.source, "limits": dataclasses.asdict(calibration.limits)}
        _print_json({"hardware": str(output), **told})
        return
    limits, machine = calibration.limits, calibration.machine
    out.print(f"machine      {machine.cpu}, {machine.cores} cores, {', '.join(machine.isa)}")
    cpu = f"{limits.cpu_read_gbps:.1f} GB/s, {limits.cpu_peak_gflops:.0f} GFLOP/s"
    out.print(f"CPU lane     {limits.cpu_threads} threads: {cpu}")
    if machine.accelerator.kind != "none":
        out.print(
            f"accelerator  {machine.accelerator.name} ({machine.accelerator.kind}): "
            f"{limits.gpu_peak_gflops:.0f} GFLOP/s, {limits.host_to_device_gbps:.1f} GB/s to it"
        )
    out.print(f"written      {output} ({len(calibration.samples)} samples)")


@app.command()
def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory (or name, for counts).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Trace file to write.")],
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="UTF-8 text. Repeatable.")] = None,
    from_counts: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Import published expert counts instead.")
    ] = None,
    sequence_tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of these, tokens counted as prefill.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 4,
    generate_tokens: Annotated[int, typer.Option(min=0, help="Also let the model write this many.")] = 0,
    beams: Annotated[int, typer.Option(min=1, max=MOST_BEAMS, help="Beams while it writes; counted once.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this much text.")] = None,
    packed_cache: PackedCache = None,
    as_json: Json = False,
) -> None:
    """Record which experts text chooses."""
    from . import pipeline

    if (from_counts is None) == (not text):
        raise FiddlerError(
            "a trace comes from text or from counts",
            found="both" if text else "neither",
            expected="--text FILE or --from-counts JSON",
            hint="fiddlerc trace MODEL_DIR --text FILE -o trace.safetensors",
        )
    if from_counts is not None:
        result = pipeline.import_counts(model, from_counts, output)
    else:
        with _progress() as progress:
            result = pipeline.record_trace(
                model,
                text or [],
                output,
                sequence_tokens=sequence_tokens,
                prompt_tokens=prompt_tokens,
                batch=batch,
                generate_tokens=generate_tokens,
                num_beams=beams,
                max_tokens=max_tokens,
                packed_cache=packed_cache or False,
                progress=progress,
            )
    prefill, decode = (int(n) for n in result.counts.sum(axis=(1, 2)))
    if as_json:
        _print_json(
            {"trace": str(output), "model": result.model_name, "prefill_choices": prefill, "decode_choices": decode}
        )
        return
    skew = (result.counts.sum(axis=0).max(axis=1) / result.counts.sum(axis=0).mean(axis=1)).tolist()
    out.print(f"trace    {output}")
    out.print(f"choices  {prefill} in prefill, {decode} in decode")
    out.print(f"skew     most popular expert over the mean, by layer: {' '.join(f'{s:.2f}' for s in skew)}")


@app.command("export-onnx")
def export_onnx_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face directory with weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="File to write.")],
    dtype: Annotated[DTypeOption, typer.Option(help="Of everything but the experts, which are bfloat16.")] = (
        DTypeOption.bfloat16
    ),
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, with one Experts node per MoE layer."""
    from . import pipeline

    with _progress() as progress:
        spec, data = pipeline.export_onnx(model, output, dtype=dtype.value, progress=progress)
    if as_json:
        _print_json({"file": str(output), "data": str(data), "layers": list(spec.moe_layers)})
        return
    out.print(f"graph    {output}: {len(spec.moe_layers)} fiddlerc::Experts nodes")
    out.print(f"weights  {data} ({format_bytes(data.stat().st_size)})")


@app.command()
def inspect(
    plan: PlanPath,
    kernels: Annotated[bool, typer.Option("--kernels", help="Only the kernels: how each is cut, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a plan holds, without loading it."""
    from . import pipeline

    value = pipeline.inspect_plan(plan)
    if kernels:
        _print_json(value["kernels"]) if as_json else _print_kernels(value["kernels"])
        return
    if as_json:
        _print_json(value)
        return
    model, hardware, options, placed = value["model"], value["hardware"], value["options"], value["placement"]
    machine = hardware["machine"]

    def row(label: str, text: str) -> None:
        out.print(f"{label:11} {text}")

    row("format", f"{value['format_major']}.{value['format_minor']}, ABI {value['abi']}")
    row(
        "model",
        f"{model['name']} ({model['architecture']}): hidden {model['hidden_size']}, intermediate "
        f"{model['intermediate_size']}, {model['num_experts']} experts, top-{model['top_k']}, "
        f"{len(model['moe_layers'])} MoE layers",
    )
    row("machine", f"{hardware['name']}: {machine['cpu']}, {machine['cores']} cores")
    row("", f"{machine['accelerator']['name']} ({machine['accelerator']['kind']})")
    row("provenance", f"{hardware['provenance']}: {hardware['source']}")
    row("objective", f"{options['objective']}, context {options['context']}, batch {options['batch']}")
    for item in value["memory"]:
        row("memory", f"{format_bytes(item['bytes']):>10}  {item['item']}")
    row(
        "placement",
        f"{placed['resident_experts']} of {placed['total_experts']} experts, hit rate {placed['hit_rate']:.1%} "
        f"(random {placed['random_hit_rate']:.1%}); {placed['basis']}",
    )
    for name, ratio in value["placement"]["relative_time"].items():
        row("", f"{ratio:.3f} x the time of placement by popularity: {PLACEMENTS.get(name, name)}")
    for feature in value["features"]:
        gains = ", ".join(f"{feature[f'gain_{s}']:.1%} in {s}" for s in ("decode", "prefill", "beam"))
        row("feature", f"{feature['name']} {'on' if feature['on'] else 'off'}: saves {gains}")
    streams = value["tables"]["decode_streams"]
    row("decode", ", ".join(f"{m} misses: stream {s}" for m, s in enumerate(streams) if m))
    for curve in value["latency"]:
        error = f"held-out error {curve['heldout_median_error']:.1%}" if curve["samples"] else "not measured"
        row("latency", f"{curve['quantity']}: {curve['model']}, {error}")
    for variant in value["kernels"]["variants"]:
        row("kernel", variant["symbol"])
    if value["kernels"]["tuning"] is not None:
        row("tuned", _tuned(value["kernels"]["tuning"]))
    for line in value["assumptions"]:
        row("assumption", line)
    row("digest", value["digest"])


def _print_kernels(kernels: dict[str, Any]) -> None:
    """Each variant's blocking with its reasons; then what was measured, one line a candidate."""
    for variant in kernels["variants"]:
        cut = variant["blocking"]
        out.print(variant["symbol"])
        out.print(
            f"  tile {cut['tile_tokens']} x {cut['tile_vectors']}, k_block {cut['k_block']}, fetch_tokens "
            f"{cut['fetch_tokens']}, fetch_bytes {cut['fetch_bytes']}"
        )
        for reason in variant["reasons"]:
            out.print(f"  - {reason}")
    tuning = kernels["tuning"]
    if tuning is None:
        out.print("not tuned: the cost model's choice (fiddlerc compile --tune measures)")
        return
    out.print(f"tuned {_tuned(tuning)}; times as fast as the cost model's choice, by tokens:")
    out.print(f"  {'':22}" + "".join(f"{tokens:>8}" for tokens in tuning["tokens"]) + "   all (quartiles)")
    for candidate in tuning["candidates"]:
        cells = "".join(f"{speed:8.3f}" for speed in candidate["speed"])
        figures = f"{candidate['median']:.3f} ({candidate['low']:.3f}-{candidate['high']:.3f})"
        name = candidate["change"] or "cost model's choice"
        out.print(f"  {name:22}{cells}   {figures}{'   chosen' * candidate['chosen']}")


def _tuned(tuning: dict[str, Any]) -> str:
    chosen = next(candidate for candidate in tuning["candidates"] if candidate["chosen"])
    what = (
        f"{chosen['change']}, {chosen['median'] - 1:.1%} faster" if chosen["change"] else "the cost model's choice kept"
    )
    return f"{tuning['isa']}: {what} ({len(tuning['candidates'])} candidates, {tuning['threads']} threads)"


@app.command()
def verify(
    plan: PlanPath,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Also check that this is the plan's model.")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a plan, and whether it suits this machine."""
    from . import pipeline

    checked, mismatches = pipeline.verify_plan(plan, model)
    if as_json:
        _print_json({"plan": str(plan), "digest": checked.header.digest, "mismatches": list(mismatches)})
        return
    for line in mismatches:
        err.print(f"[yellow]warning:[/] {_escape(line)}")
    out.print(f"{plan}: intact, {len(checked.header.files)} files; its kernels run on this CPU")


@app.command()
def run(
    plan: PlanPath,
    model: ModelDir,
    prompt: Annotated[str, typer.Option(help="The text to continue; '-' reads it from standard input.")],
    experts: Annotated[
        Path | None, typer.Option(metavar="ONNX", help="The file with the experts, of a plan compiled from one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    beams: Annotated[int, typer.Option(min=1, max=MOST_BEAMS, help="Beam search with this many beams.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say what was decided, predicted and measured.")] = False,
    device: Device = DeviceOption.auto,
    isa: Isa = None,
    threads: Threads = None,
    strategies: Annotated[
        str | None, typer.Option(metavar="LIST", help="Permit only these of resident,streamed,cpu.")
    ] = None,
    trust_binaries: TrustBinaries = False,
    packed_cache: PackedCache = None,
    capture: Capture = False,
    as_json: Json = False,
) -> None:
    """Generate text through a plan."""
    from . import pipeline

    if not math.isfinite(temperature):
        raise FiddlerError("wrong value for --temperature", found=temperature, expected="a number, 0 or more")
    request = pipeline.execution.RunRequest(
        model_dir=model,
        prompt=_prompt(prompt),
        experts=experts,
        max_new_tokens=max_new_tokens,
        beams=beams,
        temperature=temperature,
        seed=seed,
        device=device.value,
        isa=isa,
        threads=threads,
        strategies=None if strategies is None else parse_isas(strategies),
        trust_binaries=trust_binaries,
        packed_cache=packed_cache or False,
        capture=capture,
    )
    on_text = _write_now if stream and not as_json else None
    with _progress() as progress:
        result = pipeline.run(plan, request, on_text=on_text, progress=progress, on_preflight=_print_needs)
    if as_json:
        _print_json(dataclasses.asdict(result))
        return
    print("" if stream else result.text)
    timing, calls = result.timing, result.counters["expert_calls"]
    err.print(
        f"[dim]{timing.prompt_tokens} prompt tokens, TTFT {timing.ttft_s * 1e3:.1f} ms; "
        f"{timing.new_tokens} new tokens, {timing.decode_tokens_per_s:.1f} tokens/s[/]"
    )
    err.print(f"[dim]expert calls: {_shares(calls)}[/]")
    err.print(f"[dim]kernel {result.engine['isa']}, {result.engine['threads']} threads, {result.engine['device']}[/]")
    if result.captured is not None:
        err.print("[dim]decode steps: " + ", ".join(f"{count} {how}" for how, count in result.captured.items()) + "[/]")
    if explain:
        _print_explanation(result.counters)


@app.command()
def bench(
    plan: PlanPath,
    model: ModelDir,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Real text to cut prompts from.")] = None,
    scenarios: Annotated[
        str, typer.Option(metavar="LIST", help="Which of decode,prefill,beam to measure.")
    ] = "decode,prefill,beam",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of decode and beam.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens written in decode and beam.")] = 64,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt of prefill.")] = 512,
    beams: Annotated[int, typer.Option(min=2, max=MOST_BEAMS, help="Beams of beam.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    device: Device = DeviceOption.auto,
    isa: Isa = None,
    threads: Threads = None,
    trust_binaries: TrustBinaries = False,
    packed_cache: PackedCache = None,
    capture: Capture = False,
    as_json: Json = False,
) -> None:
    """Compare a plan with transformers' own implementation, in one process."""
    from . import pipeline

    request = pipeline.execution.BenchRequest(
        model_dir=model,
        text=text,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens=prefill_tokens,
        beams=beams,
        rounds=rounds,
        scenarios=parse_isas(scenarios),
        device=device.value,
        isa=isa,
        threads=threads,
        trust_binaries=trust_binaries,
        packed_cache=packed_cache or False,
        capture=capture,
    )
    with _progress() as progress:
        result = pipeline.bench(plan, request, progress=progress, on_preflight=_print_needs)
    if as_json:
        _print_json({**dataclasses.asdict(result), "command": _command_line()})
        return
    out.print(f"{'':8} {'fiddler':>9} {'transformers':>13} {'ratio (low-high)':>18}   expert calls")
    for s in result.scenarios:
        ratio = f"{s.ratio_median:.2f} ({s.ratio_low:.2f}-{s.ratio_high:.2f})"
        rates = f"{s.ours_tokens_per_s:9.1f} {s.transformers_tokens_per_s:13.1f}"
        out.print(f"{s.name:8} {rates} {ratio:>18}   {_shares(s.expert_calls)}")
    out.print("tokens/s; " + "; ".join(f"{s.name}: {s.setting}" for s in result.scenarios))
    machine = result.machine
    out.print(
        f"{machine.cpu}, {machine.cores} cores; kernel {result.engine['isa']}, device {result.engine['device']}; "
        f"{result.rounds} interleaved rounds after a warm-up"
    )


@app.command()
def pack(
    plan: PlanPath,
    model: ModelDir,
    packed_cache: PackedCache = None,
    verify: Annotated[bool, typer.Option("--verify", help="Then read every byte and compare it.")] = False,
    threads: Threads = None,
    trust_binaries: TrustBinaries = False,
    as_json: Json = False,
) -> None:
    """Pack a model's experts ahead of time, for --packed-cache."""
    from . import pipeline

    request = pipeline.execution.PackRequest(
        model_dir=model,
        packed_cache=packed_cache or True,
        verify=verify,
        threads=threads,
        trust_binaries=trust_binaries,
    )
    with _progress() as progress:
        result = pipeline.pack(plan, request, progress=progress, on_preflight=_print_needs)
    if as_json:
        _print_json(dataclasses.asdict(result))
        return
    out.print(f"cache     {result.path}")
    out.print(f"holds     {result.experts} experts, {format_bytes(result.total_bytes)}")
    if result.written_bytes:
        out.print(f"packed    {_rate(result.written_bytes, result.pack_s)}")
    else:
        out.print("packed    nothing: all of it was there")
    if result.verify_s is not None:
        out.print(f"verified  {_rate(result.total_bytes, result.verify_s)}")


@app.command()
def predict(
    target: Annotated[str, typer.Argument(metavar="PLAN|MODEL", help="A plan, or a model's directory or name.")],
    hw: Annotated[
        str | None, typer.Option("--hw", metavar="HW", help="For a MODEL: a calibration file, or a catalogue name.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Replay which experts real text chooses.")] = None,
    gpu_memory: Annotated[
        Any, typer.Option(parser=parse_bytes, metavar="SIZE", help="For a MODEL: GPU memory to use, such as 24GiB.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(metavar="WORK", help="decode:IN/OUT, prefill:TOKENS, beam:WIDTH or all. Repeatable."),
    ] = None,
    sweep: Annotated[
        Any, typer.Option(parser=parse_sweep, metavar="RANGE", help="Such as gpu-memory=8GiB..80GiB: a bigger card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict tokens/s, ours beside the literature's."""
    from . import pipeline

    request = pipeline.PredictRequest(
        target=target,
        hardware=hw,
        trace=trace,
        gpu_memory_bytes=gpu_memory,
        workloads=tuple(workload or ["all"]),
        sweep_bytes=sweep or (),
    )
    with _progress() as progress:
        predicted = pipeline.predict(request, progress)
    header, prediction = predicted.header, predicted.prediction
    if as_json:
        _print_json(
            {
                "model": header.model.name,
                "hardware": {"name": header.hardware.name, "provenance": header.hardware.provenance},
                "workload": dataclasses.asdict(predicted.workload),
                **dataclasses.asdict(prediction),
                "sweep": [dataclasses.asdict(point) for point in predicted.sweep],
                "assumptions": list(predicted.assumptions),
            }
        )
        return
    for line in predicted.assumptions:
        err.print(f"[yellow]note:[/] {_escape(line)}")
    source = header.hardware
    out.print(
        f"{header.model.name} on {source.name} ({source.provenance}), {format_bytes(_memory(header))} for the plan"
    )
    columns = _prediction_columns(predicted.workload)
    out.print(f"{'':24}" + "".join(f"{title:>22}" for title, _ in columns) + f"{'hit rate':>10}  CPU kernels")
    for result in prediction.results:
        cells = "".join(f"{getattr(result, field):22.4g}" for _, field in columns)
        out.print(f"{result.policy:24}{cells}{result.hit_rate:10.1%}  {result.kernels}")
    if prediction.interval is not None:
        low, high = prediction.interval
        out.print(f"ours: 90 % of times are expected between {low:.2f} and {high:.2f} of the predicted ones")
    else:
        out.print(f"ours: no interval, since not measured of this model's shapes: {', '.join(prediction.unmeasured)}")
    if prediction.regimes is not None:
        slow, fast = prediction.regimes
        out.print(f"ours, by memory regime: {slow:.4g} (slow) to {fast:.4g} (fast) tokens/s in decode")
    if predicted.sweep:
        _print_sweep(predicted.sweep, columns)


def _memory(header: Any) -> int:
    return int(header.options.gpu_memory_bytes)


def _prediction_columns(workload: Any) -> list[tuple[str, str]]:
    """(title, field of PolicyResult) of the scenarios that were asked for."""
    titles = {
        "decode": (f"decode {workload.input_tokens}/{workload.output_tokens} tok/s", "decode_tokens_per_s"),
        "prefill": (f"TTFT s at {workload.prefill_tokens}", "ttft_s"),
        "beam": (f"{workload.beam_width} beams tok/s", "beam_tokens_per_s"),
    }
    return [titles[scenario] for scenario in workload.scenarios]


def _print_sweep(points: Sequence[Any], columns: Sequence[tuple[str, str]]) -> None:
    """Ours by memory; then what the most is worth against the least that fits."""
    out.print(
        f"\n{'GPU memory':>12}{'experts':>9}" + "".join(f"{title:>22}" for title, _ in columns) + f"{'hit rate':>10}"
    )
    for point in points:
        start = f"{format_bytes(point.gpu_memory_bytes):>12}{point.resident_experts:9}"
        if point.result is None:
            out.print(f"{start}  what is not an expert does not fit")
            continue
        cells = "".join(f"{getattr(point.result, field):22.4g}" for _, field in columns)
        out.print(f"{start}{cells}{point.result.hit_rate:10.1%}")
    fitting = [point for point in points if point.result is not None]
    if len(fitting) > 1:
        first, last = fitting[0], fitting[-1]
        gains = []
        for title, field in columns:
            ratio = getattr(last.result, field) / getattr(first.result, field)
            name = title.removesuffix(" tok/s").split(" s at ")[0]
            gains.append(f"{1 / ratio if field == 'ttft_s' else ratio:.2f} x in {name}")
        out.print(
            f"{format_bytes(last.gpu_memory_bytes)} instead of {format_bytes(first.gpu_memory_bytes)}, with the same "
            f"processors: {', '.join(gains)}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what is missing, and the command that mends it."""
    from . import pipeline

    checks = pipeline.doctor()
    if as_json:
        _print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            out.print(f"{check.status:8} {check.name:12} {check.detail}")
            if check.hint and check.status != "ok":
                out.print(f"{'':21} hint: {check.hint}")
    if any(check.status == "missing" for check in checks):
        raise typer.Exit(1)


def _rate(count: int, seconds: float) -> str:
    return f"{format_bytes(count)} in {seconds:.1f} s, {count / seconds / 1e9:.2f} GB/s"


def _print_needs(needs: Any) -> None:
    """What a large model needs, before it is loaded; a small one is there before anybody has read that."""
    if sum(need.bytes for need in needs.needs) + needs.mapped_bytes >= 1 << 30:
        err.print(f"[dim]{_escape(needs.model)} needs[/]")
        for line in needs.lines():
            err.print(f"[dim]{_escape(line)}[/]")


def run_command_line(arguments: Sequence[str]) -> int:
    """Runs `fiddlerc ARGUMENTS`; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", FiddlerWarning)
    # An option whose value may be left out: typer has none.
    last = [*arguments[1:], "--"]
    arguments = [
        "--packed-cache=" if here == "--packed-cache" and after.startswith("-") else here
        for here, after in zip(arguments, last, strict=False)
    ]
    try:
        status = typer.main.get_command(app).main(args=list(arguments), prog_name="fiddlerc", standalone_mode=False)
        if status == INTERRUPTED:  # typer's way of reporting Ctrl-C
            raise KeyboardInterrupt
        return int(status or 0)
    except FiddlerError as error:
        err.print(f"[red]error:[/] {_escape(error.line)}")
        if error.hint:
            err.print(f"[cyan]hint:[/] {_escape(error.hint)}")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        return INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except OSError as error:  # a full or failing disk, wherever it was noticed
        where = error.filename or f"standard output, or a temporary file in {tempfile.gettempdir()}"
        err.print(f"[red]error:[/] {_escape(f'{error.strerror or error}: {where}')}")
        err.print("[cyan]hint:[/] df -h shows which disk is full; TMPDIR=FOLDER moves temporary files")
        return 1
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        if not arguments:  # `fiddlerc` alone: the message is the help
            print(usage())
            return 2
        err.print(f"[red]error:[/] {_escape(usage().replace('Value error, ', ''))}")
        context = getattr(error, "ctx", None)
        err.print(f"[cyan]hint:[/] {context.command_path if context else 'fiddlerc'} --help")
        return 2


def _print_explanation(counters: dict[str, Any]) -> None:
    """Per phase: what ran where, and each lane's time as predicted and as measured."""
    for name, phase in counters["phases"].items():
        if not phase["layers"]:
            continue
        calls, tokens = phase["expert_calls"], phase["expert_tokens"]
        total = sum(tokens.values()) or 1
        out.print(
            f"{name}: {phase['layers']} layers; {tokens['resident'] / total:.1%} of choices found their expert resident"
        )
        for strategy, count in calls.items():
            if count:
                out.print(f"  {strategy:9} {count:8} experts {tokens[strategy]:9} tokens")
        out.print(f"  {'a layer, us':26} {'predicted':>10} {'measured':>10} {'ratio':>6}")
        _print_lanes("all", phase["lanes"] | {"slower lane": {"layers": phase["layers"], **phase["makespan"]}})
        for decision in phase["decisions"]:
            what = ", ".join(f"{count} {strategy}" for strategy, count in decision["experts"].items() if count)
            out.print(f"  {decision['layers'] / phase['layers']:.0%} of layers: {what or 'no expert'}")
            _print_lanes("", decision["lanes"])
    if counters["prefetched"]:
        out.print(f"prefetched {counters['prefetched']} experts, {counters['prefetch_used']} of them were wanted")


def _print_lanes(label: str, lanes: dict[str, Any]) -> None:
    for lane, sums in lanes.items():
        if sums["layers"]:
            predicted, actual = (sums[which] / sums["layers"] for which in ("predicted_us", "actual_us"))
            ratio = f"{actual / predicted:6.2f}" if predicted else "     -"
            out.print(f"    {label:10} {lane:13} {predicted:10.1f} {actual:10.1f} {ratio}")


def _shares(calls: dict[str, int]) -> str:
    total = sum(calls.values()) or 1
    return ", ".join(f"{name} {count} ({count / total:.0%})" for name, count in calls.items() if count)


def _prompt(option: str) -> str:
    """The prompt's text: the option, or standard input for '-'. Raises FiddlerError if that is closed, or not UTF-8."""
    if option == "-" and sys.stdin is None:
        raise FiddlerError("no prompt", found="a closed standard input", expected="text", hint="--prompt TEXT")
    data = sys.stdin.buffer.read() if option == "-" else option.encode(errors="surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FiddlerError(
            "the prompt is not text", found=str(error), expected="UTF-8", hint="iconv -t UTF-8"
        ) from None


def _write_now(text: str) -> None:
    print(text, end="", flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, default=str))


def _command_line() -> str:
    return shlex.join(["fiddlerc", *sys.argv[1:]])


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, FiddlerWarning):
        err.print(f"[yellow]warning:[/] {_escape(str(message))}")


def _told_in_lines() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def update(label: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINES_APART_S:
            last = time.monotonic()
            shown = format_bytes if label.endswith(BYTES) else str
            err.print(f"{_escape(label.removesuffix(BYTES))}: {shown(done)} of {shown(total)}", highlight=False)

    return update


@contextmanager
def _progress() -> Iterator[Any]:
    """A callback (label, done, total) that draws one bar per label on stderr, gone when finished.

    Bars of bytes show GB/s (fiddler_runtime.progress). Where stderr is no terminal, a line now and then says as much.
    """
    if not err.is_terminal:
        yield _told_in_lines()
        return
    bar = (TextColumn("{task.description}"), BarColumn())
    counting = (*bar, MofNCompleteColumn(), TimeElapsedColumn())
    sizing = (*bar, DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    options: dict[str, Any] = {"console": err, "transient": True, "auto_refresh": False}
    bars = {False: Progress(*counting, **options), True: Progress(*sizing, **options)}
    tasks: dict[str, Any] = {}
    with Live(Group(*bars.values()), console=err, transient=True):

        def update(label: str, done: int, total: int) -> None:
            shown = bars[label.endswith(BYTES)]
            if label not in tasks:
                tasks[label] = shown.add_task(label.removesuffix(BYTES), total=total)
            shown.update(tasks[label], completed=done, total=total)

        yield update
