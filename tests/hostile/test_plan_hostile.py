"""Plans that were damaged, or made to harm: each is refused by name, none is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plan_samples import sample_header, sample_model, sample_tables, write_sample
from safetensors.numpy import save

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import ABI_VERSION, FileEntry, Plan, Tables, peek_version, read_plan
from fiddler_runtime.plan.reader import digest
from fiddler_runtime.plan.tensors import _TYPES, encode_tables


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "plan").path


def refused(plan: Path, *words: str, verify: bool = True) -> FiddlerError:
    """The plan must be refused, by an error that names it, says all the words, and has a hint."""
    with pytest.raises(FiddlerError) as raised:
        read_plan(plan, verify)
    error = raised.value
    assert str(plan) in error.what
    assert error.hint
    assert "\n" not in error.line
    for word in words:
        assert word in str(error), str(error)
    return error


def reseal(plan: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes plan.json as an attacker would: canonical, and with the digest that fits."""
    value = json.loads((plan / "plan.json").read_bytes())
    change(value)
    value["digest"] = ""
    value["digest"] = hashlib.sha256(strict.dump(value)).hexdigest()
    (plan / "plan.json").write_bytes(strict.dump(value))


def replace_tables(plan: Path, data: bytes) -> None:
    """Puts other bytes in the place of the tables, with size and hash that fit."""
    (plan / "tables.safetensors").write_bytes(data)

    def change(value: dict[str, Any]) -> None:
        entry = next(e for e in value["files"] if e["path"] == "tables.safetensors")
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    reseal(plan, change)


def test_resealing_itself_is_harmless(plan: Path) -> None:
    reseal(plan, lambda value: None)
    replace_tables(plan, (plan / "tables.safetensors").read_bytes())
    read_plan(plan)


@pytest.mark.slow
def test_every_flipped_bit_of_plan_json_is_found(plan: Path) -> None:
    file = plan / "plan.json"
    good = file.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        file.write_bytes(bad)
        with pytest.raises(FiddlerError):
            read_plan(plan, verify=False)


def test_every_flipped_bit_of_the_files_is_found(plan: Path) -> None:
    for entry in read_plan(plan).header.files:
        file = plan / entry.path
        good = file.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            file.write_bytes(bad)
            refused(plan, entry.path, "sha256")
        file.write_bytes(good)
    read_plan(plan)


def test_every_truncation_is_found(plan: Path) -> None:
    for name in ["plan.json", *(entry.path for entry in read_plan(plan).header.files)]:
        file = plan / name
        good = file.read_bytes()
        for size in {0, 1, 7, 8, 9, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:size])
            for verify in (True, False):
                refused(plan, verify=verify)
        file.write_bytes(good + b"\n")
        refused(plan)
        file.write_bytes(good)
    read_plan(plan)


def test_not_a_plan(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "no such plan"), (tmp_path, "without plan.json")):
        with pytest.raises(FiddlerError, match=words) as raised:
            read_plan(path)
        assert raised.value.hint is not None
        assert "fiddlerc compile" in raised.value.hint
        assert peek_version(path) is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(FiddlerError, match="not a plan"):
        read_plan(tmp_path / "file")
    (tmp_path / "plan.json").mkdir()
    refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "JSON"),
        (b"[]", "format"),
        (b"null", "format"),
        (b"{}", "format"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"format_major": 4, "format_minor": 0, "format_minor": 0}', "twice"),
        (b'{"format_major": 4, "format_minor": NaN}', "finite"),
        (b'{"format_major": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"format_major": true, "format_minor": 0}', "format"),
        (b'{"format_major": -1, "format_minor": 0}', "format"),
        (b'{"format_major": 4, "format_minor": 0, "surprise": 1}', "unknown key"),
        (b'{"format_major": 4, "format_minor": 0}', "missing key"),
    ],
)
def test_plan_json_of_another_kind(plan: Path, text: bytes, words: str) -> None:
    (plan / "plan.json").write_bytes(text)
    refused(plan, words)


