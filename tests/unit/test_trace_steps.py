"""Steps to replay: what they are made of, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from plan_samples import sample_model

from fiddlerc.ir import Options, Trace
from fiddlerc.trace import sample_steps

SPEC = sample_model(num_experts=8, top_k=2)
OPTIONS = Options("balanced", 256, 4, 0)
UNIFORM = np.full((2, 8), 1 / 8)


def made_up(sequences: int, length: int, prompt: int) -> Trace:
    """Every sequence: `prompt` tokens of prefill, then decoded ones; experts at random."""
    rng = np.random.default_rng(3)
    tokens = sequences * length
    experts = rng.permuted(np.tile(np.arange(8), (tokens, 2, 1)), axis=2)[:, :, :2].astype(np.uint16)
    sequence, position = np.divmod(np.arange(tokens, dtype=np.int32), length)
    phase = (position >= prompt).astype(np.uint8)
    counts = np.zeros((2, 2, 8), np.int64)
    for layer in range(2):
        for part in (0, 1):
            counts[part, layer] = np.bincount(experts[phase == part, layer].reshape(-1), minlength=8)
    return Trace(SPEC.fingerprint, "sample", "made up", counts, experts, sequence, position, phase)


def test_decode_steps_are_the_decoded_tokens_in_order() -> None:
    trace = made_up(8, 40, 16)
    steps = sample_steps(trace, UNIFORM, SPEC, OPTIONS)["decode"]
    assert trace.experts is not None and trace.phase is not None and trace.position is not None
    decoded = np.flatnonzero(trace.phase == 1)
    assert len(steps.tokens) == len(decoded)
    for step, row in enumerate(decoded):
        for layer in range(2):
            expected = np.bincount(trace.experts[row, layer], minlength=8)
            np.testing.assert_array_equal(steps.counts[step, layer], expected)
    np.testing.assert_array_equal(steps.kv, trace.position[decoded])
    assert (steps.tokens == 1).all()


@pytest.mark.parametrize("trace", [None, made_up(8, 40, 16), made_up(1, 400, 40)], ids=["none", "eight", "one"])
def test_every_choice_is_counted_and_some_steps_are_held_out(trace: Trace | None) -> None:
    steps = sample_steps(trace, UNIFORM, SPEC, OPTIONS)
    assert list(steps) == ["decode", "prefill", "beam"]
    for scenario, part in steps.items():
        assert part.scenario == scenario
        np.testing.assert_array_equal(part.counts.sum(axis=2), 2 * np.repeat(part.tokens[:, None], 2, axis=1))
        # The last quarter of the sequences, whole ones; of the only one, its last quarter.
        assert part.heldout.tolist() == sorted(part.heldout)
        assert part.heldout.sum() == len(part.tokens) // 4
    assert set(steps["prefill"].tokens.tolist()) <= {32, 128, 256}
    assert (steps["beam"].tokens == 4).all()


def test_drawn_tokens_follow_the_popularity_and_are_the_same_every_time() -> None:
    shares = np.array([[8, 4, 2, 1, 1, 1, 1, 1.0]] * 2)
    shares /= shares.sum(axis=1, keepdims=True)
    first, again = (sample_steps(None, shares, SPEC, OPTIONS)["prefill"] for _ in range(2))
    np.testing.assert_array_equal(first.counts, again.counts)
    chosen = first.counts.sum(axis=0)
    assert (chosen.max(axis=1) <= first.tokens.sum()).all(), "drawn without replacement"
    assert (np.diff(chosen[:, :4], axis=1) < 0).all()


def test_counts_alone_are_drawn_from_too() -> None:
    trace = made_up(8, 40, 16)
    counts = Trace(trace.model_fingerprint, "sample", "made up", trace.counts, None, None, None, None)
    assert len(sample_steps(counts, UNIFORM, SPEC, OPTIONS)["decode"].tokens) >= 256
