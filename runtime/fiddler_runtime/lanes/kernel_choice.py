"""Which kernels compute experts on a GPU: measured there once, for each shape, and recorded.

    $FIDDLER_CACHE (or ~/.cache/fiddlerc)/accelerator/<gpu, versions, shape>.json

`fiddlerc calibrate` and the first engine on a GPU measure; after that the record decides. On the CPU
there is nothing to choose: the simulated accelerator has the generated kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import strict
from ..build import cache_dir
from ..errors import FiddlerError, FiddlerWarning
from ..plan import ExpertForm
from ..whole_file import write_whole
from .expert import UnpackedExpert
from .resident_kernels import KERNELS, Choice, ExpertKernels, Held, Kernel, Layout
from .routing import Share

FORMAT = 1
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Of each expert. A kernel that is fastest at one of them is used up to the next."""

DEFAULT = Choice("matrix", ((0, "linear"),), "nothing to choose from on the CPU")
_CACHES = 160 << 20  # beyond the second-level caches of GPUs to date, so that weights come from memory
_REPEATS = 7
_CHECKED = (1, 40)  # tokens of the experts whose results are compared
_ALIKE = 0.98  # packed experts save the unpacking, and so win where they are nearly as fast
_WRONG = 2.0**-6  # root mean square of the error, relative; bf16 kernels are within 2^-8 of one another

Timed = Callable[[Callable[[], None]], float]
"""Microseconds that a call takes on the device."""


@dataclass(frozen=True)
class Record:
    """What was measured. times_us: kernel -> of one expert, for each of `tokens`; left_out: kernel -> why."""

    format: int
    gpu: str
    torch: str
    triton: str
    form: ExpertForm
    tokens: tuple[int, ...]
    times_us: dict[str, tuple[float, ...]]
    left_out: dict[str, str]


def choose(form: ExpertForm, device: torch.device) -> Choice:
    """The kernels for experts of that form: by the record of this GPU, which is made if there is none (seconds).

    Falls back to torch's linears, with a FiddlerWarning, where measuring fails (too little memory left, say).
    """
    if device.type != "cuda":
        return DEFAULT
    found = recorded(form, device)
    if found is not None:
        return found
    try:
        record = measure(form, device, _on_gpu(device), _empty(form, device))
    except RuntimeError as error:  # too little memory is one, too
        warnings.warn(
            f"the GPU's kernels could not be measured ({str(error).splitlines()[0]}): torch's linears are used",
            FiddlerWarning,
            stacklevel=3,
        )
        return dataclasses.replace(DEFAULT, reason="measuring failed")
    finally:
        torch.cuda.empty_cache()
    _write(_path(record), record)
    return _decided(record)


def recorded(form: ExpertForm, device: torch.device) -> Choice | None:
    """What was chosen there before; None if nothing was."""
    if device.type != "cuda":
        return None
    empty = _empty(form, device)
    record = _read(_path(empty), empty)
    return None if record is None else _decided(record)


def _decided(record: Record) -> Choice:
    return decide(record.times_us, f"measured on {record.gpu}", record.tokens)


def _path(record: Record) -> Path:
    key = dataclasses.replace(record, tokens=(), times_us={}, left_out={})
    return cache_dir() / "accelerator" / f"{hashlib.sha256(strict.dump(key)).hexdigest()[:24]}.json"


