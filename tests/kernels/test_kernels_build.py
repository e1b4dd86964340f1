"""Building and caching: what is built once, what a damaged cache leads to, and what every missing tool is called."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddler_runtime import build
from fiddler_runtime.errors import FiddlerError
from fiddlerc.codegen import generate


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library's sources, and an empty cache."""
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return generate(8, 8, ["scalar"]).write(tmp_path / "kernels")


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """only("c++", "make"): no other program can be found."""

    def limit(*names: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            program = shutil.which(name)
            assert program is not None, name
            (folder / name).symlink_to(program)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(folder))

    return limit


def test_built_once_then_taken_from_the_cache(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int, int]] = []
    library = build.build_kernels(sources, progress=lambda *step: steps.append(step))
    assert library.name == "libfdl_bf16_moe_h8_i8.so"
    assert library.is_relative_to(tmp_path / "cache")
    assert steps[0] == ("building kernels", 0, 1) and steps[-1] == ("building kernels", 1, 1)
    moved = tmp_path / "moved"
    shutil.copytree(sources, moved)
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert build.build_kernels(moved) == library
    leftovers = [path.name for path in library.parent.parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []


@pytest.mark.slow
def test_a_build_is_the_same_bytes_wherever_it_is_made(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build_kernels(sources).read_bytes()
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path / "another" / "cache"))
    other = tmp_path / "elsewhere" / "deeper" / "kernels"
    shutil.copytree(sources, other)
    assert build.build_kernels(other).read_bytes() == first
    assert str(tmp_path).encode() not in first


@pytest.mark.slow
def test_a_damaged_cache_is_built_again(sources: Path) -> None:
    library = build.build_kernels(sources)
    good = library.read_bytes()
    library.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert build.build_kernels(sources).read_bytes() == good
    (library.parent / "build.json").write_text("{}")
    assert build.build_kernels(sources) == library
    record = json.loads((library.parent / "build.json").read_text())
    assert record["library"] == library.name


@pytest.mark.slow
def test_other_sources_are_another_build(sources: Path) -> None:
    first = build.build_kernels(sources)
    with (sources / "library.cpp").open("a") as file:
        file.write("// changed\n")
    assert build.build_kernels(sources) != first


def test_builds_at_the_same_time_share_the_work(sources: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.build_kernels(sources))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1


def test_flags_of_the_environment_do_not_reach_the_kernels(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "--no-such-flag")
    monkeypatch.setenv("LDFLAGS", "--no-such-flag")
    assert build.build_kernels(sources).is_file()


def test_code_that_does_not_compile_is_reported_with_its_log(sources: Path) -> None:
    (sources / "library.cpp").write_text("#error broken on purpose\n")
    with pytest.raises(FiddlerError, match=r"could not be built.*broken on purpose") as caught:
        build.build_kernels(sources)
    assert caught.value.hint is not None
    log = Path(caught.value.hint.split()[1])
    assert "broken on purpose" in log.read_text()
    assert [path for path in log.parent.iterdir() if path.is_dir()] == []


def test_an_interrupted_build_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build_kernels(sources, progress=interrupt)
    left = [path.name for path in (tmp_path / "cache" / "kernels").iterdir() if path.suffix != ".lock"]
    assert left == []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(tmp_path).encode() not in path.read_bytes(), "a compiler goes on"
    assert build.build_kernels(sources).is_file()


def test_no_compiler(sources: Path, only: Callable[..., None]) -> None:
    only("cmake")
    with pytest.raises(FiddlerError, match=r"there is no C\+\+ compiler") as caught:
        build.build_kernels(sources)
    assert "apt-get install g++" in str(caught.value.hint)


def test_no_cmake(sources: Path, only: Callable[..., None]) -> None:
    only("c++")
    with pytest.raises(FiddlerError, match="there is no CMake") as caught:
        build.build_kernels(sources)
    assert caught.value.hint == "pip install cmake"


def test_neither_ninja_nor_make(sources: Path, only: Callable[..., None]) -> None:
    only("c++", "cmake")
    with pytest.raises(FiddlerError, match="neither Ninja nor make"):
        build.build_kernels(sources)


def test_without_a_compiler_an_earlier_build_still_serves(sources: Path, only: Callable[..., None]) -> None:
    library = build.build_kernels(sources)
    only()
    assert build.build_kernels(sources) == library


def test_a_wrong_compiler_is_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FiddlerError, match="CXX names no C\\+\\+ compiler: found 'no-such-compiler'"):
        build.build_kernels(sources)
    monkeypatch.setenv("CXX", "g++'")
    with pytest.raises(FiddlerError, match="CXX names no C\\+\\+ compiler"):
        build.find_toolchain()
    monkeypatch.setenv("CXX", shutil.which("false") or "/bin/false")
    with pytest.raises(FiddlerError, match="does not work"):
        build.build_kernels(sources)


def test_an_unknown_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDDLER_CACHE", "~no-such-user/builds")
    with pytest.raises(FiddlerError, match="found ~no-such-user/builds, and no such home folder"):
        build.cache_dir()


def test_a_cache_that_cannot_be_written(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIDDLER_CACHE", str(tmp_path / "file"))
    with pytest.raises(FiddlerError, match="cannot use the build cache") as caught:
        build.build_kernels(sources)
    assert "FIDDLER_CACHE" in str(caught.value.hint)


def test_a_full_disk(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(build, "_build", full)
    with pytest.raises(FiddlerError, match="no space left"):
        build.build_kernels(sources)


def test_a_folder_without_sources(tmp_path: Path) -> None:
    with pytest.raises(FiddlerError, match="no kernel sources"):
        build.build_kernels(tmp_path)


def _cmake(*arguments: str) -> subprocess.CompletedProcess[str]:
    cmake = build.find_toolchain().cmake
    return subprocess.run([str(cmake), *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_cmake_at_the_top_builds_a_plan(sources: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    sources.rename(tmp_path / "moved")
    plan.mkdir()
    (tmp_path / "moved").rename(plan / "kernels")
    top, work = str(Path(__file__).parents[2]), str(tmp_path / "work")
    configured = _cmake("-S", top, "-B", work, f"-DFIDDLER_PLAN={plan}")
    assert configured.returncode == 0, configured.stderr
    built = _cmake("--build", work)
    assert built.returncode == 0, built.stdout
    assert (tmp_path / "work" / "libfdl_bf16_moe_h8_i8.so").is_file()


def test_cmake_at_the_top_asks_for_a_plan(tmp_path: Path) -> None:
    top = str(Path(__file__).parents[2])
    none = _cmake("-S", top, "-B", str(tmp_path / "none"))
    assert none.returncode != 0 and "-DFIDDLER_PLAN=plans/NAME" in none.stderr
    wrong = _cmake("-S", top, "-B", str(tmp_path / "wrong"), f"-DFIDDLER_PLAN={tmp_path}")
    assert wrong.returncode != 0 and "it is not a plan" in wrong.stderr
