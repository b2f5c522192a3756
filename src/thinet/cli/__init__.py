"""The command line: one file a subcommand, each a thin layer over the library's verbs."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `thinet`; always ends the process with an exit code.

    0 done, 1 some cells of a comparison failed (the others are shown), 2 something that the user
    can mend (one message, no traceback), 130 interrupted.
    """
    try:
        from thinet.cli.app import run
    except KeyboardInterrupt:  # the libraries take a second or more to load
        raise SystemExit(130) from None
    raise SystemExit(run(arguments))
