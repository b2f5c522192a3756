"""Let what is left of a group stand in for what went: producer and consumer refitted together.

The repair fits one layer at a time, and a kept channel to what it was before. Together, the filters
of a producer may become others from which the consumer can do more: the outputs of the dense
network are met as a function of both layers' weights (`thinet.gauss_newton`), pair by pair, on the
inputs that the network as cut and refined so far gives. No labels and no loss at the network's
output take part. (Quantisation knows such reconstruction of blocks: Li et al., BRECQ, ICLR 2021.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinet.calibrate.batches import images_in
from thinet.calibrate.layers import (
    ROWS_CUT,
    Layer,
    dropouts,
    find_layers,
    layers_beside,
    output_gains,
    same_rows,
    trained_names,
)
from thinet.calibrate.ordering import in_order, shortcut_source
from thinet.calibrate.pairs import Pair, find_pairs
from thinet.calibrate.patches import patches, position_grid, sample_positions
from thinet.calibrate.rows import WIDEST, positions_in
from thinet.errors import CalibrationError
from thinet.gauss_newton import Kronecker, squared, step
from thinet.joint import PairOutputs
from thinet.plan import Plan
from thinet.store import Store
from thinet.surgery.apply import named_tensors
from thinet.trace.interpret import Execution, dependencies
from thinet.types import ExampleInputs, Progress

ITERATIONS = 5
"""Of conjugate gradients; more gain little on ResNet-56 (docs/method.md)."""

LEAST = 0.05
"""Of what all iterations have gained: one that gains less is a pair's last (docs/method.md)."""

POSITIONS = 500_000
"""Outputs' positions to which a pair is fitted: of more, only each n-th batch is looked at."""

AFFORDED = 5e11
"""Multiply-adds of one pass over the calibration images up to which refining is the default: a
minute on two cores, ten passes for each iteration. 1,000 images through ResNet-56 are 1.3e11, 256
through a ResNet-50 at 224 pixels 1.1e12."""

ROWS = 20_000
"""Positions from which the preconditioner takes a layer's input moments, at least."""

_Solve = Callable[[Tensor], Tensor]

SHARES = (1.0, 0.5, 0.25)
"""Of the step, tried in turn until one lowers the error."""

IMAGES = 200
"""Images from which the preconditioner is made."""


@dataclass(frozen=True)
class Refined:
    """What became of each pair, by the names of its layers ("conv1 -> conv2").

    Attributes:
        errors: mean squared error of the pair's outputs before and after.
        skipped: why a pair was left as it was.
    """

    errors: Mapping[str, tuple[float, float]]
    skipped: Mapping[str, str]


