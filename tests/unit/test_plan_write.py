"""Writing plans: all or nothing, the same bytes every time, never over something else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plan_samples import FILES, sample_header, sample_model, sample_tables, write_sample

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import FORMAT_MAJOR, FORMAT_MINOR, MemoryItem, peek_version, read_plan, write_plan, writer


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_sample(tmp_path / "plan")
    read = read_plan(tmp_path / "plan")
    assert read.header == written.header
    assert [entry.path for entry in read.header.files] == sorted([*FILES, "tables.safetensors"])
    for name in vars(read.tables):
        np.testing.assert_array_equal(getattr(read.tables, name), getattr(written.tables, name))
    assert peek_version(tmp_path / "plan") == (FORMAT_MAJOR, FORMAT_MINOR)


def test_two_writes_are_byte_identical_whatever_the_order_of_files(tmp_path: Path) -> None:
    write_sample(tmp_path / "a")
    write_plan(tmp_path / "b", sample_header(), sample_tables(), dict(reversed(FILES.items())))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "a").values())


def test_a_moved_plan_is_the_same_plan(tmp_path: Path) -> None:
    header = write_sample(tmp_path / "a").header
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").rename(tmp_path / "elsewhere" / "b")
    assert read_plan(tmp_path / "elsewhere" / "b").header == header


def test_whole_numbers_in_float_fields_are_written_as_a_reader_expects(tmp_path: Path) -> None:
    placement = replace(sample_header().placement, hit_rate=1, random_hit_rate=0)
    write_sample(tmp_path / "plan", placement=placement)
    assert read_plan(tmp_path / "plan").header.placement.hit_rate == 1.0


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_sample(tmp_path / "a" / "b" / "plan")
    read_plan(tmp_path / "a" / "b" / "plan")


def test_an_old_plan_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_sample(tmp_path / "plan")
    write_sample(tmp_path / "plan", assumptions=("another",))
    assert read_plan(tmp_path / "plan").header.assumptions == ("another",)
    assert os.listdir(tmp_path) == ["plan"]


def test_a_damaged_plan_is_replaced(tmp_path: Path) -> None:
    write_sample(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_bytes(b"{")
    write_sample(tmp_path / "plan")
    read_plan(tmp_path / "plan")


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    write_sample(tmp_path / "plan")
    read_plan(tmp_path / "plan")


def make_file(dest: Path) -> None:
    dest.write_text("mine")


def make_folder(dest: Path) -> None:
    dest.mkdir()
    (dest / "thesis.tex").write_text("mine")


def make_link(dest: Path) -> None:
    dest.symlink_to(dest.parent)


def make_plan_with_notes(dest: Path) -> None:
    write_sample(dest)
    (dest / "notes.txt").write_text("mine")


@pytest.mark.parametrize("make", [make_file, make_folder, make_link, make_plan_with_notes])
def test_nothing_but_a_plan_is_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "plan")
    before = contents(tmp_path)
    with pytest.raises(FiddlerError, match="plan") as raised:
        write_sample(tmp_path / "plan")
    assert raised.value.hint is not None
    assert "-o" in raised.value.hint
    assert contents(tmp_path) == before


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old plan"])
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EACCES, "Permission denied"), "no permission"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (KeyboardInterrupt(), ""),
    ],
    ids=["disk full", "permission", "other", "interrupt"],
)
@pytest.mark.parametrize("where", ["_fill", "_publish"])
def test_failing_leaves_everything_as_it_was(
    old: bool, failure: BaseException, words: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        write_sample(tmp_path / "plan")
    before = contents(tmp_path)

    def fail(*arguments: object) -> None:
        raise failure

    if where == "_fill":
        monkeypatch.setattr(writer.os, "fsync", fail)
    else:
        real = os.rename
        renames: list[Path] = []

        def rename(source: Path, target: Path) -> None:
            renames.append(target)
            # The rename that would publish; the ones that move the old plan aside and back are carried out.
            if len(renames) == (2 if old else 1):
                raise failure
            real(source, target)

        monkeypatch.setattr(writer.os, "rename", rename)
    with pytest.raises((FiddlerError, KeyboardInterrupt)) as raised:
        write_sample(tmp_path / "plan", assumptions=("another",))
    assert isinstance(raised.value, KeyboardInterrupt) == isinstance(failure, KeyboardInterrupt)
    assert words in str(raised.value)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["plan"] if old else [])


@pytest.mark.parametrize(
    "path",
    ["../x", "/x", "a//b", "a/./b", "a\\b", "c:x", "", "~/x", "x\n", "plan.json", "tables.safetensors", "k" * 201],
)
def test_file_names_that_leave_the_plan_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(FiddlerError):
        write_plan(tmp_path / "plan", sample_header(), sample_tables(), {**FILES, path: b""})
    assert not os.listdir(tmp_path)


def test_values_that_no_reader_would_accept_are_not_written(tmp_path: Path) -> None:
    for header in (
        sample_header(model=sample_model(top_k=5)),
        sample_header(memory=(MemoryItem("too much", 1 << 40),)),
    ):
        with pytest.raises(FiddlerError):
            write_plan(tmp_path / "plan", header, sample_tables(), FILES)
    with pytest.raises(FiddlerError, match="cpu_us"):
        write_plan(tmp_path / "plan", sample_header(), sample_tables(cpu_us=np.ones(8, np.float64)), FILES)
    assert not os.listdir(tmp_path)


def test_writers_of_the_same_plan_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_sample(tmp_path / "plan"), range(12)))
    assert read_plan(tmp_path / "plan").path == tmp_path / "plan"
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
