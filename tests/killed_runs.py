"""Runs that are killed at random moments, and started again until they are through."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[Path], str]
"""Goes on in a folder, and says what came out."""


def killed_run(work: Work, folder: Path, delays: random.Random, longest: float) -> tuple[str, int]:
    """What came out in the end, and how often it was killed."""
    answer, kills = folder / "answer", 0
    while True:
        child = os.fork()
        if child == 0:
            answer.write_text(work(folder / "run"))
            os._exit(0)
        deadline = time.monotonic() + delays.uniform(0.0, longest) * (1 + kills / 10)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                return answer.read_text(), kills
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return answer.read_text(), kills
        kills += 1


def compare_with_whole(whole: Work, work: Work) -> None:
    """Print as JSON what an undisturbed run and some killed ones give (arguments: seed, rounds)."""
    with tempfile.TemporaryDirectory() as folder:
        whole(Path(folder))  # also imports what the forked processes need
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        undisturbed = whole(Path(folder))
        seconds = time.monotonic() - began
    delays = random.Random(int(sys.argv[1]))
    rounds: list[tuple[str, int]] = []
    for _ in range(int(sys.argv[2])):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(killed_run(work, Path(folder), delays, seconds / 2))
    print(json.dumps({"whole": undisturbed, "rounds": rounds, "seconds": seconds}))  # noqa: T201
