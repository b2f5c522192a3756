"""`thinet report`: show a result that was kept as JSON, or turn it into a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from thinet.cli import console, options
from thinet.cli.files import REPORTS, check_output, write_report
from thinet.errors import OptionError
from thinet.report.data import Report, from_dict


def report(
    result: Annotated[
        Path,
        typer.Argument(
            metavar="RESULT.json",
            help="What --json of prune, iterate, finetune, compare, inspect or bench printed.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as .html, .md or .json.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show a kept result, or write it as a page.

    `thinet prune MODEL ... --json > result.json`

    `thinet report result.json --out result.html`
    """
    if out is not None:
        check_output(out, force=force, suffixes=REPORTS)
    data = read(result)
    if out is not None:
        write_report(data, out)
        console.say(f"wrote {out}")
    if out is None or as_json:
        console.show(data, as_json=as_json)


def read(path: Path) -> Report:
    """The report in a JSON file.

    Raises:
        OptionError: there is no such file, or it holds no report.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise OptionError(f"{path} is not JSON ({error}); give what --json printed") from error
    if not isinstance(data, dict):
        raise OptionError(f"{path} holds no report; give what --json printed")
    try:
        return from_dict(data)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
