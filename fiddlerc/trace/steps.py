"""Steps to replay: which experts the tokens of a decode step, a prompt and a beam step chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fiddlerc.ir import ModelSpec, Options, Scenario, Steps, Trace

from .check import DECODE

DECODE_STEPS, BEAM_STEPS = 4096, 512
STEPS_OF_A_SEQUENCE = 256
"""Consecutive decode steps taken of one sequence, so that several sequences are among the steps."""

PROMPT_TOKENS = (32, 128, 512)
PROMPTS = 12
DEFAULT_BEAMS = 4
HELDOUT = 0.25
"""Share of the sequences that nothing is fitted to: the last ones."""

_DRAWN_SEQUENCES, _DRAWN_TOKENS = 24, 512
_Rows = npt.NDArray[np.int64]


def sample_steps(
    trace: Trace | None, popularity: npt.NDArray[np.float64], spec: ModelSpec, options: Options
) -> dict[Scenario, Steps]:
    """Steps of every scenario, the same for the same arguments.

    decode   one token a step, up to 256 consecutive ones of a sequence, 4,096 in all; decoded ones if there are any
    prefill  prompts of 32, 128 and 512 consecutive tokens, at most options.context, 12 in all
    beam     options.batch tokens a step (4 if that is 1), consecutive ones of a sequence: beams that share most of
             their history choose much like neighbours

    The last quarter of the sequences is held out. Without a trace, or where it has counts only, tokens are drawn from
    `popularity` [layers, experts]: each expert of a layer independently of the other layers and tokens.
    """
    experts, sequence, position, phase = _tokens(trace, popularity, spec)
    starts = np.flatnonzero(np.diff(sequence, prepend=sequence[0] - 1))
    rows = [part.astype(np.int64) for part in np.split(np.arange(len(sequence)), starts[1:])]
    fitted = len(rows) - max(1, round(HELDOUT * len(rows))) if len(rows) > 1 else 1

    decoded = [part[phase[part] == DECODE] for part in rows]
    if not any(part.size for part in decoded):
        decoded = rows
    longest = max(part.size for part in decoded)
    beams = min(options.batch if options.batch > 1 else DEFAULT_BEAMS, longest)
    lengths = [min(tokens, options.context) for tokens in PROMPT_TOKENS]
    groups = {
        "decode": _turns([_cut(part[:STEPS_OF_A_SEQUENCE], 1) for part in decoded], DECODE_STEPS),
        "prefill": _prompts(rows, lengths),
        "beam": _turns([_cut(part[: STEPS_OF_A_SEQUENCE * beams], beams) for part in decoded], BEAM_STEPS),
    }
    return {
        scenario: _steps(scenario, groups[scenario], experts, position, spec.num_experts, fitted)
        for scenario in ("decode", "prefill", "beam")
    }


def _tokens(
    trace: Trace | None, popularity: npt.NDArray[np.float64], spec: ModelSpec
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], npt.NDArray[np.integer], npt.NDArray[np.uint8]]:
    """experts [tokens, layers, top_k], and sequence, position, phase [tokens] of a trace, or drawn."""
    if trace is not None and trace.experts is not None:
        assert trace.sequence is not None and trace.position is not None and trace.phase is not None
        order = np.argsort(trace.sequence, kind="stable")
        return trace.experts[order], trace.sequence[order], trace.position[order], trace.phase[order]
    rng = np.random.Generator(np.random.PCG64(0))
    tokens = _DRAWN_SEQUENCES * _DRAWN_TOKENS
    experts = np.empty((tokens, len(spec.moe_layers), spec.top_k), np.int16)
    for layer, shares in enumerate(popularity):
        # Gumbel's trick: the largest of log(share) + noise are a draw without replacement.
        noisy = np.log(np.maximum(shares, 1e-12)) + rng.gumbel(size=(tokens, spec.num_experts))
        experts[:, layer] = np.argsort(-noisy, axis=1)[:, : spec.top_k]
    sequence, position = np.divmod(np.arange(tokens), _DRAWN_TOKENS)
    return experts, sequence, position, np.full(tokens, DECODE, np.uint8)


_Group = tuple[int, _Rows]  # number of the sequence among all, rows of the step


def _cut(rows: _Rows, size: int) -> list[_Rows]:
    return [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]


def _turns(parts: Sequence[list[_Rows]], most: int) -> list[_Group]:
    """Whole sequences, evenly over all of them, until there are `most` steps."""
    longest = max((len(part) for part in parts), default=0)
    wanted = max(1, -(-most // max(1, longest)))
    chosen = np.unique(np.linspace(0, len(parts) - 1, min(len(parts), wanted)).round().astype(int))
    return [(int(index), rows) for index in chosen for rows in parts[index]]


def _prompts(parts: Sequence[_Rows], lengths: Sequence[int]) -> list[_Group]:
    """Prompts of every length in turn, from sequences spread over all; what is short goes on with the next sequence."""
    chosen = np.linspace(0, len(parts) - 1, PROMPTS).round().astype(int)
    groups = []
    for number, index in enumerate(chosen.tolist()):
        text = np.concatenate([*parts[index:], *parts[:index]])
        groups.append((index, text[: lengths[number % len(lengths)]]))
    return groups


def _steps(
    scenario: Scenario,
    groups: Sequence[_Group],
    experts: npt.NDArray[np.integer],
    position: npt.NDArray[np.integer],
    num_experts: int,
    fitted: int,
) -> Steps:
    layers = experts.shape[1]
    counts = np.zeros((len(groups), layers, num_experts), np.int32)
    for step, (_, rows) in enumerate(groups):
        for layer in range(layers):
            counts[step, layer] = np.bincount(experts[rows, layer].reshape(-1).astype(np.int64), minlength=num_experts)
    heldout = np.array([index >= fitted for index, _ in groups])
    if not heldout.any() or heldout.all():  # one sequence only: its last quarter
        heldout = np.arange(len(groups)) >= (1 - HELDOUT) * len(groups)
    # A prompt starts with nothing in the cache; every row of another step attends to all before it.
    kv = [0 if scenario == "prefill" else int(position[rows].sum()) for _, rows in groups]
    return Steps(
        scenario=scenario,
        counts=counts,
        tokens=np.array([len(rows) for _, rows in groups], np.int32),
        kv=np.array(kv, np.int32),
        heldout=heldout,
    )
