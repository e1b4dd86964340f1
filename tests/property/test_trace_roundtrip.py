"""What is written is read, the same trace gives the same bytes, and statistics stay shares."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler_runtime.plan import ExpertTensors, ModelSpec
from fiddlerc.ir import Trace
from fiddlerc.trace import popularity, read_trace, write_trace
from fiddlerc.trace.check import count


@st.composite
def traces(draw: st.DrawFn) -> tuple[ModelSpec, Trace]:
    """A model of any small shape, and a trace of it, with tokens or with counts only."""
    experts = draw(st.integers(1, 300))
    top_k = draw(st.integers(1, min(experts, 8)))
    layers = draw(st.integers(1, 4))
    tokens = draw(st.integers(0, 12))
    spec = ModelSpec(
        name=draw(st.text(max_size=12)),
        architecture="MixtralForCausalLM",
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        hidden_size=8,
        intermediate_size=8,
        activation="silu",
        expert_bias=False,
        vocab_size=8,
        max_context=64,
        expert_tensors=ExpertTensors("g", "u", "d"),
        identity={},
        non_expert_bytes=1,
        kv_bytes_per_token=1,
        workspace_bytes_per_token=1,
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens * layers)], np.uint16)
    ids = ids.reshape(tokens, layers, top_k)
    phase = rng.integers(0, 2, tokens, np.uint8)
    whole = draw(st.booleans())
    return spec, Trace(
        model_fingerprint=spec.fingerprint,
        model_name=spec.name,
        source=draw(st.text(max_size=20)),
        counts=count(ids, phase, experts),
        experts=ids if whole else None,
        sequence=rng.integers(0, 2**31 - 1, tokens, np.int32) if whole else None,
        position=rng.integers(0, 2**31 - 1, tokens, np.int32) if whole else None,
        phase=phase if whole else None,
    )


@settings(max_examples=60, deadline=None)
@given(traces())
def test_write_then_read(case: tuple[ModelSpec, Trace]) -> None:
    spec, trace = case
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("a", "b")]
        for path in paths:
            write_trace(trace, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        read = read_trace(paths[0], spec)
    assert (read.model_fingerprint, read.model_name, read.source) == (
        trace.model_fingerprint,
        trace.model_name,
        trace.source,
    )
    for name in ("counts", "experts", "sequence", "position", "phase"):
        before, after = getattr(trace, name), getattr(read, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)


@settings(max_examples=60, deadline=None)
@given(traces())
def test_shares(case: tuple[ModelSpec, Trace]) -> None:
    spec, trace = case
    for objective in ("decode", "prefill", "beam", "balanced"):
        shares = popularity(trace, spec, objective)  # type: ignore[arg-type]
        assert np.allclose(shares.sum(axis=1), 1)
        assert (shares > 0).all()
