"""Popularity against counting by hand, and the published counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import TINY_MIXTRAL

from fiddler_runtime.errors import FiddlerError
from fiddlerc.frontend import load_model
from fiddlerc.ir import ModelSpec, Trace
from fiddlerc.trace import from_counts, popularity, read_trace, write_trace
from fiddlerc.trace.check import count

OBJECTIVES: tuple[Any, ...] = ("decode", "prefill", "beam", "balanced")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """6 layers, 8 experts, top-2."""
    return load_model(str(TINY_MIXTRAL))


def random_trace(spec: ModelSpec, tokens: int, seed: int = 0) -> Trace:
    """Distinct experts per token and layer, skewed, with some experts never chosen."""
    rng = np.random.default_rng(seed)
    weights = np.array([8, 5, 3, 2, 1, 1, 1, 0][: spec.num_experts], float)
    shape = (tokens, len(spec.moe_layers))
    experts = np.array(
        [rng.choice(spec.num_experts, spec.top_k, False, weights / weights.sum()) for _ in range(shape[0] * shape[1])]
    )
    ids = experts.reshape(*shape, spec.top_k).astype(np.uint16)
    phase = (np.arange(tokens) % 3 > 0).astype(np.uint8)
    return Trace(
        model_fingerprint=spec.fingerprint,
        model_name=spec.name,
        source="random",
        counts=count(ids, phase, spec.num_experts),
        experts=ids,
        sequence=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        phase=phase,
    )


def test_popularity_by_hand(spec: ModelSpec) -> None:
    trace = random_trace(spec, 60)
    assert trace.experts is not None
    assert trace.phase is not None
    for objective, phases in (("decode", {1}), ("prefill", {0}), ("beam", {0, 1}), ("balanced", {0, 1})):
        found = popularity(trace, spec, objective)  # type: ignore[arg-type]
        chosen = [token for token, phase in zip(trace.experts, trace.phase, strict=True) if phase in phases]
        for layer in range(6):
            for expert in range(8):
                times = sum(expert in token[layer] for token in chosen)
                assert found[layer, expert] == pytest.approx((times + 0.5) / (2 * len(chosen) + 4))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_sum_to_one_and_nobody_has_nothing(spec: ModelSpec, objective: Any) -> None:
    found = popularity(random_trace(spec, 10), spec, objective)
    assert found.dtype == np.float64
    assert np.allclose(found.sum(axis=1), 1, atol=1e-12)
    assert (found > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_trace_all_are_equal(spec: ModelSpec, objective: Any) -> None:
    assert (popularity(None, spec, objective) == 1 / 8).all()


def test_a_phase_without_choices_takes_the_other(spec: ModelSpec) -> None:
    trace = random_trace(spec, 2)
    assert trace.experts is not None
    prompt = Trace(
        **{**vars(trace), "phase": np.zeros(2, np.uint8), "counts": count(trace.experts, np.zeros(2, np.uint8), 8)}
    )
    assert np.array_equal(popularity(prompt, spec, "decode"), popularity(prompt, spec, "prefill"))


def published(**changes: Any) -> dict[str, Any]:
    counts = np.random.default_rng(1).multinomial(2000, [0.125] * 8, size=6).tolist()
    return {"model": "Tiny (instruct)", "text": "A subject", "tokens": 900, "counts": counts, **changes}


def save(folder: Path, value: Any) -> Path:
    path = folder / "counts.json"
    path.write_text(json.dumps(value))
    return path


def test_published_counts(spec: ModelSpec, tmp_path: Path) -> None:
    value = published()
    trace = from_counts(save(tmp_path, value), spec)
    assert trace.experts is None
    assert trace.source == "A subject, counts of Tiny (instruct)"
    expected = (np.array(value["counts"]) + 0.5) / 2004
    for objective in OBJECTIVES:
        assert np.allclose(popularity(trace, spec, objective), expected)
    write_trace(trace, tmp_path / "t.safetensors")
    assert np.array_equal(read_trace(tmp_path / "t.safetensors", spec).counts, trace.counts)


ROW = [250] * 8


@pytest.mark.parametrize(("changes", "said"), [
    ({"extra": 1}, "unknown key"),
    ({"counts": [ROW] * 5}, "found 5 layers of 8 experts, expected 6 layers of 8 experts"),
    ({"counts": [[1] * 16] * 6}, "layers of 16 experts"),
    ({"counts": [ROW] * 5 + [ROW[:7]]}, "7 or 8 experts"),
    ({"counts": []}, "0 layers of no experts"),
    ({"counts": [ROW] * 5 + [[-250, 750, *ROW[:6]]]}, "a count of -250"),
    ({"counts": [ROW] * 5 + [[248, *ROW[:7]]]}, "found 1998 choices in layer 5 and 2000 in layer 0"),
    ({"counts": [[1, *[0] * 7]] * 6}, "a multiple of top_k = 2"),
    ({"counts": [[0] * 8] * 6}, "0 choices"),
    ({"counts": [ROW] * 5 + [[2.5] * 8]}, "an integer"),
    ({"counts": [ROW] * 5 + [[2**64] * 8]}, "an integer"),
    ({"tokens": 0}, "tokens = 0"),
    ({"tokens": "many"}, "an integer"),
    ({"model": None}, "text"),
])  # fmt: skip
def test_counts_of_another_form(spec: ModelSpec, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FiddlerError) as caught:
        from_counts(save(tmp_path, published(**changes)), spec)
    assert said in caught.value.line


def test_counts_that_are_not_there(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(FiddlerError, match="cannot read the counts"):
        from_counts(tmp_path / "none.json", spec)
    value = published()
    del value["text"]
    with pytest.raises(FiddlerError, match="missing key"):
        from_counts(save(tmp_path, value), spec)