def test_plan_json_of_a_huge_size_is_not_read(plan: Path) -> None:
    with (plan / "plan.json").open("wb") as stream:
        stream.truncate(1 << 40)
    refused(plan, "too large")


@pytest.mark.parametrize(("major", "minor"), [(5, 0), (4, 1), (999, 7)])
def test_a_newer_format_is_named_even_where_it_cannot_be_read(plan: Path, major: int, minor: int) -> None:
    text = json.dumps({"format_major": major, "format_minor": minor, "unheard": ["of"]})
    (plan / "plan.json").write_text(text)
    error = refused(plan, "newer format", f"plan format {major}.{minor}", "4.0")
    assert error.hint == "pip install --upgrade fiddlerc"
    assert peek_version(plan) == (major, minor)


def test_an_older_format_asks_for_another_compile(plan: Path) -> None:
    reseal(plan, lambda value: value.update(format_major=0))
    refused(plan, "older format", "0.0", "fiddlerc compile")


def test_another_abi(plan: Path) -> None:
    reseal(plan, lambda value: value.update(abi=ABI_VERSION + 1))
    refused(plan, f"ABI {ABI_VERSION + 1}", f"ABI {ABI_VERSION}")


def test_reformatted_json_is_refused(plan: Path) -> None:
    value = json.loads((plan / "plan.json").read_bytes())
    (plan / "plan.json").write_text(json.dumps(value))
    refused(plan, "canonical")


def test_an_edited_plan_without_its_digest(plan: Path) -> None:
    value = json.loads((plan / "plan.json").read_bytes())
    value["assumptions"] = []
    (plan / "plan.json").write_bytes(strict.dump(value))
    refused(plan, "digest")


def test_half_a_surrogate_pair_is_not_text(plan: Path) -> None:
    text = (plan / "plan.json").read_bytes().replace(b'"made up"', b'"\\ud800"')
    (plan / "plan.json").write_bytes(text)
    refused(plan, "assumptions")


def test_a_missing_file(plan: Path) -> None:
    (plan / "kernels" / "include" / "fiddler" / "abi.h").unlink()
    refused(plan, "missing", "kernels/include/fiddler/abi.h")


@pytest.mark.parametrize("name", ["extra.txt", "kernels/evil.cpp", ".hidden", "plan.json~"])
def test_an_extra_file(plan: Path, name: str) -> None:
    (plan / name).write_text("x")
    refused(plan, "does not list", name)


def test_an_empty_folder_is_no_file(plan: Path) -> None:
    (plan / "kernels" / "empty").mkdir()
    read_plan(plan)


@pytest.mark.parametrize("name", ["plan.json", "report.html", "kernels"])
def test_links_are_refused_even_to_the_right_contents(plan: Path, name: str) -> None:
    os.rename(plan / name, plan.parent / "elsewhere")
    (plan / name).symlink_to(plan.parent / "elsewhere")
    refused(plan, "a symbolic link")


def test_a_plan_may_itself_be_reached_through_a_link(plan: Path) -> None:
    (plan.parent / "link").symlink_to(plan)
    read_plan(plan.parent / "link")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["plan.json", "tables.safetensors", "report.html"])
def test_a_pipe_does_not_hang_the_reader(plan: Path, name: str) -> None:
    (plan / name).unlink()
    os.mkfifo(plan / name)
    refused(plan)


def with_files(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda value: change(value["files"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files[0].update(path="../../etc/passwd"), ".."),
        (lambda files: files[0].update(path="/etc/passwd"), "relative"),
        (lambda files: files[0].update(path="a\\b"), "backslashes"),
        (lambda files: files[0].update(path="plan.json"), "plan.json"),
        (lambda files: files[0].update(path="a\u202eb"), "relative"),
        (lambda files: files.insert(0, files[0]), "twice"),
        (lambda files: files.reverse(), "sorted"),
        (lambda files: files.pop(0), "CMakeLists.txt"),
        (lambda files: files.insert(0, {**files[0], "path": "kernels"}), "folder"),
        (lambda files: files[0].update(bytes=-1), "0 or more"),
        (lambda files: files[0].update(bytes=2**62), "size"),
        (lambda files: files[0].update(bytes=2**64), "integer"),
        (lambda files: files[0].update(sha256="0" * 63), "64"),
        (lambda files: files[0].update(sha256="A" * 64), "lower-case"),
        (lambda files: files.extend([files[0]] * 5000), "at most"),
    ],
)
def test_file_lists_that_lie(plan: Path, change: Callable[[list[dict[str, Any]]], None], words: str) -> None:
    reseal(plan, with_files(change))
    refused(plan, words)


