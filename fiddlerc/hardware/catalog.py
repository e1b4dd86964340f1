"""hw.json: reading, checking and writing it, and the catalogue of machines that ships with the compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import KNOWN_ISAS
from fiddler_runtime.whole_file import write_whole

from ..ir import COPIES, Calibration, Limits, Machine, Sample, StepSample

CATALOG = Path(__file__).parent / "catalog"
SCHEMA: Literal["fiddlerc-hw/2"] = "fiddlerc-hw/2"
_MAX_BYTES = 64 << 20
_Need = Callable[[bool, str, object, str], None]
"""(holds, key, found, expected): raises unless `holds`."""
_CALIBRATE = "fiddlerc calibrate -o hw.json   (measures this machine; docs/calibration.md describes the file)"


def catalog_names() -> tuple[str, ...]:
    """Names of the machines in the catalogue, sorted."""
    return tuple(sorted(path.stem for path in CATALOG.glob("*.json")))


def load_hardware(name_or_path: str) -> Calibration:
    """Reads a hardware file: a path that exists, else a catalogue name with or without `.json`.

    Raises FiddlerError if there is neither, or if the file breaks a rule of the format.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = CATALOG / (name_or_path.removesuffix(".json") + ".json")
        if path.parent != CATALOG or not path.is_file():
            raise FiddlerError(
                f"no hardware file {name_or_path!r}",
                found="neither a file nor a name in the catalogue",
                expected="a path, or one of " + ", ".join(catalog_names()),
                hint=_CALIBRATE,
            )
    what = f"hardware file {name_or_path}"
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise FiddlerError(f"{what} is too big", found=f"{path.stat().st_size} bytes", expected=f"<= {_MAX_BYTES}")
        value = strict.load(path, what)
        version = value.get("schema") if isinstance(value, dict) else None
        if version == "fiddlerc-hw/1":
            raise FiddlerError(
                f"{what} was written by an older fiddlerc",
                found=f"schema {version}",
                expected=f"schema {SCHEMA}, which also knows the memory's regimes and the rest of a step",
            )
        calibration = strict.decode(Calibration, value, what)
        verify_calibration(calibration, what)
    except FiddlerError as error:
        raise FiddlerError(
            error.what, found=error.found, expected=error.expected, hint=error.hint or _CALIBRATE
        ) from None
    return calibration


def write_hardware(calibration: Calibration, path: Path) -> None:
    """Writes canonical JSON, all of it or nothing.

    Raises FiddlerError if the calibration breaks a rule, or the file cannot be written.
    """
    verify_calibration(calibration, f"hardware file {path}")
    try:
        write_whole(path, strict.dump(calibration))
    except OSError as error:
        raise FiddlerError(
            f"cannot write hardware file {path}",
            found=error.strerror or str(error),
            hint=f"mkdir -p {path.parent}   (or choose another file with -o)",
        ) from None


