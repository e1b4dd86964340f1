"""ONNX files that are broken or hostile: each gives one FiddlerError, and none is read beyond its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_samples
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.onnx_file import read_initializers, read_varints
from fiddlerc.frontend import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*rounded to bf16 while they are read:fiddler_runtime.FiddlerWarning")
LAYERS = {0: onnx_samples.random_experts(1, experts=2, hidden=6, inner=4)}


def model() -> Any:
    return onnx_samples.experts_node(LAYERS, dtype=TensorProto.FLOAT)


def outside(folder: Path) -> Path:
    return onnx_samples.save(
        model(), folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )


def error_of(path: Path) -> str:
    with pytest.raises(FiddlerError) as caught:
        read_initializers(path)
    with pytest.raises(FiddlerError):
        load_model(str(path))
    return caught.value.line


def entry(folder: Path, key: str, value: str | None) -> Path:
    """A file whose first tensor's external data has another entry."""
    path = outside(folder)
    changed = onnx.load(path, load_external_data=False)
    entries = changed.graph.initializer[0].external_data
    kept = [(e.key, e.value) for e in entries if e.key != key] + ([(key, value)] if value is not None else [])
    del entries[:]
    for name, text in kept:
        entries.add(key=name, value=text)
    path.write_bytes(changed.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../m.data", "a/../../m.data", "..", "", "a\\..\\..\\m.data", "m.data\0"],
)
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "m.data").write_bytes(b"x" * 10_000)
    (tmp_path / "inside" / "a").mkdir(parents=True)
    line = error_of(entry(tmp_path / "inside", "location", location))
    assert "expected a file in the folder of the ONNX file" in line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "other.data", "is incomplete: found no other.data beside it"),
        ("location", "folder", "is incomplete: found no folder beside it"),
        ("location", None, "expected a file in the folder"),
        ("offset", "-1", "found offset '-1'"),
        ("offset", "99999999999999999999", "found offset '99999999999999999999'"),
        ("offset", "1e3", "found offset '1e3'"),
        ("offset", "999999", "is truncated: found"),
        ("length", "12", "found 12 bytes of model.layers.0.mlp.experts.gate_up_proj"),
        ("length", "١٢", "found length"),
    ],
)
def test_entries_of_external_data(tmp_path: Path, key: str, value: str | None, message: str) -> None:
    (tmp_path / "folder").mkdir()
    assert message in error_of(entry(tmp_path, key, value))


