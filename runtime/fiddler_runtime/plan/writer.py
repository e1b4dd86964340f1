"""Writes a plan: all of it, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import strict
from ..errors import FiddlerError
from .checks import check_files, check_header, check_path, check_tables
from .reader import digest
from .schema import HEADER, TABLES, FileEntry, Header, Plan, Tables
from .tensors import encode_tables

# What may lie at the top of a plan's directory; anything else there is the user's and not ours to replace.
_TOP_LEVEL = {HEADER, TABLES, "kernels", "report.html"}


def write_plan(dest: Path, header: Header, tables: Tables, extra_files: Mapping[str, bytes]) -> Plan:
    """Publishes a plan as the directory `dest`, by rename from a temporary directory beside it.

    header       its files and digest are filled in here, whatever they hold
    extra_files  contents by POSIX path inside the plan; kernels/CMakeLists.txt must be among them

    The same arguments give the same bytes. An existing plan at `dest` is replaced; anything else there is an error. If
    writing fails or is interrupted, `dest` is as it was and nothing is left beside it.
    Raises FiddlerError for values that the reader would not accept, and if the file system refuses.
    """
    for path in extra_files:
        check_path(path)
    if TABLES in extra_files:
        raise FiddlerError(f"{TABLES} is not an extra file", expected="it among the plan's own files only")
    files = {**extra_files, TABLES: encode_tables(tables)}
    entries = tuple(
        FileEntry(path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in sorted(files.items())
    )
    header = _normal(dataclasses.replace(header, files=entries, digest=""))
    header = dataclasses.replace(header, digest=digest(header))
    check_header(header)
    check_files(header.files)
    check_tables(tables, header)

    target = Path(os.path.abspath(dest))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_writer(target.parent):
            check_destination(dest)
            try:
                temporary.mkdir()
                _fill(temporary, {**files, HEADER: strict.dump(header)})
                _publish(temporary, target)
            finally:
                # Also after an interrupt. A published directory has gone from here by then.
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise _refused(dest, error, sum(map(len, files.values()))) from None
    return Plan(dest, header, tables)


def _normal(header: Header) -> Header:
    """The header as a reader would build it: lists as tuples, whole numbers in float fields as floats."""
    return strict.decode(Header, strict.parse(strict.dump(header), "plan.json"), "plan.json")


def check_destination(dest: Path) -> None:
    """Raises FiddlerError unless a plan can be written there: at a new name, or in place of an older plan."""
    folder = _nearest(dest)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refused(dest, PermissionError(errno.EACCES, ""), 0)
    if not os.path.lexists(dest):
        return
    expected = "a new name, or a plan to replace"
    if dest.is_symlink() or not dest.is_dir():
        found = "a symbolic link" if dest.is_symlink() else "a file"
        raise FiddlerError(f"cannot write the plan to {dest}", found=found, expected=expected, hint="choose another -o")
    present = {entry.name for entry in dest.iterdir()}
    if not present:
        return
    if HEADER not in present:
        raise FiddlerError(
            f"cannot write the plan to {dest}",
            found=f"a directory without {HEADER}, with {sorted(present)[0]!r} in it",
            expected=expected,
            hint=f"choose another -o, for example {dest / 'plan'}",
        )
    if foreign := sorted(present - _TOP_LEVEL - _listed(dest)):
        raise FiddlerError(
            f"cannot replace the plan {dest}",
            found=f"{foreign[0]!r} in it, which is not the plan's",
            expected="nothing but the plan",
            hint=f"move {foreign[0]!r} elsewhere, or choose another -o",
        )


def _nearest(dest: Path) -> Path:
    """The folder that it is made in: its own, or the one that that is made in."""
    path = Path(os.path.abspath(dest))
    return next((parent for parent in path.parents if os.path.isdir(parent)), path)


def _listed(dest: Path) -> set[str]:
    """Top-level names that an existing plan lists, as far as its plan.json can be read at all."""
    try:
        files = json.loads((dest / HEADER).read_bytes())["files"]
        return {str(entry["path"]).partition("/")[0] for entry in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files and waits until the disk has them: a rename must not become visible before its contents."""
    folders = {folder}
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        folders |= {folder / parent for parent in Path(name).parents}
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    for each in sorted(folders):
        _sync_folder(each)


@contextlib.contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Writers of plans in one folder take turns. The lock goes with the descriptor, whatever happens."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _publish(temporary: Path, dest: Path) -> None:
    """Renames `temporary` to `dest`; a plan that is there is moved aside first and put back if that fails."""
    if not dest.exists():
        os.rename(temporary, dest)
        _sync_folder(dest.parent)
        return
    old = temporary.with_suffix(".old")
    try:
        os.rename(dest, old)
        os.rename(temporary, dest)
        _sync_folder(dest.parent)
    finally:
        # Also after an interrupt, wherever it struck: either the new plan is there, or the old one is put back.
        if not dest.exists():
            os.rename(old, dest)
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(dest: Path, error: OSError, needed: int) -> FiddlerError:
    what = f"cannot write the plan to {dest}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FiddlerError(
            what,
            found="no space left there",
            expected=f"{needed / 2**20:.1f} MiB",
            hint=f"free some space in {Path(os.path.abspath(dest)).parent}, or choose another -o",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FiddlerError(
            what,
            found=f"no permission to write in {_nearest(dest)}",
            hint="choose another -o, in a directory that you may write to",
        )
    return FiddlerError(what, found=error.strerror or str(error), hint="choose another -o")
