"""What a command says: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

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

# names and messages are the user's: ":x:" and "[red]" in them are letters
out = Console(emoji=False, markup=False)
err = Console(stderr=True, emoji=False, markup=False)

_NOTHING = "nothing was written"
_state = {"kept": _NOTHING}
_results: list[TextIO] = []


class _Warnings(logging.Handler):
    """What the library logs (images left out and the like), on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


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
    err.print(message, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """One line that a reader must not miss, on stderr."""
    err.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


@contextmanager
def results_alone(wanted: bool) -> Generator[None]:
    """Inside, if wanted, stdout takes results only: what the user's model prints is on stderr."""
    if not wanted:
        yield
        return
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def show(report: Report, *, as_json: bool, extra: dict[str, Any] | None = None) -> None:
    """The result of a command, on stdout."""
    if as_json:
        show_json({**to_dict(report), **(extra or {})})
    else:
        terminal.show(report, out)


def show_json(data: dict[str, Any]) -> None:
    """A result that a program reads, on stdout and nothing else."""
    write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def write(text: str) -> None:
    """Text as it is, on the command's own stdout."""
    (_results[-1] if _results else out.file).write(text)


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
