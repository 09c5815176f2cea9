"""Files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from vitrail.errors import UserError, VitrailError

UNFINISHED = ".unfinished-"
"""How the name of a file or folder begins while it is being written."""


def write_atomically(path: Path, data: bytes, failure: type[VitrailError] = UserError) -> None:
    """Writes a file under another name, brings it to the disk, and only then gives it its own name.

    Raises `failure` when the disk is full or refuses; what was there before is then untouched.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}.{secrets.token_hex(4)}")  # others may write it too
    try:
        write_through(unfinished, data)
        os.replace(unfinished, path)
        flush_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        cure = " Make room, then go on." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise failure(f"Cannot write {path}: {error.strerror or error}.{cure}") from error


def write_through(path: Path, data: bytes | memoryview) -> None:
    """Writes a file and brings it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Brings renames to the disk, where the system lets a folder be opened and flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
