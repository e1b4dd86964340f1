"""What is predicted: so many tokens in and out, a prompt, a beam search; and the steps that it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fiddler_runtime.errors import FiddlerError

from ..ir import ModelSpec, Scenario, Steps

BEAM_INPUT, BEAM_OUTPUT = 32, 64

MOST_COUNTS = 1 << 26
"""Of steps x layers x experts: a quarter of a gigabyte, and several times that while they are replayed."""


@dataclass(frozen=True)
class Workload:
    """One of each scenario. scenarios: those that were asked for.

    decode   input_tokens in, output_tokens out, one sequence
    prefill  a prompt of prefill_tokens
    beam     beam_width beams; 32 tokens in, 64 out
    """

    input_tokens: int = 32
    output_tokens: int = 128
    prefill_tokens: int = 512
    beam_width: int = 4
    scenarios: tuple[Scenario, ...] = ("decode", "prefill", "beam")


def default_workload(spec: ModelSpec) -> Workload:
    """32 in and 128 out, a prompt of 512, 4 beams: or less, where the model's context is shorter."""
    half = max(1, spec.max_context // 2)
    return Workload(min(32, half), min(128, half), min(512, spec.max_context))


def parse_workload(texts: Sequence[str], spec: ModelSpec) -> Workload:
    """'decode:IN/OUT', 'prefill:TOKENS', 'beam:WIDTH', or 'all' for the default of each.

    Raises FiddlerError for other words, two of a kind, zeros, what is longer than the model's context, and more steps
    than can be replayed.
    """
    workload, asked = default_workload(spec), list[Scenario]()
    steps = MOST_COUNTS // (len(spec.moe_layers) * spec.num_experts)
    kinds = set[str]()
    for text in texts:
        kind, numbers = _parse(text)
        if kind in kinds - {"all"}:
            raise FiddlerError(
                "a workload of one kind twice",
                found=" and ".join(t for t in texts if t.startswith(kind)),
                expected=f"one --workload {kind}:...",
                hint="run fiddlerc predict once for each",
            )
        kinds.add(kind)
        if kind == "all":
            asked += ["decode", "prefill", "beam"]
        elif kind == "decode":
            asked.append("decode")
            given, written = numbers
            _at_most(spec.max_context, sum(numbers), text, f"tokens, {spec.name}'s context", "decode:32/128")
            _at_most(steps, written, text, "steps that can be replayed", f"decode:{given}/{steps}")
            workload = replace(workload, input_tokens=given, output_tokens=written)
        elif kind == "prefill":
            asked.append("prefill")
            limit = spec.max_context
            _at_most(limit, numbers[0], text, f"tokens, {spec.name}'s context", f"prefill:{limit}")
            workload = replace(workload, prefill_tokens=numbers[0])
        else:
            asked.append("beam")
            limit = steps // BEAM_OUTPUT
            _at_most(limit, numbers[0], text, "beams that can be replayed", f"beam:{limit}")
            workload = replace(workload, beam_width=numbers[0])
    order: tuple[Scenario, ...] = ("decode", "prefill", "beam")
    return replace(workload, scenarios=tuple(s for s in order if s in asked) or order)


def _parse(text: str) -> tuple[str, tuple[int, ...]]:
    """'decode:32/128' -> ('decode', (32, 128)), and alike."""
    found = re.fullmatch(r"(all)|(decode):(\d{1,15})/(\d{1,15})|(prefill|beam):(\d{1,15})", text)
    parts = [part for part in found.groups() if part is not None] if found is not None else [""]
    numbers = tuple(int(part) for part in parts[1:])
    if found is None or 0 in numbers:
        raise FiddlerError(
            "no such workload",
            found=text,
            expected="decode:IN/OUT, prefill:TOKENS, beam:WIDTH or all",
            hint="--workload decode:32/128",
        )
    return parts[0], numbers


def _at_most(limit: int, number: int, text: str, what: str, instead: str) -> None:
    if number > limit:
        raise FiddlerError(
            "the workload is too long", found=text, expected=f"at most {limit} {what}", hint=f"--workload {instead}"
        )


def heldout(steps: Steps) -> Steps:
    """The steps that placement was not fitted to; all, if none was held out."""
    chosen = steps.heldout if steps.heldout.any() else np.ones(len(steps.tokens), np.bool_)
    return replace(
        steps,
        counts=steps.counts[chosen],
        tokens=steps.tokens[chosen],
        kv=steps.kv[chosen],
        heldout=steps.heldout[chosen],
    )


def decode_steps(tokens: Steps, input_tokens: int, output_tokens: int) -> Steps:
    """One token a step, from the sampled ones in their order, around again if they are too few."""
    chosen = np.arange(output_tokens) % len(tokens.tokens)
    ones, context = np.ones(output_tokens), input_tokens + np.arange(output_tokens)
    return _steps("decode", tokens.counts[chosen], ones, context)


def beam_steps(tokens: Steps, width: int, together: bool) -> Steps:
    """`width` neighbouring tokens a step, other ones each step; or as many steps of one token each."""
    chosen = np.arange(BEAM_OUTPUT * width).reshape(BEAM_OUTPUT, width) % len(tokens.tokens)
    context = BEAM_INPUT + np.arange(BEAM_OUTPUT)
    if not together:
        flat = chosen.ravel()
        return _steps("beam", tokens.counts[flat], np.ones(len(flat)), np.repeat(context, width))
    counts = tokens.counts[chosen].sum(axis=1, dtype=np.int32)
    return _steps("beam", counts, np.full(BEAM_OUTPUT, width), width * context)


def prompt_steps(sampled: dict[Scenario, Steps], length: int, chunk_tokens: int) -> Steps:
    """A prompt of `length` tokens, in parts of at most chunk_tokens (0: in one).

    Sampled prompts, the longest first, are put one after another, and single sampled tokens fill what is left.
    """
    chunk = min(chunk_tokens or length, length)
    sizes = [min(chunk, length - at) for at in range(0, length, chunk)]
    prompts, tokens = sampled["prefill"], sampled["decode"]
    # Stable: prompts of one length keep their order, so that every part begins with another text.
    order = np.argsort(-prompts.tokens, kind="stable").tolist()
    parts, at = [], 0
    for size in sizes:
        counts, left = np.zeros(prompts.counts.shape[1:], np.int32), size
        while fitting := [p for p in order if prompts.tokens[p] <= left]:
            longest = [p for p in fitting if prompts.tokens[p] == prompts.tokens[fitting[0]]]
            chosen = longest[at % len(longest)]
            counts, left, at = counts + prompts.counts[chosen], left - int(prompts.tokens[chosen]), at + 1
        fill = (at + np.arange(left)) % len(tokens.tokens)
        parts.append(counts + tokens.counts[fill].sum(axis=0, dtype=np.int32))
    return _steps("prefill", np.stack(parts), np.array(sizes), np.cumsum([0, *sizes[:-1]]))


def _steps(
    scenario: Scenario,
    counts: npt.NDArray[np.int32],
    tokens: npt.NDArray[np.generic],
    kv: npt.NDArray[np.integer],
) -> Steps:
    return Steps(
        scenario=scenario,
        counts=counts,
        tokens=tokens.astype(np.int32),
        kv=kv.astype(np.int32),
        heldout=np.zeros(len(counts), np.bool_),
    )
