"""Trace files that are not what they should be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_families import TINY_MIXTRAL

from fiddler_runtime.errors import FiddlerError
from fiddlerc.frontend import load_model
from fiddlerc.ir import ModelSpec, Trace
from fiddlerc.trace import read_trace, write_trace
from fiddlerc.trace.check import count


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_model(str(TINY_MIXTRAL))


@pytest.fixture
def good(spec: ModelSpec) -> Trace:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(8)[:2] for _ in range(20 * 6)]).reshape(20, 6, 2).astype(np.uint16)
    phase = (np.arange(20) >= 8).astype(np.uint8)
    return Trace(
        model_fingerprint=spec.fingerprint,
        model_name=spec.name,
        source="a test",
        counts=count(experts, phase, 8),
        experts=experts,
        sequence=np.zeros(20, np.int32),
        position=np.arange(20, dtype=np.int32),
        phase=phase,
    )


def error_of(path: Path, spec: ModelSpec) -> FiddlerError:
    with pytest.raises(FiddlerError) as caught:
        read_trace(path, spec)
    return caught.value


def test_trace_of_another_model(good: Trace, spec: ModelSpec, tmp_path: Path) -> None:
    write_trace(good, tmp_path / "t")
    other = load_model("mixtral")
    error = error_of(tmp_path / "t", other)
    assert error.what == f"the trace {tmp_path / 't'} is of another model"
    assert error.found == f"tiny-mixtral ({spec.fingerprint})"
    assert error.expected == f"mixtral-8x7b ({other.fingerprint})"
    assert error.hint is not None
    assert "fiddlerc trace" in error.hint


def test_not_a_trace(spec: ModelSpec, tmp_path: Path) -> None:
    assert "is not a trace" in error_of(TINY_MIXTRAL / "model.safetensors", spec).what
    assert "cannot read" in error_of(tmp_path / "nothing", spec).what
    assert "cannot read" in error_of(tmp_path, spec).what
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.")
    assert "not a safetensors file" in error_of(tmp_path / "text", spec).what
    (tmp_path / "empty").write_bytes(b"")
    assert "truncated" in error_of(tmp_path / "empty", spec).what


def rewrite(good: Trace, path: Path, *, header: dict[str, Any] | None = None, **arrays: Any) -> None:
    """A trace file with some header keys and tensors replaced; ... leaves one out."""
    write_trace(good, path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["fiddlerc-trace"]
    names = ("counts", "experts", "sequence", "position", "phase")
    tensors = {name: getattr(good, name) for name in names} | arrays
    merged = {**json.loads(metadata), **(header or {})}
    merged = {key: value for key, value in merged.items() if value is not ...}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not ...},
        path,
        metadata={"fiddlerc-trace": json.dumps(merged)},
    )


def test_newer_version(good: Trace, spec: ModelSpec, tmp_path: Path) -> None:
    rewrite(good, tmp_path / "t", header={"format": 2, "something": "new"})
    error = error_of(tmp_path / "t", spec)
    assert "newer" in error.what
    assert (error.found, error.expected) == ("format 2", "format 1")


@pytest.mark.parametrize(("header", "said"), [
    ({"format": 0}, "format 0"), ({"format": "1"}, "an integer"), ({"format": ...}, "missing key"),
    ({"extra": 1}, "unknown key"), ({"source": ...}, "missing key"), ({"source": 3}, "text"),
    ({"sha256": "0" * 64}, "damaged"),
])  # fmt: skip
def test_headers(good: Trace, spec: ModelSpec, tmp_path: Path, header: dict[str, Any], said: str) -> None:
    rewrite(good, tmp_path / "t", header=header)
    assert said in error_of(tmp_path / "t", spec).line


@pytest.mark.parametrize(("arrays", "said"), [
    ({"phase": ...}, "tensors counts, experts, position, sequence"),
    ({"counts": ...}, "tensors experts"),
    ({"extra": np.zeros(1)}, "tensors counts, experts, extra"),
    ({"counts": np.zeros((2, 6, 8))}, "counts of F64"),
    ({"counts": np.zeros((2, 6, 8), np.int64)}, "damaged"),
])  # fmt: skip
def test_tensors(good: Trace, spec: ModelSpec, tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    rewrite(good, tmp_path / "t", **arrays)
    assert said in error_of(tmp_path / "t", spec).line


def changed(array: Any, index: Any, value: Any) -> Any:
    copy = array.copy()
    copy[index] = value
    return copy


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: {"counts": t.counts[:1]}, "counts of int64 [1, 6, 8], expected int64 [2, 6, 8]"),
    (lambda t: {"counts": t.counts[:, :, :4]}, "[2, 6, 4]"),
    (lambda t: {"counts": changed(t.counts, (0, 0, 0), -1)}, "a negative count"),
    (lambda t: {"counts": changed(t.counts, (0, 0, 0), 999)}, "counts that are not those of its experts"),
    (lambda t: {"experts": t.experts[:, :, :1]}, "experts of uint16 [20, 6, 1]"),
    (lambda t: {"experts": t.experts.astype(np.int32)}, "experts of int32"),
    (lambda t: {"experts": changed(t.experts, (0, 0, 0), 8)}, "found expert 8, expected 0 to 7"),
    (lambda t: {"phase": changed(t.phase, 0, 2)}, "phase 2"),
    (lambda t: {"position": changed(t.position, 0, -1)}, "negative"),
    (lambda t: {"sequence": t.sequence[:5]}, "sequence of int32 [5]"),
])  # fmt: skip
def test_contents_that_contradict_each_other(
    good: Trace, spec: ModelSpec, tmp_path: Path, change: Any, said: str
) -> None:
    """Written with a right checksum, by somebody else's tool."""
    write_trace(replace(good, **change(good)), tmp_path / "t")
    assert said in error_of(tmp_path / "t", spec).line


def test_every_flipped_bit_is_found(good: Trace, spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_trace(good, path)
    data = path.read_bytes()
    rng = np.random.default_rng(2)
    unharmed = []
    for bit in rng.choice(len(data) * 8, 400, replace=False):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            read = read_trace(path, spec)
        except FiddlerError:
            continue
        # Only names for people are not under the checksum.
        assert np.array_equal(read.experts, good.experts)  # type: ignore[arg-type]
        assert (read.source, read.model_name) != (good.source, good.model_name)
        unharmed.append(bit)
    assert len(unharmed) < 20


def test_truncation(good: Trace, spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_trace(good, path)
    data = path.read_bytes()
    for size in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert "truncated" in error_of(path, spec).line


def test_a_failed_write_leaves_what_was_there(good: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "t"
    write_trace(good, path)
    before = path.read_bytes()

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_trace(replace(good, source="another"), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["t"]


def test_a_place_that_cannot_be_written(good: Trace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FiddlerError, match="cannot write the trace"):
        write_trace(good, tmp_path / "file" / "t")
