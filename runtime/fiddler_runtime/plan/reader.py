"""Reads a plan, and believes nothing: format, canonical bytes, digest, ABI, files, tables, in that order."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from .. import strict
from ..errors import FiddlerError
from .checks import check_files, check_header, check_tables
from .schema import ABI_VERSION, FORMAT_MAJOR, FORMAT_MINOR, HEADER, TABLES, FileEntry, Header, Plan
from .tensors import MAX_BYTES, decode_tables

_MAX_HEADER_BYTES = 1 << 24
_CHUNK = 1 << 20
_MEND = "copy it again, or make it again: fiddlerc compile MODEL --hw HW -o {path}"


def read_plan(path: Path, verify: bool = True) -> Plan:
    """The plan in directory `path`.

    verify  hash every file; otherwise only sizes, the header and the tables are checked

    Raises FiddlerError, which names the plan and what in it is wrong, for everything that `write_plan` would not have
    written: another format or ABI, unknown or missing keys, another file list, sizes or contents, values out of range.
    """
    text = _read_header(path)
    try:
        value = strict.parse(text, "plan.json")
        _check_version(value)
        header = strict.decode(Header, value, "plan.json")
        if strict.dump(header) != text:
            raise FiddlerError(
                "plan.json is damaged", found="other bytes than its values have", expected="canonical JSON"
            )
        if (found := digest(header)) != header.digest:
            raise FiddlerError("plan.json is damaged", found=f"the digest {found}", expected=header.digest)
        if header.abi != ABI_VERSION:
            raise FiddlerError(
                "the kernels' interface is of another version",
                found=f"ABI {header.abi}",
                expected=f"ABI {ABI_VERSION}",
                hint=f"compile it again with this version: fiddlerc compile MODEL --hw HW -o {path}",
            )
        check_header(header)
        check_files(header.files)
        _check_listing(path, header.files)
        for entry in header.files:
            _check_file(path, entry, verify)
        tables = decode_tables(_read_regular(path / TABLES, MAX_BYTES), TABLES)
        check_tables(tables, header)
    except FiddlerError as error:
        raise FiddlerError(
            f"cannot use the plan {path}: {error.what}",
            found=error.found,
            expected=error.expected,
            hint=error.hint or _MEND.format(path=path),
        ) from None
    return Plan(path, header, tables)


def peek_version(path: Path) -> tuple[int, int] | None:
    """The format version that a plan claims, even if the rest of it cannot be understood; None if it claims none."""
    try:
        value = strict.parse(_read_header(path), "plan.json")
        return _version(value)
    except FiddlerError:
        return None


def digest(header: Header) -> str:
    """sha256 over the canonical header whose digest is the empty text. It covers every file through its sha256."""
    return hashlib.sha256(strict.dump(dataclasses.replace(header, digest=""))).hexdigest()


def _read_header(path: Path) -> bytes:
    if not os.path.exists(path):
        raise FiddlerError(
            f"no such plan: {path}", hint=f"fiddlerc compile MODEL --hw HW -o {path}   (plans/ has ready ones)"
        )
    if not os.path.isdir(path):
        raise FiddlerError(
            f"{path} is not a plan",
            found="a file",
            expected=f"a directory with {HEADER}",
            hint=f"give the folder: {path.parent}" if path.name == HEADER else "fiddlerc compile MODEL --hw HW -o PLAN",
        )
    if not os.path.lexists(path / HEADER):
        raise FiddlerError(
            f"{path} is not a plan",
            found=f"a directory without {HEADER}",
            expected="a directory written by fiddlerc compile",
            hint="fiddlerc compile MODEL --hw HW -o PLAN",
        )
    try:
        return _read_regular(path / HEADER, _MAX_HEADER_BYTES)
    except FiddlerError as error:
        raise FiddlerError(
            f"cannot use the plan {path}: {error.what}",
            found=error.found,
            expected=error.expected,
            hint=_MEND.format(path=path),
        ) from None


def _version(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, dict):
        return None
    major, minor = value.get("format_major"), value.get("format_minor")
    if type(major) is not int or type(minor) is not int or not (0 <= major < 10**6 and 0 <= minor < 10**6):
        return None
    return major, minor


def _check_version(value: Any) -> None:
    """Before anything else is looked at: keys of another format are not for this reader to judge.

    A newer minor version is refused as well: it exists because there are keys that a strict reader does not know.
    """
    version = _version(value)
    if version is None:
        raise FiddlerError(
            "plan.json does not say of which format it is", expected="whole numbers format_major and format_minor"
        )
    ours = (FORMAT_MAJOR, FORMAT_MINOR)
    if version > ours:
        raise FiddlerError(
            "it is of a newer format",
            found=f"plan format {version[0]}.{version[1]}",
            expected=f"at most {ours[0]}.{ours[1]}, which this runtime reads",
            hint="pip install --upgrade fiddlerc",
        )
    if version[0] < FORMAT_MAJOR:
        raise FiddlerError(
            "it is of an older format",
            found=f"plan format {version[0]}.{version[1]}",
            expected=f"{FORMAT_MAJOR}.0 to {ours[0]}.{ours[1]}",
            hint="compile it again: fiddlerc compile MODEL --hw HW -o PLAN",
        )


def _check_listing(path: Path, files: tuple[FileEntry, ...]) -> None:
    """The directory holds plan.json and the listed files, all of them regular, and nothing else but folders."""
    listed = {entry.path for entry in files} | {HEADER}
    present: set[str] = set()
    pending = [path]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise FiddlerError(f"cannot read the folder {folder.name}", found=error.strerror) from None
        for entry in entries:
            name = Path(entry.path).relative_to(path).as_posix()
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                kind = "a symbolic link" if entry.is_symlink() else "a special file"
                raise FiddlerError(f"{name!r} in it is {kind}", expected="regular files only")
            elif name not in listed:
                raise FiddlerError(
                    "it holds a file that plan.json does not list",
                    found=repr(name),
                    expected="the listed files only",
                    hint=f"move {name!r} out of {path}, or make the plan again",
                )
            else:
                present.add(name)
    if missing := sorted(listed - present):
        raise FiddlerError("a file is missing from it", found=f"no {missing[0]}", expected=f"{len(listed)} files")


def _check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    file = path / entry.path
    size = file.lstat().st_size
    if size != entry.bytes:
        raise FiddlerError(f"{entry.path} has another size", found=f"{size} bytes", expected=f"{entry.bytes} bytes")
    if not verify:
        return
    sha256 = hashlib.sha256()
    with _open_regular(file) as stream:
        while chunk := stream.read(_CHUNK):
            sha256.update(chunk)
    if sha256.hexdigest() != entry.sha256:
        raise FiddlerError(
            f"{entry.path} has other contents", found=f"sha256 {sha256.hexdigest()}", expected=entry.sha256
        )


def _read_regular(file: Path, limit: int) -> bytes:
    """A regular file's bytes, if there are at most `limit` of them."""
    with _open_regular(file) as stream:
        data: bytes = stream.read(limit + 1)
    if len(data) > limit:
        raise FiddlerError(f"{file.name} is too large", found=f"over {limit} bytes", expected=f"at most {limit} bytes")
    return data


def _open_regular(file: Path) -> Any:
    """Opens a file for reading; never follows a link there and never waits on a pipe."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        link = file.is_symlink()
        raise FiddlerError(
            f"cannot read {file.name}",
            found="a symbolic link" if link else error.strerror,
            expected="a regular file" if link else None,
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FiddlerError(f"cannot read {file.name}", found="something else", expected="a regular file")
    return os.fdopen(descriptor, "rb")
