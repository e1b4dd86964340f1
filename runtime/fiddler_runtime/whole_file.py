"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside `path` and renames it; of a link, to where it leads.

    Whatever happens, the file is as it was or holds all of `data`, and nothing else is left. Raises OSError, also for
    what is there but no regular file: a rename would put a file in a device's place.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "a directory" if target.is_dir() else "a device or pipe")
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
