"""Published expert counts: how often each expert was chosen, and nothing about when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError, hinted
from fiddlerc.ir import ModelSpec, Trace

from .check import PREFILL, check


@dataclass(frozen=True)
class _Counts:
    """The file: which model, on which text, of how many tokens; counts[layer][expert]."""

    model: str
    text: str
    tokens: int
    counts: tuple[tuple[int, ...], ...]


_FORM = '{"model": "…", "text": "…", "tokens": 1000, "counts": [[…], …]}, a row of one count per expert for every layer'


@hinted(f"give a file of the form {_FORM}")
def from_counts(path: Path, spec: ModelSpec) -> Trace:
    """Imports counts as a trace without tokens.

    Such counts come from running a text through the model in one pass, so they are kept as prefill; statistics know
    that a trace without tokens does not tell phases apart. Every layer must have as many choices as the others, a
    multiple of top_k; how that relates to `tokens` is the publisher's matter (Fiddler's files count more choices than
    tokens x top_k), so it is not checked. Raises FiddlerError for a file of another form or of another model's shape.
    """
    what = f"the counts {path}"
    value = strict.decode(_Counts, strict.load(path, what), what)
    widths = {len(row) for row in value.counts}
    if len(value.counts) != len(spec.moe_layers) or widths != {spec.num_experts}:
        raise FiddlerError(
            f"{what} are of another model",
            found=f"{len(value.counts)} layers of {' or '.join(map(str, sorted(widths))) or 'no'} experts",
            expected=f"{len(spec.moe_layers)} layers of {spec.num_experts} experts, as {spec.name} has",
            hint="fiddlerc trace THEIR_MODEL --from-counts JSON -o FILE",
        )
    if value.tokens < 1:
        raise FiddlerError(f"{what} are not valid", found=f"tokens = {value.tokens}", expected="at least 1")
    counts = np.zeros((2, len(spec.moe_layers), spec.num_experts), np.int64)
    counts[PREFILL] = value.counts
    if (counts < 0).any():
        raise FiddlerError(f"{what} are not valid", found=f"a count of {counts.min()}", expected="counts from 0")
    sums = [sum(row) for row in value.counts]
    if sums[0] == 0 or sums[0] % spec.top_k or len(set(sums)) != 1:
        odd = next((layer for layer, total in enumerate(sums) if total != sums[0]), 0)
        raise FiddlerError(
            f"{what} are not valid",
            found=f"{sums[odd]} choices in layer {odd}" + (f" and {sums[0]} in layer 0" if odd else ""),
            expected=f"equally many in every layer, a multiple of top_k = {spec.top_k}",
        )
    trace = Trace(
        model_fingerprint=spec.fingerprint,
        model_name=spec.name,
        source=f"{value.text}, counts of {value.model}",
        counts=counts,
        experts=None,
        sequence=None,
        position=None,
        phase=None,
    )
    check(trace, spec, what)
    return trace