def require_name(name: str, what: str) -> None:
    """Raises FiddlerError unless it can be part of a plan's name."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise FiddlerError(f"wrong value for {what}", found=repr(name), expected="a name, without /")


def verify_calibration(calibration: Calibration, what: str) -> None:
    """Checks what the types cannot say. Raises FiddlerError naming the first value that breaks a rule."""

    def need(holds: bool, key: str, found: object, expected: str) -> None:
        if not holds:
            raise FiddlerError(f"wrong value for {what}.{key}", found=found, expected=expected)

    require_name(calibration.name, f"{what}.name")
    need(calibration.source != "", "source", "''", "where the figures come from")
    _verify_machine(calibration.machine, need)
    _verify_limits(calibration.limits, calibration.machine.accelerator.kind != "none", need)
    for index, sample in enumerate(calibration.samples):
        _verify_sample(sample, f"samples[{index}]", need)
        two = calibration.limits.cpu_slow_share > 0
        need(
            two or sample.regime == "fast", f"samples[{index}].regime", "'slow'", "'fast', as the limits know no other"
        )
    for index, step in enumerate(calibration.steps):
        _verify_step(step, f"steps[{index}]", need)
    measured = calibration.provenance == "measured"
    has_cpu = any(sample.quantity == "cpu_expert" and sample.tokens > 0 for sample in calibration.samples)
    need(not measured or has_cpu, "samples", "no cpu_expert", "samples, as its provenance is 'measured'")


def _verify_machine(machine: Machine, need: _Need) -> None:
    need(machine.cores >= 1, "machine.cores", machine.cores, "at least 1")
    need(machine.numa_nodes >= 1, "machine.numa_nodes", machine.numa_nodes, "at least 1")
    for isa in machine.isa:
        need(isa in KNOWN_ISAS, "machine.isa", repr(isa), "some of " + ", ".join(KNOWN_ISAS))
    for name in ("l1d_bytes", "l2_bytes", "l3_bytes", "memory_bytes"):
        need(getattr(machine, name) >= 0, f"machine.{name}", getattr(machine, name), "at least 0")
    accelerator = machine.accelerator
    need(
        (accelerator.memory_bytes > 0) == (accelerator.kind != "none"),
        "machine.accelerator.memory_bytes",
        accelerator.memory_bytes,
        "more than 0, or 0 if kind is 'none'",
    )


def _verify_limits(limits: Limits, has_accelerator: bool, need: _Need) -> None:
    need(limits.cpu_threads >= 1, "limits.cpu_threads", limits.cpu_threads, "at least 1")
    for name in ("cpu_read_gbps", "cpu_peak_gflops"):
        need(getattr(limits, name) > 0, f"limits.{name}", getattr(limits, name), "more than 0")
    slow, share = limits.cpu_read_slow_gbps, limits.cpu_slow_share
    need(
        0 <= share < 1, "limits.cpu_slow_share", share, "0 to 1, not 1: the fast regime is the one that there always is"
    )
    need(
        (slow > 0) == (share > 0) and slow >= 0, "limits.cpu_read_slow_gbps", slow, "more than 0 iff cpu_slow_share is"
    )
    need(slow <= limits.cpu_read_gbps, "limits.cpu_read_slow_gbps", slow, "at most cpu_read_gbps")
    for name in ("gpu_read_gbps", "gpu_peak_gflops", "host_to_device_gbps", "device_to_host_gbps"):
        value = getattr(limits, name)
        need((value > 0) == has_accelerator and value >= 0, f"limits.{name}", value, "more than 0 iff an accelerator")
    for name in ("cpu_entry_us", "gpu_entry_us"):
        need(getattr(limits, name) >= 0, f"limits.{name}", getattr(limits, name), "at least 0")


def _verify_sample(sample: Sample, key: str, need: _Need) -> None:
    shape = (sample.hidden_size, sample.intermediate_size, sample.tokens)
    if sample.quantity in COPIES:
        need(
            shape == (0, 0, 0), key, f"a shape of {shape}", "0 for hidden_size, intermediate_size and tokens of a copy"
        )
    else:
        need(min(shape) > 0, key, f"a shape of {shape}", "hidden_size, intermediate_size and tokens above 0")
    need(sample.bytes > 0, f"{key}.bytes", sample.bytes, "more than 0")
    need(sample.threads >= 1, f"{key}.threads", sample.threads, "at least 1")
    need(sample.median_us > 0, f"{key}.median_us", sample.median_us, "more than 0")
    need(sample.spread_us >= 0, f"{key}.spread_us", sample.spread_us, "at least 0")
    need(sample.repeats >= 1, f"{key}.repeats", sample.repeats, "at least 1")


def _verify_step(step: StepSample, key: str, need: _Need) -> None:
    for name in ("num_layers", "tokens", "sequences", "repeats"):
        need(getattr(step, name) >= 1, f"{key}.{name}", getattr(step, name), "at least 1")
    for name in ("non_expert_bytes", "kv_bytes_per_token", "context", "spread_us"):
        need(getattr(step, name) >= 0, f"{key}.{name}", getattr(step, name), "at least 0")
    need(step.median_us > 0, f"{key}.median_us", step.median_us, "more than 0")
