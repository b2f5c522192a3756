"""Runs of two processes, started by forking, that are killed again and again.

Run as a program, `SEED ROUNDS`, it prints JSON: the digests of the runs that nobody kills, and for
each round those of the run of which one process or both were killed, and how often. Forking after
the imports makes a start cheap; the children find each other as those of `accelerate launch` do.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

import thinet
from tests.chains import images, labelled_batches
from tests.interrupted_runs import CONFIG, digest, trained
from thinet.errors import ThinetError
from thinet.loop import IterateResult
from thinet.recipes.recipe import Recipe, Step, Tuning
from thinet.train.config import FinetuneConfig
from thinet.train.group_sparsity import GroupSparsity
from thinet.train.processes import current

Work = Callable[[int], Any]
"""What one process does, by its rank; its answer must go through JSON."""

TAPS = replace(CONFIG, group_sparsity=GroupSparsity(1e-3, keep=0.4, until=0.9))
RECIPE = Recipe(
    "two-steps",
    (Step("one", {"one": 5}, Tuning(2, 0.02)), Step("two", {"two": 4}, Tuning(1, 0.01))),
)


class TinyVgg(nn.Module):
    """Three convolutions without norms: two processes compute what one that accumulates does."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(8, 8, 3)
        self.out = nn.Linear(8, 5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.one(x)), 2)
        x = torch.relu(self.three(torch.relu(self.two(x))))
        return self.out(x.mean((2, 3)))


def step_by_step(folder: Path, *, seed: int = 0, accumulate: int = 1, **more: Any) -> IterateResult:
    """Two cuts with training in between, in double precision."""
    batches = [(x.double(), y) for x, y in labelled_batches(side=8)]
    calibration = [x.double() for x in images(24, 8).split(8)]
    return thinet.iterate(
        TinyVgg(seed), images(1, 8).double(), calibration, recipe=RECIPE, train=batches,
        validation=batches, state_dir=folder, config=FinetuneConfig(accumulate=accumulate), **more,
    )  # fmt: skip


def start(work: Work, folder: Path, rank: int, port: int) -> int:
    """Fork one of two processes; its answer becomes a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
        code = 0
    except Exception:  # noqa: BLE001  the parent shows it
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ended(child: int, seconds: float) -> int | None:
    """The exit status of a process, None if it still runs after so long."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def answers(folder: Path) -> list[Any]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def undisturbed(work: Work, folder: Path) -> list[Any]:
    """The answers of two processes that nobody kills."""
    port = free_port()
    children = [start(work, folder, rank, port) for rank in (0, 1)]
    if [ended(child, 60) for child in children] != [0, 0]:
        raise RuntimeError("\n".join(p.read_text() for p in folder.glob("*.error")))
    return answers(folder)


def killed(
    work: Work, folder: Path, delays: random.Random, longest: float
) -> tuple[list[Any], int]:
    """Start both, kill one or both, start again, until both are through.

    Where one is killed the other gets a while to end by itself, then it is killed as well, as the
    launcher would do.
    """
    kills = 0
    while True:
        port = free_port()
        children = [start(work, folder, rank, port) for rank in (0, 1)]
        victims = delays.choice([[0], [1], [0, 1]])
        delay = delays.uniform(0.0, longest) * (1 + kills / 10)
        statuses = [ended(children[0], delay), ended(children[1], 0.0)]
        for rank in [*victims, *({0, 1} - set(victims))]:
            if statuses[rank] is None and rank not in victims:
                statuses[rank] = ended(children[rank], 0.5)
            if statuses[rank] is None:
                os.kill(children[rank], signal.SIGKILL)
                statuses[rank] = os.waitpid(children[rank], 0)[1]
        if statuses == [0, 0]:
            return answers(folder), kills
        kills += 1


def rounds(work: Callable[[Path], Work], seed: int, count: int) -> dict[str, Any]:
    """The undisturbed run and `count` killed ones, each in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        whole = undisturbed(work(Path(folder) / "run"), Path(folder))
        longest = time.monotonic() - began
    delays = random.Random(seed)
    found: list[Any] = []
    pace = longest
    while len(found) < count:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            ends, kills = killed(work(path / "run"), path, delays, pace)
        if kills:
            found.append((ends, kills))
        else:  # it was through before the first blow; the next one comes earlier
            pace /= 2
    return {"whole": whole, "rounds": found, "seconds": longest}


def tuned(folder: Path) -> Work:
    """Fine-tuning with everything random in it, and taps that are fixed on the way."""
    return lambda _: digest(trained(folder, pause=0.01, config=TAPS))


def iterated(folder: Path) -> Work:
    def work(_: int) -> Any:
        result = step_by_step(folder)
        return digest(result) + json.dumps(result.plan.to_json(), sort_keys=True)

    return work


def answer_of(result: IterateResult) -> dict[str, Any]:
    return {
        "keep": {name: list(units) for name, units in result.plan.keep.items()},
        "weights": {name: t.tolist() for name, t in result.model.state_dict().items()},
        "top1": [[s.name, s.top1_cut, s.top1] for s in result.steps],
    }


def once(folder: Path) -> Work:
    """What a run of two processes gave, who wrote it, and what is refused."""

    def work(rank: int) -> Any:
        from thinet import steps

        writers: list[str] = []
        real = steps.save
        steps.save = lambda *given: (writers.append("model"), real(*given))[1]  # type: ignore[assignment]
        told: list[str] = []
        result = step_by_step(
            folder, on_step=lambda s: told.append(s.name), progress=lambda *_: None
        )
        refused: list[str] = []
        wrong: dict[str, Any] = {"seed": rank}
        for options in (wrong, {"seed": 0, "criterion": "l3"}):
            try:
                step_by_step(folder.with_name("refused"), **options)
            except ThinetError as error:
                refused.append(f"{type(error).__name__}: {error}")
        return {
            **answer_of(result),
            "rank": current().rank,
            "seconds": [s.seconds for s in result.steps],
            "writers": len(writers),
            "told": told,
            "refused": refused,
        }

    return work


def main() -> None:
    torch.set_num_threads(1)
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        trained(None, config=TAPS)  # which also imports what the forked processes need
        alone = answer_of(step_by_step(Path(folder), accumulate=2))
    PartialState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        both = undisturbed(once(Path(folder) / "run"), Path(folder))
    told = {
        "alone": alone,
        "once": both,
        "tuned": rounds(tuned, seed, count),
        "iterated": rounds(iterated, seed, count),
    }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
