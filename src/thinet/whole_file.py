"""Files that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """An empty file to be written in the block, which gets the name `path` at its end.

    It lies in a hidden folder beside `path`, since some writers make files of their own there. It
    is on the disk before it has its name. Whatever stops the block, what was there before stays and
    the folder is removed; only a process that is killed leaves it (`tidy`). The mode follows the
    umask, as that of any new file.

    A link stays one: what it points to is replaced.

    Raises:
        OSError: it cannot be made, written or renamed, or is there and no file (a device).
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is there and no regular file", str(path))
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        if unfinished.stat().st_mode != mode:
            unfinished.chmod(mode)  # safetensors writes files that only their owner may read
        _to_disk(unfinished)
        unfinished.replace(path)
    with suppress(OSError):  # not every system lets a folder be opened or synchronised
        _to_disk(path.parent)


def tidy(folder: Path, name: str) -> None:
    """Remove what killed processes left of files in a folder that nobody else works in.

    Args:
        name: how the names of these files begin.
    """
    for left in folder.glob(f".{name}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A whole file of text; errors as `whole_file`."""
    with whole_file(path) as unfinished:
        # names of files need not be UTF-8
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any) -> None:
    """A whole file of JSON; errors as `whole_file`."""
    write_text(path, json.dumps(data, indent=1))


def _to_disk(path: Path) -> None:
    # Windows synchronises only what may be written, others also what may be read
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