def measure(form: ExpertForm, device: torch.device, timed: Timed, empty: Record) -> Record:
    """Times every kernel that runs there and computes what torch's linears do; the others are left out by name."""
    count = 1 + _CACHES // form.bytes
    generator = torch.Generator(device).manual_seed(0)
    experts = {expert: UnpackedExpert.empty(form, device) for expert in range(count)}
    for expert in experts.values():
        for part in (*expert.matrices, *expert.biases):
            part.normal_(0.0, float(part.shape[-1]) ** -0.5, generator=generator)
    times: dict[str, tuple[float, ...]] = {}
    left_out: dict[str, str] = {}
    expected: list[torch.Tensor] = []
    layouts: tuple[Layout, ...] = ("matrix", "packed")  # packed last: it takes the matrices away
    for layout in layouts:
        members = [kernel for kernel in KERNELS.values() if kernel.layout == layout]
        reasons = {kernel.name: kernel.missing(form, device) for kernel in members}
        left_out |= {name: reason for name, reason in reasons.items() if reason is not None}
        usable = [kernel for kernel in members if reasons[kernel.name] is None]
        choice = Choice(layout, tuple((0, kernel.name) for kernel in usable), "being measured")
        held = ExpertKernels(form, device, choice).hold(experts)
        expected = expected or [_Call(KERNELS["linear"], held, count, n, device).result() for n in _CHECKED]
        for kernel in usable:
            try:
                for tokens, right in zip(_CHECKED, expected, strict=True):
                    error = _distance(_Call(kernel, held, count, tokens, device).result(), right)
                    if not error <= _WRONG:
                        raise ValueError(
                            f"its results for {tokens} tokens are {error:.2g} from those of torch's linears"
                        )
                times[kernel.name] = tuple(
                    round(_Call(kernel, held, count, tokens, device).us(timed) / count, 3) for tokens in TOKENS
                )
            except torch.OutOfMemoryError:
                raise  # says nothing about the kernel
            except Exception as failed:  # a compiler's or a driver's own: whatever it is, the kernel is not used
                left_out[kernel.name] = f"{type(failed).__name__}: {(str(failed).splitlines() or [''])[0]}"
    return dataclasses.replace(empty, tokens=TOKENS, times_us=times, left_out=left_out)


def decide(times_us: Mapping[str, Sequence[float]], reason: str, tokens: Sequence[int] = TOKENS) -> Choice:
    """The layout whose best kernels have the smallest geometric mean over all numbers of tokens, and those kernels.

    Packed experts need no unpacking after their copy: that layout is taken where it is as fast within 2 %.
    """

    def best(layout: Layout) -> tuple[float, tuple[tuple[int, str], ...]]:
        names = [name for name in times_us if KERNELS[name].layout == layout]
        if not names:
            return math.inf, ()
        chosen = [min(names, key=lambda name: times_us[name][at]) for at in range(len(tokens))]
        mean = statistics.fmean(math.log(times_us[name][at]) for at, name in enumerate(chosen))
        steps = [(0, chosen[0])]
        steps += [(n, name) for n, name, before in zip(tokens[1:], chosen[1:], chosen, strict=False) if name != before]
        return mean, tuple(steps)

    matrix, packed = best("matrix"), best("packed")
    if packed[0] + math.log(_ALIKE) <= matrix[0] and packed[1]:
        return Choice("packed", packed[1], reason)
    return Choice("matrix", matrix[1], reason)


class _Call:
    """One kernel on all held experts, each with as many tokens."""

    def __init__(self, kernel: Kernel, held: Held, count: int, tokens: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self._hidden = torch.randn(tokens, held.form.hidden_size, generator=generator).bfloat16().to(device)
        self._rows = torch.arange(tokens, device=device).repeat(count)
        self._weights = torch.rand(tokens * count, generator=generator).to(device)
        self._shares = [Share(expert, expert * tokens, (expert + 1) * tokens) for expert in range(count)]
        self._out = torch.zeros(self._hidden.shape, device=device)
        self._kernel, self._held = kernel, held

    def __call__(self) -> None:
        self._kernel.run(self._hidden, self._rows, self._weights, self._held, self._shares, self._out)

    def result(self) -> torch.Tensor:
        """fp32 [tokens, H]."""
        self()
        return self._out

    def us(self, timed: Timed) -> float:
        """The median of some calls, after one in which it is compiled and finds its memory."""
        self()
        return statistics.median(timed(self) for _ in range(_REPEATS))


def _on_gpu(device: torch.device) -> Timed:
    def timed(call: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end))

    return timed


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _empty(form: ExpertForm, device: torch.device) -> Record:
    """A record's key: what the times depend on."""
    gpu = f"{torch.cuda.get_device_name(device)}, {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return Record(FORMAT, gpu, torch.__version__, triton, form, (), {}, {})


def _read(path: Path, empty: Record) -> Record | None:
    """The record of that key; None if there is none, or none that can be used: it is measured again then."""
    try:
        record = strict.decode(Record, strict.load(path, "the record of the GPU's kernels"), str(path))
    except FiddlerError:
        return None
    same = dataclasses.replace(record, tokens=(), times_us={}, left_out={}) == empty
    whole = all(name in KERNELS and len(times) == len(record.tokens) for name, times in record.times_us.items())
    return record if same and whole and "linear" in record.times_us and min(record.tokens, default=0) > 0 else None


def _write(path: Path, record: Record) -> None:
    """Whole or not at all. A cache that cannot be written costs the next start a measurement, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, strict.dump(record))
