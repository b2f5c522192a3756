"""What a command says: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from thinet import types
from thinet.report import terminal
from thinet.report.data import Report, to_dict

out = Console()
err = Console(stderr=True)

_NOTHING = "nothing was written"
_state = {"kept": _NOTHING}


class _Warnings(logging.Handler):
    """What the library logs (images left out and the like), on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(f"warning: {record.getMessage()}", style="yellow", markup=False, highlight=False)


def reset() -> None:
    """Forget what an earlier command said, and listen to the library."""
    _state["kept"] = _NOTHING
    log = logging.getLogger("thinet")
    if not any(isinstance(handler, _Warnings) for handler in log.handlers):
        log.addHandler(_Warnings(logging.WARNING))


def keeps(what: str) -> None:
    """Say what will be left behind if the user stops the command from now on."""
    _state["kept"] = what


def kept() -> str:
    """What is left behind if the command stops now."""
    return _state["kept"]


def say(message: str) -> None:
    """One line for people, on stderr."""
    err.print(message, markup=False, highlight=False, soft_wrap=True)


def show(report: Report, *, as_json: bool, extra: dict[str, Any] | None = None) -> None:
    """The result of a command, on stdout."""
    if as_json:
        show_json({**to_dict(report), **(extra or {})})
    else:
        terminal.show(report, out)


def show_json(data: dict[str, Any]) -> None:
    """A result that a program reads, on stdout and nothing else."""
    out.file.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


@contextmanager
def progress() -> Generator[types.Progress]:
    """Bars on stderr, one for each thing that is being done; silent where nobody looks."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def update(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        yield update