def at(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets a.b.c of a JSON object."""

    def change(root: dict[str, Any]) -> None:
        *folders, last = path.split(".")
        for name in folders:
            root = root[name]
        root[last] = value

    return change


HEADERS: list[tuple[str, object, str]] = [
    ("model.num_layers", 0, "num_layers"),
    ("model.num_layers", 2**62, "num_layers"),
    ("model.num_experts", 2**40, "num_experts"),
    ("model.num_experts", 3, "total_experts"),
    ("model.top_k", 0, "top_k"),
    ("model.top_k", 5, "top_k"),
    ("model.hidden_size", 2**62, "hidden_size"),
    ("model.hidden_size", 128, "kernels"),
    ("model.hidden_size", "64", "an integer"),
    ("model.hidden_size", 64.0, "an integer"),
    ("model.hidden_size", True, "an integer"),
    ("model.intermediate_size", 0, "intermediate_size"),
    ("model.activation", "relu", "silu"),
    ("model.moe_layers", [], "moe_layers"),
    ("model.moe_layers", [2, 1], "increasing"),
    ("model.moe_layers", [1, 1], "increasing"),
    ("model.moe_layers", [-1, 1], "moe_layers"),
    ("model.moe_layers", [1, 3], "below 3"),
    ("model.moe_layers", [0, 1, 2], "total_experts"),
    ("model.expert_tensors.gate", "layers.0.experts.{expert}", "{layer}"),
    ("model.expert_tensors.up", "{layer}{expert}{layer.__class__}", "{layer}"),
    ("model.expert_tensors.down", "{layer}{expert}}", "{layer}"),
    ("model.expert_tensors.gate_bias", "{layer}.b", "all three or none"),
    ("model.expert_tensors.gate_bias", "b", "{layer}"),
    ("model.expert_tensors.interleaved", True, "gate and up in one tensor"),
    ("model.expert_tensors.transposed", 1, "true or false"),
    ("model.expert_bias", True, "where the biases have names"),
    ("model.activation", "gelu", "kernels for 64 x 96 silu"),
    ("model.window", -1, "0 or more"),
    ("model.state_bytes", -1, "0 or more"),
    ("kernels.bias", True, "64 x 96 silu with biases"),
    ("kernels.tuning.isa", "scalar", "that of the scalar variant"),
    ("kernels.tuning.threads", 0, "threads"),
    ("kernels.tuning.tokens", [1], "a speed by token count"),
    ("kernels.tuning.candidates", [], "0 chosen"),
    ("kernels.tuning.candidates", None, "a list"),
    ("model.identity", {"a": None}, "identity"),
    ("model.identity", {"a": [1]}, "identity"),
    ("model.non_expert_bytes", -1, "0 or more"),
    ("kernels.variants", [], "variants"),
    ("kernels.name", "../x", "letters"),
    ("options.context", 257, "context"),
    ("options.batch", 0, "batch"),
    ("options.gpu_memory_bytes", -5, "0 or more"),
    ("options.gpu_memory_bytes", 100, "memory"),
    ("options.objective", "fast", "decode"),
    ("hardware.provenance", "rumour", "measured"),
    ("hardware.machine.cores", -1, "0 or more"),
    ("hardware.machine.accelerator.kind", "tpu", "cuda"),
    ("hardware.machine.accelerator.kind", "none", "no accelerator"),
    ("memory", [{"item": "x", "bytes": -1}], "0 or more"),
    ("memory", [{"item": "x", "bytes": 1}, {"item": "x", "bytes": 1}], "twice"),
    ("placement.resident_experts", 9, "resident_experts"),
    ("placement.resident_experts", 2, "resident"),
    ("placement.total_experts", 7, "total_experts"),
    ("placement.hit_rate", 1.5, "hit_rate"),
    ("placement.hit_rate", "high", "a number"),
    ("placement.method", "luck", "popularity"),
    ("placement.relative_time", {"placed": -1.0}, "0 or more"),
    ("features", [{"name": "magic"}], "missing key"),
    ("tools", {"x": 1}, "text"),
    ("assumptions", "none", "a list"),
    ("files", {}, "a list"),
    ("digest", None, "text"),
]


@pytest.mark.parametrize(
    ("path", "value", "words"), HEADERS, ids=[f"{path}={value}"[:50] for path, value, _ in HEADERS]
)
def test_headers_that_contradict_the_format_or_themselves(plan: Path, path: str, value: object, words: str) -> None:
    if path == "digest":
        text = json.loads((plan / "plan.json").read_bytes())
        at(path, value)(text)
        (plan / "plan.json").write_bytes(strict.dump(text))
    else:
        reseal(plan, at(path, value))
    refused(plan, words)


def test_unknown_variants_of_kernels(plan: Path) -> None:
    reseal(plan, lambda value: value["kernels"]["variants"][0].update(isa="mmx"))
    refused(plan, "mmx", "avx2")
    reseal(plan, lambda value: value["kernels"]["variants"][0].update(isa="avx2"))
    refused(plan, "twice")


def altered(name: str, change: Callable[[npt.NDArray[Any]], object]) -> Tables:
    """The sample tables with one array changed: in place, or by what `change` returns."""
    array = getattr(sample_tables(), name).copy()
    changed = change(array)
    return sample_tables(**{name: changed if isinstance(changed, np.ndarray) else array})


def put(index: Any, value: object) -> Callable[[npt.NDArray[Any]], None]:
    return lambda array: array.__setitem__(index, value)


TABLES: list[tuple[str, Callable[[npt.NDArray[Any]], object], str]] = [
    ("tokens", put(0, 1), "increasing from 0"),
    ("tokens", put(3, 2), "increasing"),
    ("tokens", put(-1, 2**31 - 1), "at most"),
    ("tokens", lambda a: a.astype(np.float32), "float32"),
    ("tokens", lambda a: a[:4], "cpu_us"),
    ("cpu_us", put((0, 2), np.nan), "finite"),
    ("cpu_us", put((0, -1), np.inf), "finite"),
    ("cpu_us", put((0, 2), -1), "finite numbers from 0"),
    ("cpu_us", put((0, -1), 1), "never less"),
    ("cpu_us", put((0, 0), 1), "0 for no tokens"),
    ("cpu_us", lambda a: np.concatenate([a, a]), "float32"),
    ("regime_shares", lambda a: np.ones(3, np.float32), "1 or 2"),
    ("regime_shares", put(0, 0.5), "sum 1"),
    ("rest_us", put(-1, 1), "never less"),
    ("rest_kv_us", put(0, np.nan), "finite"),
    ("prefetch", put((0, 0, 0), 4), "an expert below 4"),
    ("prefetch", put((0, 0, 0), -2), "-1"),
    ("gpu_us", put(3, 0), "never less"),
    ("gpu_us", lambda a: a.astype(np.int32), "int32"),
    ("scalars_us", lambda a: a[:2], "scalars_us"),
    ("scalars_us", put(2, np.nan), "finite"),
    ("contention", put(0, -0.5), "contention"),
    ("decode_streams", put(1, 2), "decode_streams"),
    ("decode_streams", put(2, -1), "decode_streams"),
    ("decode_streams", lambda a: np.append(a, a[-1:]), "decode_streams"),
    ("resident", put((0, 1), 2), "0 or 1"),
    ("resident", put((0, 1), 1), "4 experts"),
    ("resident", lambda a: a.T.copy(), "resident"),
    ("resident", lambda a: a.astype(np.int32), "int32"),
    ("popularity", put((1, 1), 0.5), "rows of sum 1"),
    ("popularity", put((1, 1), np.nan), "finite"),
    ("popularity", lambda a: a[:1], "popularity"),
]


@pytest.mark.parametrize(("name", "change", "words"), TABLES)
def test_tables_that_cannot_be(plan: Path, name: str, change: Callable[[npt.NDArray[Any]], object], words: str) -> None:
    tables = altered(name, change)
    raw = {f.name: getattr(tables, f.name) for f in dataclasses.fields(tables)}
    replace_tables(plan, raw_safetensors(raw))
    refused(plan, words)


ORDER = tuple(_TYPES)


def raw_safetensors(arrays: dict[str, npt.NDArray[Any]], names: tuple[str, ...] = ORDER) -> bytes:
    """What encode_tables writes, without its care for types."""
    kinds = {"int16": "I16", "int32": "I32", "float32": "F32", "float64": "F64", "uint8": "U8"}
    index, data = {}, b""
    for name in names:
        raw = arrays[name].tobytes()
        index[name] = {
            "data_offsets": [len(data), len(data) + len(raw)],
            "dtype": kinds[arrays[name].dtype.name],
            "shape": list(arrays[name].shape),
        }
        data += raw
    header = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def test_tables_of_another_encoding(plan: Path) -> None:
    arrays = vars(sample_tables())
    good = encode_tables(sample_tables())
    assert raw_safetensors(arrays) == good
    header_length = struct.unpack("<Q", good[:8])[0]
    another_order = raw_safetensors(arrays, ("resident", *(name for name in arrays if name != "resident")))
    lying = {
        "header longer than the file": struct.pack("<Q", 2**63) + good[8:],
        "header of no length": struct.pack("<Q", 0) + good[8:],
        "data outside the file": good.replace(b'"data_offsets":[0,32]', b'"data_offsets":[0,99]'),
        "huge shape": good.replace(b'"shape":[8]', b'"shape":[9]'),
        "unknown dtype": good.replace(b'"dtype":"U8"', b'"dtype":"X8"'),
        "bytes at the end": good + b"\0",
        "another order": another_order,
        "metadata": struct.pack("<Q", header_length + 24)
        + good[8 : 8 + header_length].rstrip().removesuffix(b"}").ljust(header_length - 1)
        + b',"__metadata__":{"a":""}}'
        + good[8 + header_length :],
        "nothing": b"",
    }
    for name, data in lying.items():
        replace_tables(plan, data)
        assert refused(plan), name
    replace_tables(plan, good)
    read_plan(plan)


def test_tables_missing_or_unknown(plan: Path) -> None:
    arrays = vars(sample_tables())
    replace_tables(plan, save({name: array for name, array in arrays.items() if name != "contention"}))
    refused(plan, "no tensor 'contention'")
    replace_tables(plan, save({**arrays, "surprise": np.zeros(1, np.float32)}))
    refused(plan, "unknown tensor 'surprise'")


def test_tables_of_a_huge_size_are_not_read(plan: Path) -> None:
    with (plan / "tables.safetensors").open("wb") as stream:
        stream.truncate(1 << 36)

    def change(value: dict[str, Any]) -> None:
        entry = next(e for e in value["files"] if e["path"] == "tables.safetensors")
        entry["bytes"] = 1 << 36

    reseal(plan, change)
    refused(plan, "too large", verify=False)


def test_digest_covers_the_files() -> None:
    header = sample_header(files=(FileEntry("a", "1" * 64, 1), FileEntry("b", "2" * 64, 2)))
    changed = replace(header, files=(*header.files[:-1], replace(header.files[-1], sha256="0" * 64)))
    assert digest(header) != digest(changed)


def test_the_fingerprint_names_shapes_not_names(plan: Path) -> None:
    read: Plan = read_plan(plan)
    assert read.header.model.fingerprint == sample_model(name="other").fingerprint
    assert read.header.model.fingerprint != sample_model(top_k=1).fingerprint