def test_truncated_external_data(tmp_path: Path) -> None:
    path = outside(tmp_path)
    os.truncate(tmp_path / "m.data", 100)
    assert "the external data" in error_of(path)
    (tmp_path / "m.data").unlink()
    assert "found no m.data beside it" in error_of(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    from fiddler_runtime.weights import ExpertWeights

    path = outside(tmp_path)
    spec = load_model(str(path))
    weights = ExpertWeights.load(path)
    weights.check(spec)
    os.truncate(tmp_path / "m.data", 100)
    import torch

    parts = [torch.empty(4, 6, dtype=torch.bfloat16) for _ in range(2)]
    with pytest.raises(FiddlerError, match="was truncated while it was read"):
        weights.read(0, 1, parts[0], parts[1], torch.empty(6, 4, dtype=torch.bfloat16))


def changed_tensor(change: Callable[[Any], None]) -> bytes:
    broken = model()
    change(broken.graph.initializer[0])
    data: bytes = broken.SerializeToString()
    return data


def twice(tensor: Any) -> None:
    tensor.name = "model.layers.0.mlp.experts.down_proj"


def both(tensor: Any) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.data")


def in_two_fields(tensor: Any) -> None:
    tensor.float_data.append(1.0)


def in_a_field_of_another_type(tensor: Any) -> None:
    values = numpy_helper.to_array(tensor).astype(np.int64)
    tensor.ClearField("raw_data")
    tensor.int64_data.extend(values.ravel().tolist())


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found 0 graphs"),
    "text": (b"hello, this is no model", "found wire type"),
    "a field too long": (b"\x3a\xff\xff\xff\xff\x0f", "is truncated: found 6 bytes"),
    "a length of 2^64 and more": (b"\x3a" + b"\xff" * 9 + b"\x7f", "an integer of over 64 bits"),
    "an integer without an end": (b"\x3a" + b"\x80" * 30, "an integer of over 64 bits"),
    "an integer cut off": (b"\x08\x80", "an integer that goes on at byte 2"),
    "field 0": (b"\x02\x00", "field number 0"),
    "a group": (b"\x3b", "found wire type 3"),
    "two graphs": (model().SerializeToString() * 2, "found 2 graphs"),
    "a tensor beyond its graph": (b"\x3a\x03\x2a\x09\x00\x12\x14" + b"\x00" * 20, "a field up to byte"),
    "a negative size": (changed_tensor(lambda t: t.dims.__setitem__(0, -2)), "a negative size"),
    "a huge size": (changed_tensor(lambda t: t.dims.__setitem__(0, 2**62)), "found 384 bytes of"),
    "too little data": (changed_tensor(lambda t: t.ClearField("raw_data")), "found 0 bytes of"),
    "a name twice": (changed_tensor(twice), "down_proj twice"),
    "inside and outside": (changed_tensor(both), "both inside and outside"),
    "two fields": (changed_tensor(in_two_fields), "in several pieces: found 2 fields"),
    "a field of another type": (changed_tensor(in_a_field_of_another_type), "(F32) in field 7"),
    "no UTF-8": (model().SerializeToString().replace(b"down_proj", b"down\xffproj"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    (tmp_path / "m.data").write_bytes(b"x")
    assert message in error_of(path)


def test_a_long_name_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(changed_tensor(lambda t: setattr(t, "name", "n" * 70_000)))
    assert "text of at most 65536" in error_of(path)


@pytest.mark.parametrize("at", range(1, 200, 7))
def test_truncation_anywhere(tmp_path: Path, at: int) -> None:
    data = model().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: len(data) * at // 200])
    error_of(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 1500))
@example(b"", 0)
def test_noise_gives_a_model_or_an_error(tmp_path: Path, noise: bytes, at: int) -> None:
    data = bytearray(model().SerializeToString())
    data[at : at + len(noise)] = noise
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(data))
    for read in (lambda: read_initializers(path), lambda: load_model(str(path))):
        try:
            read()
        except FiddlerError:
            continue


def test_varints_that_are_no_elements(tmp_path: Path) -> None:
    values = LAYERS[0][1]
    good = helper.make_tensor("t", TensorProto.BFLOAT16, values.shape, values.ravel().tolist())
    path = tmp_path / "m.onnx"
    for change, message in (
        (lambda t: t.int32_data.pop(), "found 47 integers"),
        (lambda t: t.int32_data.__setitem__(0, 70_000), "found the integer 70000"),
        (lambda t: t.int32_data.__setitem__(0, -1), "found the integer -1"),
    ):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(good)
        change(tensor)
        path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString())
        info = read_initializers(path)["t"]
        with pytest.raises(FiddlerError, match=message):
            read_varints(info)  # type: ignore[arg-type]


def test_metadata_is_checked(tmp_path: Path) -> None:
    for text, message in (("{", "not valid JSON"), ('{"name": 3}', "missing key"), ("[]", "wrong value")):
        broken = model()
        helper.set_model_props(broken, {"fiddlerc.model": text})
        with pytest.raises(FiddlerError, match=message):
            load_model(str(onnx_samples.save(broken, tmp_path / "m.onnx")))


def test_weights_do_not_enter_the_compilers_memory(tmp_path: Path) -> None:
    """80 MB inside the file, beside which the graph alone is read."""
    import tracemalloc

    large = model()
    large.graph.initializer.append(numpy_helper.from_array(np.zeros((20_000, 1_000), np.float32), "large"))
    path = onnx_samples.save(large, tmp_path / "m.onnx")
    del large
    tracemalloc.start()
    load_model(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
