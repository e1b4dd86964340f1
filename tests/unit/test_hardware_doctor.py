"""What `fiddlerc doctor` says on machines that lack something."""

from __future__ import annotations

import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

from fiddler_runtime import hf
from fiddler_runtime.errors import FiddlerError
from fiddlerc.hardware import Check, doctor
from fiddlerc.hardware.checks import PACKAGES

COMPLETE = "fma avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16"


def machine(root: Path, flags: str, *, nodes: int = 1, driver: bool = False) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor : 0\nmodel name : Test CPU 1\nflags : {flags}\n")
    (root / "proc/meminfo").write_text("MemTotal: 1048576 kB\n")
    for node in range(nodes):
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    if driver:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text("NVRM version: Kernel Module  550.1\n")
    return root


def checks(root: Path) -> dict[str, Check]:
    return {check.name: check for check in doctor(root)}


def test_this_machine_can_build_and_compile() -> None:
    found = {check.name: check for check in doctor()}
    for name in ("CPU", "memory", "C++ compiler", "CMake", "torch", "scikit-learn", "jinja2", "build cache"):
        assert found[name].status == "ok", found[name]
    assert found["ISA scalar"].status == "ok"


def test_all_instruction_sets(tmp_path: Path) -> None:
    found = checks(machine(tmp_path, COMPLETE))
    assert [found[f"ISA {isa}"].status for isa in ("avx512_bf16", "avx512f", "avx2", "scalar")] == ["ok"] * 4
    assert found["ISA avx512_bf16"].detail == "used by default"
    assert found["CPU"].detail.startswith("Test CPU 1, ")
    assert found["memory"].detail == "1 GiB usable"
    assert (found["NUMA"].status, found["caches"].status) == ("ok", "note")


@pytest.mark.parametrize("handed_out", [False, True])
def test_tiles_are_the_default_where_the_system_hands_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed_out: bool
) -> None:
    monkeypatch.setattr("fiddler_runtime.machine._hands_out_tiles", lambda: handed_out)
    found = checks(machine(tmp_path, f"{COMPLETE} amx_tile amx_bf16"))
    tiles, vectors = found["ISA amx_bf16"], found["ISA avx512_bf16"]
    if handed_out:
        assert (tiles.status, tiles.detail, vectors.detail) == ("ok", "used by default", "usable")
    else:
        assert tiles.status == "note"
        assert tiles.detail.endswith("(Linux does from 5.16 on): avx512_bf16 is used instead")
        assert vectors.detail == "used by default"


def test_an_older_cpu_is_told_what_it_lacks(tmp_path: Path) -> None:
    found = checks(machine(tmp_path, "fma avx2"))
    assert found["ISA avx512_bf16"].status == "note"
    assert (
        "avx512_bf16" in found["ISA avx512_bf16"].detail and "avx2 is used instead" in found["ISA avx512_bf16"].detail
    )
    assert found["ISA avx2"].detail == "used by default"


def test_a_cpu_without_avx2_is_told_how_slow_it_is(tmp_path: Path) -> None:
    check = checks(machine(tmp_path, "sse2"))["ISA avx2"]
    assert check.status == "missing" and "scalar" in check.detail and check.hint


@pytest.mark.parametrize(
    ("spread", "refused", "status", "told"),
    [
        (True, "", "ok", "2 nodes: weights lie on the one"),
        (True, "forbidden", "note", "2 nodes, but mbind is refused (forbidden)"),
        (False, "", "note", "2 nodes, over which"),
        (None, "", "ok", "2 nodes, of which this process computes on one"),
    ],
)
def test_several_numa_nodes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: bool | None, refused: str, status: str, told: str
) -> None:
    monkeypatch.setattr("fiddlerc.hardware.checks.refuses_placement", lambda: refused)
    by_node = {0: [0]} if spread is None else {0: [0], 1: [1]}
    monkeypatch.setattr("fiddlerc.hardware.checks.cpus_by_node", lambda root: by_node)
    monkeypatch.setattr("fiddlerc.hardware.checks.lane_cpus", lambda threads, root: ((0, (0,)),) if spread else None)
    check = checks(machine(tmp_path, COMPLETE, nodes=2))["NUMA"]
    assert (check.status, bool(check.hint)) == (status, status == "note") and check.detail.startswith(told)


@pytest.mark.parametrize(("driver", "status"), [(False, "note"), (True, "missing")])
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: bool, status: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check = checks(machine(tmp_path, COMPLETE, driver=driver))["GPU"]
    assert check.status == status
    assert bool(check.hint) == driver


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise FiddlerError("cannot build kernels: there is no C++ compiler", hint="sudo apt-get install g++")

    monkeypatch.setattr("fiddlerc.hardware.checks.find_toolchain", absent)
    found = {check.name: check for check in doctor()}
    assert found["build tools"].status == "missing"
    assert found["build tools"].hint == "sudo apt-get install g++"
    assert "C++ compiler" not in found


@pytest.mark.parametrize(
    ("version", "status"), [("5.20.0", "ok"), ("6.0", "ok"), ("5.9.1", "missing"), ("4", "missing"), (None, "missing")]
)
def test_a_package_that_is_old_or_absent(monkeypatch: pytest.MonkeyPatch, version: str | None, status: str) -> None:
    real = metadata.version

    def fake(name: str) -> str:
        if name != "transformers":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("fiddlerc.hardware.checks.metadata.version", fake)
    check = {check.name: check for check in doctor()}["transformers"]
    assert check.status == status
    assert check.hint.startswith("pip install") == (status == "missing")


def test_the_releases_that_are_asked_for_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = {*project["dependencies"], *chain(*project["optional-dependencies"].values())}
    assert {f"{package.name}>={package.least[0]}.{package.least[1]}" for package in PACKAGES} <= asked
    assert f"transformers>={hf.OLDEST}" in asked


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path / "file"))
    check = {check.name: check for check in doctor()}["build cache"]
    assert check.status == "missing" and "FIDDLER_CACHE" in check.hint


def test_what_is_missing_comes_with_a_hint(tmp_path: Path) -> None:
    for check in doctor(machine(tmp_path, "sse2", driver=True)):
        assert check.status in ("ok", "missing", "note") and check.detail
        assert check.status != "missing" or check.hint
