"""Output files: checked before any work is done, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from thinet.errors import CheckpointError, OptionError
from thinet.report import html, markdown
from thinet.report.data import Report, to_dict
from thinet.whole_file import write_text

REPORTS = (".html", ".md", ".json")


def check_output(path: Path, *, force: bool, suffixes: tuple[str, ...] = ()) -> Path:
    """A path that can be written later, or an error now, before the work.

    Raises:
        OptionError: the name does not end as it should.
        CheckpointError: it exists (without `force`), is a folder, or cannot be written.
    """
    if suffixes and path.suffix not in suffixes:
        raise OptionError(f"{path}: the name must end with {' or '.join(suffixes)}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of a file")
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; give another name, or --force to write over it")
    check_folder(path.parent)
    return path


def check_folder(folder: Path) -> None:
    """Make a folder if need be and prove that files can be written in it.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write in {folder} ({error.strerror}); give a path that can be written"
        ) from error


def write_report(report: Report, path: Path) -> None:
    """A report in the form that the name ends with: .html, .md or .json."""
    if path.suffix == ".html":
        write_text(path, html.render(report))
    elif path.suffix == ".md":
        write_text(path, markdown.render(report))
    else:
        write_text(path, json.dumps(to_dict(report), indent=2, allow_nan=False) + "\n")
