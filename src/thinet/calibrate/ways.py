"""Batches that take the same way through the model, where its forward code asks for numbers.

Code may go on by what it finds in its input: transformers build no mask where no token is padding.
One recorded way is what moments and repair run, so batches that take another are left out, and
told.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from thinet.calibrate.batches import images_in
from thinet.errors import CalibrationError
from thinet.trace.decisions import MASKED, RESULTS
from thinet.trace.interpret import Execution, dependencies
from thinet.trace.program import Op, Program
from thinet.types import ExampleInputs

MOST = 8
"""Ways that are told apart; what takes yet another belongs to none of them."""


def same_way(
    model: nn.Module, example: ExampleInputs, program: Program, batches: Sequence[ExampleInputs]
) -> tuple[list[int], tuple[str, ...]]:
    """The batches that take the way that most images take, by number, and a note of the others.

    Costs nothing where the program asks for no number, else what it computes until the last one. Of
    ways that as many images take, that of the example inputs.

    Args:
        program: of the model on its example inputs.

    Raises:
        CalibrationError: no way is that of at least half of the images, or a batch does not fit
            the model.
    """
    asking = questions(program)
    if not asking:
        return list(range(len(batches))), ()
    ways = [_Way(model, example)]
    for number, batch in enumerate(batches):
        way = next((way for way in ways if way.is_that_of(batch)), None)
        if way is None and len(ways) < MOST:
            way = _Way(model, batch)
            ways.append(way)
        if way is not None:
            way.numbers.append(number)
    images = [images_in(batch) for batch in batches]
    best = max(ways, key=lambda way: sum(images[n] for n in way.numbers))
    share = sum(images[n] for n in best.numbers) / max(sum(images), 1)
    if len(best.numbers) == len(batches):
        return best.numbers, ()
    why = f"{asking[0].where} asks for a number of its input, and the forward goes on by it"
    if share < 0.5:
        taken = sum(bool(way.numbers) for way in ways)
        raise CalibrationError(
            f"the calibration batches take {taken} or more ways through the model, none of "
            f"them half of the images: {why}; give batches that are alike in it (all with padding, "
            "or none), or take .item() and bool of a tensor out of the forward"
        )
    left = len(batches) - len(best.numbers)
    note = (
        f"{left} of {len(batches)} calibration batches were left out, as they take another way "
        f"through the model: {why}; batches that are alike in it (all with padding, or none) are "
        "all used"
    )
    if best is not ways[0]:
        note += "; the example inputs take another way too, so give some like these batches"
    return best.numbers, (note,)


def questions(program: Program) -> list[Op]:
    """Operations that give forward code a number."""
    return [
        op
        for op in program.ops
        if any(isinstance(x, (bool, int, float)) for x in tree_flatten(op.result)[0])
    ]


def picks_by_data(program: Program) -> bool:
    """Whether rows are picked by what is in them, so that their number says nothing."""
    masks = (torch.bool, torch.uint8)
    return any(
        op.name in RESULTS
        or (op.name in MASKED and any(value.dtype in masks for value in op.inputs()))
        for op in program.ops
    )


class _Way:
    """One way through the model, and the batches that take it."""

    def __init__(self, model: nn.Module, first: ExampleInputs) -> None:
        self.numbers: list[int] = []
        self._execution = Execution(model)
        self._execution.program(first)

    def is_that_of(self, batch: ExampleInputs) -> bool:
        """Whether a batch goes this way too."""
        try:
            with self._execution.started([batch]) as lane:
                lane.try_ops(0, _until_asked(lane.program), {})
        except CalibrationError:
            return False
        return True


def _until_asked(program: Program) -> list[int]:
    """Operations that the questions need, and these, in order."""
    needs, pending = dependencies(program), [op.index for op in questions(program)]
    met: set[int] = set()
    while pending:
        index = pending.pop()
        if index not in met:
            met.add(index)
            pending.extend(needs[index])
    return sorted(met)
