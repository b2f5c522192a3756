"""What an error of a layer's output costs the loss: the weighting of the loss-aware objective.

To second order, an error d at a layer's output raises the loss of an image by half the sum over
positions of (g' d)^2, g the loss's gradient there (the Fisher information in place of the Hessian,
errors at different positions taken as independent of each other and of g). So

    Gamma = E over images of the sum over positions of g g',

and errors weighed by it are in nats, the same for all layers of a network. Gamma = 1 is ThiNet's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from thinet.calibrate.batches import images_in
from thinet.calibrate.gradients import differentiating, loss_of
from thinet.calibrate.layers import Layer, find_layers, same_layers
from thinet.calibrate.patches import output_rows
from thinet.errors import CalibrationError
from thinet.lstsq import cholesky
from thinet.trace.interpret import Execution
from thinet.trace.program import Program
from thinet.types import ExampleInputs, Progress


def collect_curvature(
    model: nn.Module,
    batches: Sequence[tuple[ExampleInputs, Tensor | None]],
    *,
    program: Program,
    wanted: Sequence[int],
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Run the model forwards and backwards over the batches.

    Args:
        batches: with their labels; where a batch has none, they are drawn from the model's own
            answers, by which Gamma is the curvature of the divergence from these answers.
        program: the traced program, to whose operations `wanted` and the result refer.
        wanted: the layers whose outputs are looked at.
        seed: of the labels that are drawn.

    Returns:
        For each wanted layer R of shape (N, N) with R' R = Gamma, float64.

    Raises:
        CalibrationError: the model does not return logits, or gradients are not finite.
    """
    execution = Execution(model)
    layers, traced = find_layers(execution.program(batches[0][0])), find_layers(program)
    key = same_layers(layers, traced)
    asked = set(wanted)
    looked_at = {op: layer for op, layer in layers.items() if key.get(op) in asked}
    if not looked_at:
        return {}
    sums: dict[int, Tensor] = {}
    images = sum(images_in(inputs) for inputs, _ in batches)
    for number, (inputs, targets) in enumerate(batches):
        generator = torch.Generator().manual_seed(seed + number)
        gradients = _sent_back(execution, inputs, targets, looked_at, generator)
        for op, rows in gradients.items():
            part = (rows.T @ rows).double() / images
            sums[key[op]] = sums[key[op]] + part if key[op] in sums else part
        if progress is not None:
            progress("asking the loss", number + 1, len(batches))
    for op, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            where = traced[op].module or traced[op].weight
            raise CalibrationError(f"{where}: the gradients on the calibration data are not finite")
    return {op: cholesky(total, traced[op].weight)[0].T for op, total in sums.items()}


def _sent_back(
    execution: Execution,
    inputs: ExampleInputs,
    targets: Tensor | None,
    layers: Mapping[int, Layer],
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """(positions, N) gradients of one batch's summed loss at the outputs of the layers."""
    probes: dict[int, Tensor] = {}
    with execution.started([inputs]) as lane, torch.enable_grad():
        (env,) = lane.envs
        for op in lane.program.ops:
            execution.compute(op, env)
            if op.index in layers:
                made = layers[op.index].y.id
                probe = torch.zeros_like(env[made]).requires_grad_()
                env[made] = env[made] + probe  # what is written into it later leaves the probe
                probes[op.index] = probe
        loss = loss_of(lane.outputs()[0], targets, generator)
        with differentiating():
            found = torch.autograd.grad(loss, list(probes.values()), allow_unused=True)
    return {
        op: output_rows(torch.zeros_like(probe) if gradient is None else gradient,
                        layers[op].geometry).float()
        for (op, probe), gradient in zip(probes.items(), found, strict=True)
    }  # fmt: skip


def weighed(weight: Tensor, root: Tensor | None) -> Tensor:
    """R W, whose errors are those of W in the measure of Gamma = R' R.

    Args:
        weight: (N, C, *kernel).
        root: (N, N), or None for W itself.
    """
    if root is None:
        return weight
    return (root.to(weight) @ weight.flatten(1)).view_as(weight)
