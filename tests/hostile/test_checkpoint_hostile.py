"""Broken downloads and hostile files: each breach of the format has its own named error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import TINY_MIXTRAL, save_family

from fiddler_runtime.checkpoint import Checkpoint
from fiddler_runtime.errors import FiddlerError

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: int = 24, *, length: int | None = None) -> None:
    """A safetensors file with that header (JSON value, or bytes as they are) and `data` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))


def error_of(folder: Path) -> FiddlerError:
    with pytest.raises(FiddlerError) as caught:
        Checkpoint.open(folder)
    return caught.value


def test_the_good_one_is_good(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "w": GOOD})
    assert list(Checkpoint.open(tmp_path).tensors) == ["w"]


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {**GOOD, **changes}}


@pytest.mark.parametrize(("header", "said"), [
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"w": 1, "w": 2}', "twice"),
    ([], "expected an object"),
    ({"__metadata__": {"format": 1}, "w": GOOD}, "__metadata__"),
    ({"w": 3}, "dtype, shape and data_offsets"),
    ({"w": {**GOOD, "extra": 1}}, "dtype, shape and data_offsets"),
    ({"w": {"dtype": "F32", "shape": [2, 3]}}, "dtype, shape and data_offsets"),
    (entry(dtype="F7"), "found F7"),
    (entry(dtype=["F32"]), "dtype"),
    (entry(shape=[2, -3]), "found [2, -3]"),
    (entry(shape=[2.0, 3]), "shape"),
    (entry(shape=[True, 6]), "shape"),
    (entry(shape=[2**70]), "shape"),
    (entry(shape=6), "shape"),
    (entry(shape=[2**40, 2**40]), "24 bytes"),
    (entry(data_offsets=[24, 0]), "a begin and an end"),
    (entry(data_offsets=[-24, 0]), "a begin and an end"),
    (entry(data_offsets=[0, 24, 48]), "a begin and an end"),
    (entry(data_offsets=[0, 20]), "found 20 bytes, expected 24 for F32 [2, 3]"),
    (entry(data_offsets=[100, 124]), "truncated"),
    (entry(data_offsets=[2**62, 2**62 + 24]), "truncated"),
    ({}, "longer than its header says"),
])  # fmt: skip
def test_headers(tmp_path: Path, header: Any, said: str) -> None:
    write(tmp_path / "model.safetensors", header)
    error = error_of(tmp_path)
    assert said in error.line
    assert "model.safetensors" in error.what
    assert error.hint == "download the file again"


@pytest.mark.parametrize(("cut", "said"), [
    (lambda size: 0, "found 0 bytes"),
    (lambda size: 7, "found 7 bytes"),
    (lambda size: 100, "found 100 bytes, expected at least"),
    (lambda size: size - 1, "found {less} bytes, expected {size}"),
    (lambda size: size // 2, "expected {size}"),
    (lambda size: size + 1, "longer than its header says: found {more} bytes, expected {size}"),
])  # fmt: skip
def test_truncated_file(tmp_path: Path, cut: Callable[[int], int], said: str) -> None:
    path = Path(shutil.copy(TINY_MIXTRAL / "model.safetensors", tmp_path))
    size = path.stat().st_size
    os.truncate(path, cut(size))
    line = error_of(tmp_path).line
    assert said.format(size=size, less=size - 1, more=size + 1) in line
    assert "truncated" in line or "longer" in line


def test_header_length_that_lies(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", entry(), length=2**63)
    assert "a header of 9223372036854775808 bytes" in error_of(tmp_path).line


def test_no_weights(tmp_path: Path) -> None:
    error = error_of(tmp_path)
    assert error.what == f"no weights in {tmp_path}"
    assert error.hint is not None
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert error_of(tmp_path).found == "pytorch_model.bin, a pickle"


def test_weights_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "cannot read the checkpoint" in error_of(tmp_path).what


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several shards."""
    return save_family("mixtral", tmp_path / "m", shards="200KB")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*"))[1]
    gone.unlink()
    error = error_of(sharded)
    assert error.found == f"no {gone.name}"
    assert "of which this is number 2" in str(error.expected)


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[-1]
    size = shard.stat().st_size
    os.truncate(shard, size - 4096)
    error = error_of(sharded)
    assert error.line == f"the shard {shard} is truncated: found {size - 4096} bytes, expected {size}"
    assert error.hint == "download the file again"


def test_missing_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in error_of(sharded).line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_index_of_another_form(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "the index" in error_of(sharded).what


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda weights: weights.update({"ghost": sorted(weights.values())[0]}))
    error = error_of(sharded)
    assert "disagree" in error.what
    assert "no ghost in" in str(error.found)


def test_shard_holds_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda weights: weights.pop("model.norm.weight"))
    error = error_of(sharded)
    assert "disagree" in error.what
    assert "model.norm.weight in" in str(error.found)


def test_index_puts_a_tensor_into_another_shard(sharded: Path) -> None:
    def swap(weights: dict[str, str]) -> None:
        other = next(shard for shard in sorted(weights.values()) if shard != weights["model.norm.weight"])
        weights["model.norm.weight"] = other

    edit_index(sharded, swap)
    assert "disagree" in error_of(sharded).what


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0y.safetensors"]
)
def test_index_that_leads_elsewhere(sharded: Path, name: str) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(b"")
    edit_index(sharded, lambda weights: weights.update({"zzz": name}))
    error = error_of(sharded)
    assert error.expected == "*.safetensors, without folders"