def refine(
    small: nn.Module,
    dense: nn.Module,
    plan: Plan,
    batches: Sequence[ExampleInputs],
    *,
    iterations: int = ITERATIONS,
    ridge: float = 1e-3,
    seed: int = 0,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Refit in place, together, the two layers on either side of each cut group.

    Pairs are those between whose layers nothing leaves for elsewhere; others stay as they are. The
    outputs' error is measured behind the BatchNorm that follows, the shortcut's loss included, and
    never grows on the batches that are looked at (all, up to `POSITIONS`). Costs some ten forward
    passes for each iteration at the most.

    Args:
        small: the cut network, best repaired before.
        dense: the network that it was cut from.
        plan: how it was cut.
        batches: the calibration inputs.
        iterations: of conjugate gradients for each pair, at most.
        ridge: of the preconditioner, relative to the moments' mean diagonals.
        seed: of the sampled positions.
        store: where the activations of waiting batches rest; those of the pair at hand, some six
            times its outputs, stay in memory beside it.

    Raises:
        CalibrationError: activations that are not finite, or batches that do not fit the model.
        RepairError: moments that cannot be factored; nothing is changed then.
    """
    return _Pass(small, dense, plan, batches, iterations, ridge, seed, store, progress).run()


class _Pass:
    """The dense network and the cut one side by side, the dense one ahead by a pair."""

    def __init__(
        self,
        small: nn.Module,
        dense: nn.Module,
        plan: Plan,
        batches: Sequence[ExampleInputs],
        iterations: int,
        ridge: float,
        seed: int,
        store: Store | None,
        progress: Progress | None,
    ) -> None:
        self.small, self.batches, self.store, self.progress = small, batches, store, progress
        self.iterations, self.ridge = iterations, ridge
        self.generator = torch.Generator().manual_seed(seed)
        self.kept = {(s.parameter, s.dim): s.indices for s in plan.kept}
        self.execution, self.reference = Execution(small), Execution(dense)
        self.program, program = (e.program(batches[0]) for e in (self.execution, self.reference))
        self.dense_layers = find_layers(program)
        layers, self.same = layers_beside(self.program, self.dense_layers)
        self.dropouts, trained = dropouts(small, self.program), trained_names(small)
        needs = dependencies(self.program)
        # What is not trained is no end of a pair: it lies between the ends, as it is.
        ends = {i: layer for i, layer in layers.items() if trained.issuperset(layer.parameters)}
        pairs = find_pairs(self.program, ends, needs)
        self.pairs = {i: p for i, p in pairs.items() if self._kept(p.producer) is not None}
        first = {
            i: [n for n in (shortcut_source(self.program, p.consumer), *p.needs) if n is not None]
            for i, p in self.pairs.items()
        }
        self.order = in_order(self.program, needs, first)
        sources = {i: shortcut_source(program, layer) for i, layer in self.dense_layers.items()}
        self.dense_order = in_order(
            program, dependencies(program), {i: [s] for i, s in sources.items() if s is not None}
        )
        self.errors: dict[str, tuple[float, float]] = {}
        self.skipped: dict[str, str] = {}

    def run(self) -> Refined:
        ahead = self.reference.started(self.batches, self.store)
        ours = self.execution.started(self.batches, self.store)
        with ahead as self.ahead, ours as self.lane:
            self.left = iter(self.dense_order)
            for number, index in enumerate(self.order):
                if index in self.pairs:
                    self._try(self.pairs[index])
                self.lane.step(index)
                if self.progress is not None:
                    self.progress("refining", number + 1, len(self.order))
        with torch.no_grad():
            for name, tensor in named_tensors(self.small):
                if self.execution.tensors[name].data_ptr() != tensor.data_ptr():
                    tensor.copy_(self.execution.tensors[name])
        return Refined(self.errors, self.skipped)

    def _kept(self, layer: Layer) -> Sequence[int] | None:
        """Which of its outputs stay; None where all do."""
        return self.kept.get((layer.weight, layer.outputs_dim))

    def _try(self, pair: Pair) -> None:
        ends = (pair.producer, pair.consumer)
        name = " -> ".join(layer.weight.removesuffix(".weight") for layer in ends)
        reason = self._cannot(pair)
        if reason is not None:
            self.skipped[name] = reason
            return
        numbers = self._looked_at(pair.consumer)
        targets, gain = self._targets(pair.consumer, numbers)
        problem = PairOutputs(self.lane, self.execution.tensors, pair, numbers, targets, gain)
        try:
            residuals = problem.residuals()
            before = sum(squared(r) for r in residuals)
            if before == 0:
                self.skipped[name] = "it answers as the dense network does"
                return
            solves = self._preconditioner(problem, name)
            change = step(problem, residuals, solves, iterations=self.iterations, least=LEAST)
        except (CalibrationError, NotImplementedError) as error:
            self.skipped[name] = f"it cannot be differentiated: {error}"
            return
        for share in SHARES:
            if change is None:
                break
            trial = problem.moved(change, share)
            after = trial.error()
            if after < before:  # false where it is not finite
                self._install(trial)
                self.errors[name] = before / problem.size, after / problem.size
                return
        self.skipped[name] = "no step lowered its error"

    def _cannot(self, pair: Pair) -> str | None:
        tensors = self.execution.tensors
        if self.same.get(pair.consumer.op) is None:
            return "the dense network has no such layer"
        if not same_rows(pair.consumer, self.dense_layers[self.same[pair.consumer.op]]):
            return ROWS_CUT
        for layer in (pair.producer, pair.consumer):
            name, weight = layer.weight.removesuffix(".weight"), tensors[layer.weight]
            if layer.x.storage in self.dropouts:
                return f"{name} is trained behind dropout, which a joint refit would not bear"
            if layer.shared:
                return f"the weights of {name} are used more than once"
            if layer.columns > WIDEST:
                return f"{name} has more than {WIDEST} input columns"
            if weight.dtype not in (torch.float32, torch.float64):
                return f"{name} computes in {weight.dtype}"
        if not self.lane.done.issuperset(pair.needs):
            return "what lies between reads something that is made later"
        return None

    def _looked_at(self, layer: Layer) -> range:
        """The batches that a pair is fitted to, by number."""
        positions = positions_in(layer, self.batches)
        return range(0, len(self.batches), max(positions // POSITIONS, 1))

    def _targets(self, layer: Layer, numbers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """What the consumer should add to its stream, batch by batch, and the norm's gain on it."""
        theirs = self.dense_layers[self.same[layer.op]]
        while theirs.op not in self.ahead.done:
            self.ahead.step(next(self.left))
        tensors = self.execution.tensors
        gain = output_gains(layer, tensors).to(tensors[layer.weight])
        factor = _along(layer, gain)
        outputs = self._kept(layer)
        pick = None if outputs is None else torch.tensor(outputs, device=gain.device)
        dim = -1 - layer.geometry.rank
        moved: Tensor | float = 0.0  # by what the repair has put into the norm
        if layer.norm is not None and theirs.norm is not None:
            was = self.reference.tensors[theirs.norm.mean]
            was = was if pick is None else was[pick]
            moved = _along(layer, tensors[layer.norm.mean] - was)

        def picked(y: Tensor) -> Tensor:
            return y if pick is None else y.index_select(dim, pick)

        made_up = (
            layer.shortcut is not None
            and theirs.shortcut is not None
            and shortcut_source(self.program, layer) in self.lane.done
            and shortcut_source(self.ahead.program, theirs) in self.ahead.done
        )
        targets: list[Tensor] = []
        for number in numbers:
            dense, env = self.ahead.envs[number], self.lane.envs[number]
            target = (picked(dense[theirs.y.id]) + moved) * factor
            if made_up and layer.shortcut is not None and theirs.shortcut is not None:
                before = theirs.as_made(dense[theirs.shortcut.id])
                lost = picked(before) - layer.as_made(env[layer.shortcut.id])
                target += lost.reshape(target.shape)
            targets.append(target)
        return targets, gain

    def _preconditioner(self, problem: PairOutputs, name: str) -> list[_Solve]:
        pair = problem.pair
        inputs = [
            torch.zeros(n + 1, n + 1, dtype=torch.float64, device=problem.gain.device)
            for n in (w[0].numel() for w in problem.weights)
        ]
        passed = torch.zeros(
            len(problem.weights[0]), len(problem.weights[0]), dtype=torch.float64
        ).to(problem.gain.device)
        rows, places, images = [0, 0], 0, 0
        last = -(-IMAGES // images_in(self.batches[0]))
        for number, whole in enumerate(problem.numbers[:last]):
            x, between, back = problem.sent_back(number, self.generator)
            for n, (layer, seen) in enumerate(((pair.producer, x), (pair.consumer, between))):
                phi = self._some_rows(layer, seen, -(-max(ROWS, 4 * len(inputs[n])) // last))
                phi = torch.cat([phi, phi.new_ones(len(phi), 1)], 1)
                inputs[n] += phi.T @ phi
                rows[n] += len(phi)
            g = back.movedim(-1 - pair.producer.geometry.rank, -1).flatten(0, -2)
            passed += g.T @ g
            places += len(g)
            images += images_in(self.batches[whole])
        share = images / sum(images_in(self.batches[n]) for n in problem.numbers)
        mixed = problem.size // len(problem.weights[1])
        solves: list[_Solve] = []
        gain = problem.gain.double()
        outputs = (passed / places, round(places / share)), (torch.diag(gain.square()), mixed)
        for n, (second, positions) in enumerate(outputs):
            moments = inputs[n] / rows[n]
            if not problem.free[n]:
                moments[-1], moments[:, -1], moments[-1, -1] = 0, 0, 1
            kronecker = Kronecker.of(second, moments, positions, ridge=self.ridge, name=name)
            solves.append(kronecker.solve)
        return solves

    def _some_rows(self, layer: Layer, x: Tensor, wanted: int) -> Tensor:
        images, positions = position_grid(tuple(x.shape), layer.geometry)
        if wanted >= images * positions:
            return patches(x, layer.geometry)
        chosen = sample_positions(images, positions, wanted, self.generator)
        return patches(x, layer.geometry, chosen.to(x.device))

    def _install(self, trial: PairOutputs) -> None:
        tensors = self.execution.tensors
        for layer, weight, intercept in zip(
            (trial.pair.producer, trial.pair.consumer),
            trial.weights,
            trial.intercepts,
            strict=True,
        ):
            tensors[layer.weight] = layer.turned(weight).contiguous()
            if layer.bias is not None:
                tensors[layer.bias] = tensors[layer.bias] + intercept
            elif layer.norm is not None:
                tensors[layer.norm.mean] = tensors[layer.norm.mean] - intercept
            if layer.read is not None:  # it may have been made already
                for env in self.lane.envs:
                    if layer.read.id in env:
                        env[layer.read.id] = layer.as_read(weight)


def _along(layer: Layer, values: Tensor) -> Tensor:
    """One value for each channel, shaped to meet the layer's outputs."""
    return values.reshape(-1, *[1] * layer.geometry.rank)
