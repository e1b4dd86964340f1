"""The catalogue of machines, and reading and writing hw.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fiddler_runtime import strict
from fiddler_runtime.errors import FiddlerError
from fiddlerc.hardware import catalog_names, load_hardware, write_hardware
from fiddlerc.hardware.catalog import CATALOG

NAMES = ("a100", "a100-40gb", "epyc-zen5-2c", "fiddler-env1", "fiddler-env2", "h100", "rtx4090")


def edited(tmp_path: Path, **changes: Any) -> Path:
    """a100.json with dotted keys set to other values; a value of `...` removes the key."""
    data = json.loads((CATALOG / "a100.json").read_bytes())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path = tmp_path / "hw.json"
    path.write_text(json.dumps(data))
    return path


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "quantity": "cpu_expert",
        "hidden_size": 128,
        "intermediate_size": 256,
        "tokens": 1,
        "bytes": 196608,
        "threads": 1,
        "isa": "avx2",
        "median_us": 10.0,
        "spread_us": 1.0,
        "repeats": 5,
        "regime": "fast",
    } | changes


def step(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "model_fingerprint": "f",
        "num_layers": 2,
        "non_expert_bytes": 100,
        "kv_bytes_per_token": 4,
        "tokens": 1,
        "sequences": 1,
        "context": 16,
        "median_us": 10.0,
        "spread_us": 1.0,
        "repeats": 5,
    } | changes


def test_catalog_names() -> None:
    assert catalog_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_of_the_catalogue_is_valid_and_canonical(name: str) -> None:
    calibration = load_hardware(name)
    assert calibration.name == name
    assert (calibration.provenance == "measured") == bool(calibration.samples)
    assert (CATALOG / f"{name}.json").read_bytes() == strict.dump(calibration)


def test_a_name_works_with_and_without_its_ending_and_an_existing_path_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_hardware("a100") == load_hardware("a100.json") == load_hardware(str(CATALOG / "a100.json"))
    monkeypatch.chdir(tmp_path)
    write_hardware(replace(load_hardware("a100"), name="mine"), tmp_path / "a100.json")
    assert load_hardware("a100.json").name == "mine"
    assert load_hardware("a100").name == "a100"


@pytest.mark.parametrize("name", ["b200", "missing/hw.json", "../catalog/a100", ""])
def test_an_unknown_name_lists_the_catalogue(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "":
        name = "nothing.json"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FiddlerError, match="a100, a100-40gb, epyc-zen5-2c, fiddler-env1") as caught:
        load_hardware(name)
    assert caught.value.hint is not None and caught.value.hint.startswith("fiddlerc calibrate")


def test_an_unknown_key_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = edited(tmp_path, limits__cpu_gbps=1.0)
    with pytest.raises(FiddlerError, match=r"unknown key in hardware file .*\.limits: found 'cpu_gbps'") as caught:
        load_hardware(str(path))
    assert caught.value.hint is not None and "fiddlerc calibrate" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine__cores": ...}, r"missing key in .*\.machine: found no 'cores'"),
        ({"schema": "fiddlerc-hw/3"}, r"wrong value for .*\.schema"),
        ({"schema": "fiddlerc-hw/1"}, r"older fiddlerc: found schema fiddlerc-hw/1, expected schema fiddlerc-hw/2"),
        ({"limits__cpu_slow_share": 1.5}, r"\.limits\.cpu_slow_share: found 1.5"),
        ({"limits__cpu_slow_share": 0.5}, r"\.limits\.cpu_read_slow_gbps: found 0"),
        ({"limits__cpu_slow_share": 0.5, "limits__cpu_read_slow_gbps": 1e6}, r"cpu_read_slow_gbps: found 1000000"),
        ({"samples": [sample(regime="slow")]}, r"\.samples\[0\]\.regime: found 'slow'"),
        ({"samples": [sample(regime="odd")]}, r"wrong value for .*\.samples\[0\]\.regime"),
        ({"steps": [step(tokens=0)]}, r"\.steps\[0\]\.tokens: found 0"),
        ({"steps": [step(context=-1)]}, r"\.steps\[0\]\.context: found -1"),
        ({"steps": [step(median_us=0)]}, r"\.steps\[0\]\.median_us: found 0"),
        ({"provenance": "guessed"}, r"wrong value for .*\.provenance"),
        ({"name": ""}, r"\.name: found ''"),
        ({"source": ""}, r"\.source: found ''"),
        ({"limits__cpu_read_gbps": "fast"}, r"\.limits\.cpu_read_gbps: found \"fast\", expected a number"),
        ({"limits__cpu_read_gbps": 0}, r"\.limits\.cpu_read_gbps: found 0"),
        ({"limits__cpu_threads": 0}, r"\.limits\.cpu_threads: found 0"),
        ({"limits__cpu_entry_us": -1}, r"\.limits\.cpu_entry_us: found -1"),
        ({"limits__gpu_read_gbps": 0}, r"\.limits\.gpu_read_gbps: found 0"),
        ({"machine__isa": ["avx10"]}, r"\.machine\.isa: found 'avx10'"),
        ({"machine__numa_nodes": 0}, r"\.machine\.numa_nodes: found 0"),
        ({"machine__l2_bytes": -1}, r"\.machine\.l2_bytes: found -1"),
        ({"machine__accelerator__memory_bytes": 0}, r"\.machine\.accelerator\.memory_bytes: found 0"),
        ({"provenance": "measured"}, r"\.samples: found no cpu_expert"),
        ({"samples": [sample(median_us=0)]}, r"\.samples\[0\]\.median_us: found 0"),
        ({"samples": [sample(repeats=0)]}, r"\.samples\[0\]\.repeats: found 0"),
        ({"samples": [sample(spread_us=-1)]}, r"\.samples\[0\]\.spread_us: found -1"),
        ({"samples": [sample(tokens=0)]}, r"\.samples\[0\]: found a shape of \(128, 256, 0\)"),
        ({"samples": [sample(quantity="host_to_device")]}, r"\.samples\[0\]: found a shape of \(128, 256, 1\)"),
        ({"samples": [sample(quantity="warp_speed")]}, r"wrong value for .*\.samples\[0\]\.quantity"),
        ({"samples": [sample(tokens=True)]}, r"\.samples\[0\]\.tokens: found true, expected an integer"),
    ],
)
def test_every_rule_has_its_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FiddlerError, match=message) as caught:
        load_hardware(str(edited(tmp_path, **changes)))
    assert caught.value.hint is not None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100000])
def test_what_is_not_json_is_said_to_be_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hw.json"
    path.write_bytes(content)
    with pytest.raises(FiddlerError, match="is not valid"):
        load_hardware(str(path))


def test_a_directory_is_not_a_hardware_file(tmp_path: Path) -> None:
    with pytest.raises(FiddlerError, match="cannot read hardware file"):
        load_hardware(str(tmp_path))


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hw.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(FiddlerError, match="is too big"):
        load_hardware(str(path))


def test_written_is_read_again_and_nothing_else_is_left(tmp_path: Path) -> None:
    calibration = load_hardware("rtx4090")
    path = tmp_path / "hw.json"
    write_hardware(calibration, path)
    assert load_hardware(str(path)) == calibration
    assert [file.name for file in tmp_path.iterdir()] == ["hw.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FiddlerError, match="cannot write hardware file") as caught:
        write_hardware(load_hardware("a100"), tmp_path / "absent" / "hw.json")
    assert caught.value.hint is not None and caught.value.hint.startswith("mkdir -p")


@pytest.mark.parametrize("name", ["", "..", "../elsewhere", "/etc"])
def test_a_broken_calibration_is_not_written(tmp_path: Path, name: str) -> None:
    """The name is part of the folder that a plan is written to by default."""
    with pytest.raises(FiddlerError, match=rf"\.name: found '{name}', expected a name, without /"):
        write_hardware(replace(load_hardware("a100"), name=name), tmp_path / "hw.json")
    assert list(tmp_path.iterdir()) == []
