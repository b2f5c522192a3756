"""Runs that are started again while they still run.

Run as a program it prints JSON: for each kind of run what the second process was told, whether it
left the folder alone, and what came out once the first was killed.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import compared_runs, interrupted_runs, iterated_runs
from thinet.errors import CheckpointError
from thinet.train.finetune import finetune

Work = Callable[..., str]
"""Goes on in a folder, with options, and says what came out."""


def tuned(folder: Path, **options: Any) -> str:
    """Fine-tuning whose data is loaded by a forked process, which the kill does not reach."""
    data = interrupted_runs.noisy_data(workers=1)
    options = {"epochs": 1, "config": interrupted_runs.CONFIG, "checkpoint": folder, **options}
    return interrupted_runs.digest(finetune(interrupted_runs.dropping_net(), data, **options))


def iterated(folder: Path, **options: Any) -> str:
    return iterated_runs.digest(iterated_runs.iterated(folder, **options))


def compared(folder: Path, **options: Any) -> str:
    return json.dumps(compared_runs.facts(compared_runs.compared(folder, **options)))


def names(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def overlapped(work: Work, folder: Path) -> dict[str, Any]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:

        def wait(what: str, *_: object) -> None:
            if what.startswith("epoch"):
                os.write(write, b".")
                time.sleep(600)

        work(folder, progress=wait)
        os._exit(1)
    os.read(read, 1)
    before, said = names(folder), "nothing"
    try:
        work(folder)
    except CheckpointError as error:
        said = str(error)
    untouched = names(folder) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"said": said, "untouched": untouched, "came out": work(folder)}


def main() -> None:
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for work in (tuned, iterated, compared):
        with tempfile.TemporaryDirectory() as folder:
            whole = work(Path(folder) / "whole")
            told[work.__name__] = {
                **overlapped(work, Path(folder) / "run"),
                "whole": whole,
                "folder": str(Path(folder) / "run"),
                "left": [path.name for path in Path(folder).rglob(".*")],
            }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
