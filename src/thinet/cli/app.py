"""The list of subcommands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import typer

from thinet.cli import console
from thinet.cli.bench import bench
from thinet.cli.compare import compare
from thinet.cli.demo import demo
from thinet.cli.evaluate import evaluate
from thinet.cli.export import export
from thinet.cli.finetune import finetune
from thinet.cli.inspect import inspect
from thinet.cli.iterate import iterate
from thinet.cli.paper import paper
from thinet.cli.prune import prune
from thinet.cli.report import report
from thinet.errors import ThinetError

app = typer.Typer(
    name="thinet",
    help="Make trained networks physically smaller: whole channels, verified, repaired.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
COMMANDS = {
    command.__name__: command
    for command in (
        demo, inspect, prune, iterate, finetune, evaluate, compare, bench, export, report, paper
    )
}  # fmt: skip
OPTIONS = {"resume=False (--start-over)": "--start-over", "resume=False": "--start-over"}
"""What the library's messages call by its name in Python, and its name here."""

for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        from thinet import __version__

        console.out.print(f"thinet {__version__}", highlight=False)
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process by default) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments and "--help" not in arguments
    console.reset()
    try:
        with console.results_alone(as_json):
            code = app(arguments, prog_name="thinet", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        return _fail(
            "SystemExit",
            f"the model's code ended the program: sys.exit({error.code!r}); let it raise an error",
            as_json,
        )
    except ThinetError as error:
        return _fail(type(error).__name__, str(error), as_json)
    except OSError as error:
        return _fail(type(error).__name__, _of_the_system(error), as_json)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the command line's own
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        if not message:  # no arguments at all: the help was shown
            return 2
        known = [name for name in arguments[:1] if name in COMMANDS]
        hint = " ".join(["thinet", *known, "--help"])
        return _fail("UsageError", f"{message} `{hint}` shows how", as_json)
    if code == 130:
        console.err.print(f"interrupted: {console.kept()}", style="yellow", highlight=False)
        if as_json:
            print(json.dumps({"error": {"type": "Interrupted", "message": console.kept()}}))  # noqa: T201
    return code if isinstance(code, int) else 0


def _of_the_system(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def _fail(kind: str, message: str, as_json: bool) -> int:
    for word, option in OPTIONS.items():
        message = message.replace(word, option)
    console.err.print("error: ", style="bold red", end="")
    console.say(message)
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}))  # noqa: T201
    return 2
