"""One process at a time works in a folder."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thinet.errors import CheckpointError

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process while the block runs; the folder is made if need be.

    It is a record lock of POSIX: forked processes (workers that load data) do not inherit it, and
    it is gone as soon as this process is, killed or not. Where there are no locks (on Windows, on
    some network file systems) or no file can be made, the block runs without.

    Raises:
        CheckpointError: another process holds the folder.
    """
    handle = _taken(folder)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                if _is_at(handle, folder / NAME):
                    (folder / NAME).unlink()  # while it is held: it may be another's afterwards
            os.close(handle)


def _taken(folder: Path) -> int | None:
    """A handle of the locked file. To close any handle of that file here ends the lock."""
    if sys.platform == "win32":
        return None
    import fcntl

    path = folder / NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # whoever writes there says what is wrong
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"another process works in {folder}; wait for it, or give another folder"
                ) from error
            path.unlink(missing_ok=True)
            return None
        if _is_at(handle, path):
            return handle
        os.close(handle)  # its holder removed it before this process had it


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False
