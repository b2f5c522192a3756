"""The state of a run of many steps on disk: always one whole model, and what was done so far.

A folder holds `steps.json` and the newest model, written by `thinet.save` with its plan relative to
the dense model. The model is written first, the JSON that names it after, and older files are
removed last; each file appears whole or not at all. So a run may be killed at any moment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from thinet.checkpoint import load, load_plan, save
from thinet.errors import CheckpointError
from thinet.plan import Plan
from thinet.train.identity import differences
from thinet.whole_file import tidy, write_json

NAME = "steps.json"
FORMAT = 1
SHOWN = 4
"""How many differences an error names."""

Phase = Literal["cut", "trained"]


@dataclass(frozen=True)
class StepRecord:
    """What one step gave. Costs are for one batch of the example inputs.

    Attributes:
        number: from 1.
        steps: how many there are in all.
        name: of the step, a module path.
        kept: channels that stayed of each group that was cut.
        macs, params: of the network after the step.
        top1_cut: accuracy after the cut and its repair, before training, if it was measured.
        top1: accuracy after the step's training, if it was measured.
        epochs: that were trained.
        seconds: of cutting and training, interruptions not counted.
        seconds_left: estimate for the steps that follow.
    """

    number: int
    steps: int
    name: str
    kept: Mapping[str, int]
    macs: int
    params: int
    top1_cut: float | None
    top1: float | None
    epochs: int
    seconds: float
    seconds_left: float


@dataclass(frozen=True)
class Position:
    """How far a run is: the last step that was touched (from 1; 0 none yet) and how far in it."""

    step: int = 0
    phase: Phase = "trained"
    records: tuple[StepRecord, ...] = ()
    pending: Mapping[str, Any] | None = None


def forget(folder: Path) -> None:
    """Remove the state in a folder, and the folder if nothing else is in it."""
    (folder / NAME).unlink(missing_ok=True)
    Store(folder, {})._tidy(Position())
    with suppress(OSError):
        folder.rmdir()


class Store:
    """The folder of one run."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))

    def open(self, *, resume: bool) -> Position:
        """Where the run in the folder is, or a beginning.

        Raises:
            CheckpointError: the folder holds a run with other settings (says which), its files are
                damaged, or it cannot be written.
        """
        if self.folder.is_file():
            raise CheckpointError(f"{self.folder} is a file; give a folder for the state")
        path = self.folder / NAME
        if not resume:
            path.unlink(missing_ok=True)
            self._tidy(Position())
        if not path.exists():
            self._tidy(Position())  # what a run that was started over has left
            return Position()
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            if data["thinet_steps"] != FORMAT:
                raise CheckpointError(f"{path} is of another version of thinet")
            saved = data["identity"]
            records = tuple(StepRecord(**record) for record in data["records"])
            position = Position(data["step"], data["phase"], records, data["pending"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}); delete {self.folder}, or start over with "
                "resume=False"
            ) from error
        different = differences(saved, self._identity)
        if different:
            more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            raise CheckpointError(
                f"{self.folder} holds a run that was started differently: "
                f"{'; '.join(different[:SHOWN])}{more}. Give what it was started with, another "
                "folder, or resume=False to start over"
            )
        return position

    def put(self, position: Position, model: nn.Module, plan: Plan) -> None:
        """Make this model and position the state of the run.

        Raises:
            CheckpointError: a file cannot be written; the state is what it was.
        """
        self.put_model(position, model, plan)
        self.commit(position)

    def put_model(self, position: Position, model: nn.Module, plan: Plan) -> None:
        """Write the model of a position that is not the run's state yet; errors as `put`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the folder {self.folder} cannot be made: {error}") from error
        save(self.model_path(position), model, plan)

    def commit(self, position: Position) -> None:
        """Make a position, whose model was written, the state of the run; errors as `put`."""
        path = self.folder / NAME
        try:
            write_json(
                path, {"thinet_steps": FORMAT, "identity": self._identity, **asdict(position)}
            )
        except OSError as error:
            raise CheckpointError(f"the state cannot be written to {path}: {error}") from error
        self._tidy(position)

    def model(self, position: Position, dense: nn.Module) -> nn.Module:
        """The model of a position; the dense one itself at the beginning."""
        return load(self.model_path(position), dense) if position.step else dense

    def plan(self, position: Position) -> Plan:
        """The plan of a position, relative to the dense model."""
        return load_plan(self.model_path(position)) if position.step else Plan()

    def model_path(self, position: Position) -> Path:
        return self.folder / f"step-{position.step:03d}-{position.phase}.safetensors"

    def training_path(self, step: int) -> Path:
        """Where the training of a step keeps its own state."""
        return self.folder / f"training-{step:03d}"

    def _tidy(self, position: Position) -> None:
        """Remove what belongs to earlier positions."""
        current = {self.model_path(position)}
        if position.phase == "cut":
            current.add(self.training_path(position.step))
        tidy(self.folder, "step")
        for path in self.folder.glob("step-[0-9][0-9][0-9]-*.safetensors"):
            if path not in current:
                path.unlink(missing_ok=True)
        for path in self.folder.glob("training-[0-9][0-9][0-9]"):
            if path not in current:
                shutil.rmtree(path, ignore_errors=True)
