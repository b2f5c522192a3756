"""The state of a comparison on disk: its settings, and one line of JSON for each finished cell.

A folder holds `settings.json`, written once and whole, and `cells.jsonl`, to which a line is added
as soon as a cell is finished. Killed while it writes, a run leaves half a line at the end, which
the next one cuts off.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinet.errors import CheckpointError
from thinet.train.identity import differences
from thinet.whole_file import tidy, write_json

SETTINGS = "settings.json"
CELLS = "cells.jsonl"
FORMAT = 1
SHOWN = 4
"""How many differences an error names."""


class Journal:
    """The folder of one comparison.

    Args:
        folder: made if it is not there.
        identity: everything that decides what is in a cell, as plain data.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))

    @property
    def unfinished(self) -> Path:
        """A folder for the state of the cell that is being worked on."""
        return self.folder / "unfinished"

    def open(self, *, resume: bool) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """What `begin` was given and the lines so far; None and no lines at a beginning.

        Raises:
            CheckpointError: the folder holds a run with other settings (says which), its files are
                damaged, or it cannot be written.
        """
        if self.folder.is_file():
            raise CheckpointError(f"{self.folder} is a file; give a folder for the state")
        settings, cells = self.folder / SETTINGS, self.folder / CELLS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tidy(self.folder, SETTINGS)
            if resume and not settings.exists() and (cells.exists() or self.unfinished.exists()):
                raise CheckpointError(
                    f"{self.folder} holds {CELLS} or {self.unfinished.name} without a {SETTINGS} "
                    "that says what they are of; give another folder, or resume=False to remove "
                    "them and start over"
                )
            if not resume or not settings.exists():
                cells.unlink(missing_ok=True)
                self.clear()
                settings.unlink(missing_ok=True)  # last: without it the others are nobody's
                return None, []
            return self._facts(settings), self._lines(cells)
        except OSError as error:
            raise CheckpointError(
                f"the state in {self.folder} cannot be read or written: {error}"
            ) from error

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write the settings, and facts that hold for all cells.

        Raises:
            CheckpointError: the file cannot be written.
        """
        data = {"thinet_compare": FORMAT, "identity": self._identity, "facts": facts}
        path = self.folder / SETTINGS
        try:
            write_json(path, data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    def add(self, line: Mapping[str, Any]) -> None:
        """Write down a finished cell, and forget its unfinished state.

        Raises:
            CheckpointError: the line cannot be written; what was written before stays.
        """
        path = self.folder / CELLS
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        self.clear()

    def clear(self) -> None:
        """Forget the unfinished cell."""
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def check(self, saved: Any, given: Any) -> None:
        """Raise a `CheckpointError` that names what differs, if anything does."""
        different = differences(saved, given)
        if different:
            more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            raise CheckpointError(
                f"{self.folder} holds a comparison that was started differently: "
                f"{'; '.join(different[:SHOWN])}{more}. Give what it was started with, another "
                "folder, or resume=False (--start-over) to start over"
            )

    def _facts(self, path: Path) -> dict[str, Any]:
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            if data["thinet_compare"] != FORMAT:
                raise CheckpointError(f"{path} is of another version of thinet")
            saved, facts = data["identity"], dict(data["facts"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}); delete {self.folder}, or start over with "
                "resume=False"
            ) from error
        self.check(saved, self._identity)
        return facts

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if len(whole) < len(written):
            os.truncate(path, len(whole))
        found: list[dict[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise CheckpointError(
                    f"line {number} of {path} is damaged ({error}); remove that line, and its cell "
                    "is done again"
                ) from error
        return found
