"""Renders the templates. The text is a function of the experts' form, the instruction sets and the machine: its caches,
what of AVX-512 and AMX it has, and whose CPU it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import KNOWN_ISAS

from ..ir import Activation, Blocking, ExpertForm, KernelSources, KernelSpec, KernelVariant, Machine
from .names import format_name, format_symbol
from .selection import TILE_UNIT_TOKENS, UNIT_TOKENS, last_tokens, select
from .targets import TARGETS, Target, target_on

_LARGEST = 1 << 20
_VERBATIM = ("exports.map",)


def generate(
    hidden_size: int,
    intermediate_size: int,
    isas: Sequence[str] | None = None,
    *,
    activation: Activation = "silu",
    bias: bool = False,
    machine: Machine | None = None,
    blockings: Mapping[str, Blocking] | None = None,
) -> KernelSources:
    """The sources of the kernel library of one form of experts: C++, its headers, CMakeLists.txt.

    isas  instruction sets to include, of KNOWN_ISAS; None is all of them. Only with "scalar" among them does the
          library run everywhere.
    machine  whose caches the kernels are cut for (selection.py) and whose reads they suit (target_on); None takes
             typical caches, and for each instruction set CPUs that have no more than it
    blockings  by instruction set, in place of the cost model's choice
    Raises FiddlerError for sizes outside 1 .. 2^20 and for unknown instruction sets.
    """
    for what, size in (("hidden size", hidden_size), ("intermediate size", intermediate_size)):
        if not 1 <= size <= _LARGEST:
            raise FiddlerError(f"cannot generate kernels for this {what}", found=size, expected=f"1 to {_LARGEST}")
    targets = [target_on(isa, machine) for isa in _wanted(isas)]
    expert = ExpertForm(hidden_size, intermediate_size, activation, bias)
    spec = KernelSpec(
        name=format_name(expert),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=activation,
        bias=bias,
        variants=tuple(_variant(target, expert, machine, blockings or {}) for target in targets),
        tuning=None,
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_templates()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    variants = [
        {
            "isa": variant.isa,
            "symbol": variant.symbol,
            "check": target.check,
            "element_bytes": target.element_bytes,
            "tiles_from": target.tiles_from,
            "flags": target.flags,
        }
        for target, variant in zip(targets, spec.variants, strict=True)
    ]
    files = {
        "shape.hpp": environment.get_template("shape.hpp.j2").render(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
            bias=bias,
            unit_tokens=UNIT_TOKENS,
            tile_unit_tokens=TILE_UNIT_TOKENS,
        ),
        "library.cpp": environment.get_template("library.cpp.j2").render(
            name=spec.name, variants=variants, description=_description(spec)
        ),
        "CMakeLists.txt": environment.get_template("CMakeLists.txt.j2").render(name=spec.name, variants=variants),
    }
    kernel = environment.get_template("kernel.cpp.j2")
    for target, variant in zip(targets, spec.variants, strict=True):
        files[f"{variant.symbol}.cpp"] = kernel.render(
            symbol=variant.symbol,
            flags=" ".join(target.flags),
            header=target.header,
            policy=target.policy,
            functions=target.functions,
            tiles_from=target.tiles_from,
            last_tokens=last_tokens(target, variant.blocking),
            places=target.core.places,
            fetch_level=target.core.fetch_level,
            blocking=variant.blocking,
        )
    files.update(_headers(targets))
    return KernelSources(spec=spec, files=dict(sorted(files.items())))


def _wanted(isas: Sequence[str] | None) -> tuple[str, ...]:
    """The instruction sets to generate, in the order in which the library prefers them."""
    if isas is None:
        return KNOWN_ISAS
    for isa in isas:
        if isa not in TARGETS:
            raise FiddlerError(
                "unknown instruction set",
                found=repr(isa),
                expected="one of " + ", ".join(KNOWN_ISAS),
                hint="fiddlerc doctor   (lists what this machine has)",
            )
    if not isas:
        raise FiddlerError(
            "no instruction set to generate kernels for",
            found="an empty list",
            expected="one or more of " + ", ".join(KNOWN_ISAS),
            hint="--isa " + ",".join(KNOWN_ISAS),
        )
    return tuple(isa for isa in KNOWN_ISAS if isa in isas)


def _variant(
    target: Target, expert: ExpertForm, machine: Machine | None, blockings: Mapping[str, Blocking]
) -> KernelVariant:
    selection = select(target, expert, machine)
    blocking = blockings.get(target.isa, selection.blocking)
    symbol = format_symbol(expert, blocking.tile_tokens, blocking.tile_vectors, target.isa)
    return KernelVariant(target.isa, symbol, blocking, selection.reasons)


def _description(spec: KernelSpec) -> str:
    """What fdl_describe() answers."""
    return json.dumps(
        {
            "name": spec.name,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "activation": spec.activation,
            "bias": spec.bias,
            "isas": [variant.isa for variant in spec.variants],
            "symbols": [variant.symbol for variant in spec.variants],
        }
    )


def _headers(targets: Sequence[Target]) -> dict[str, str]:
    """The headers as they are, without those of instruction sets that are not generated."""
    unused = _own_headers(TARGETS.values()) - _own_headers(targets)
    folder = _templates() / "include" / "fiddler"
    files = {
        f"include/fiddler/{path.name}": path.read_text(encoding="utf-8")
        for path in sorted(folder.iterdir())
        if path.suffix in (".h", ".hpp") and path.name not in unused
    }
    files.update({name: (_templates() / name).read_text(encoding="utf-8") for name in _VERBATIM})
    return files


def _own_headers(targets: Iterable[Target]) -> set[str]:
    return {header for target in targets for header in (target.header, *target.includes)}


def _templates() -> Path:
    """The templates folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "kernel.cpp.j2").is_file():
            return folder
    raise FiddlerError(
        "the C++ templates are missing",
        found=f"no templates folder in or beside {package}",
        expected="a complete installation of fiddlerc",
        hint="pip install --force-reinstall fiddlerc",
    )
