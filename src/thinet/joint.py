"""Two layers as one function: the consumer's outputs of both layers' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from thinet.calibrate.pairs import Pair
from thinet.gauss_newton import Change, squared
from thinet.observe import forward_derivatives
from thinet.trace.interpret import Lane, storages_written


class PairOutputs:
    """The consumer's outputs as a function of both layers' weights, beside their targets.

    Outputs are those behind the norm that follows the consumer, but for a constant.

    Attributes:
        numbers: of the lane's batches that are looked at; all others here count these.
        targets: what the outputs should be, for each of these batches.
        weights, intercepts: of the producer and the consumer, the weights as of `Layer.matrix`;
            intercepts are what is added.
        gain: (N,) of the norm behind the consumer.
        free: whether a layer's intercept has a place to go.
        size: outputs of all batches together.
    """

    def __init__(
        self,
        lane: Lane,
        tensors: Mapping[str, Tensor],
        pair: Pair,
        numbers: Sequence[int],
        targets: list[Tensor],
        gain: Tensor,
    ) -> None:
        self.lane, self.tensors, self.pair = lane, tensors, pair
        self.numbers, self.targets, self.gain = numbers, targets, gain
        self.ends = (pair.producer, pair.consumer)
        self.weights = tuple(layer.matrix(tensors) for layer in self.ends)
        self.intercepts = tuple(w.new_zeros(len(w)) for w in self.weights)
        self.free = tuple(layer.bias is not None or layer.norm is not None for layer in self.ends)
        self.size = sum(target.numel() for target in targets)
        self._ids = {name: value_id for value_id, name in lane.program.names.items()}
        self._between = pair.ops[1:-1]
        ops = (lane.program.ops[index] for index in self._between)
        convolves = lane.program.ops[pair.consumer.op].name == "aten.convolution"
        self._stacks = convolves and pair.consumer.geometry.groups == 1
        self._written_over = any(pair.producer.y.storage in storages_written(op) for op in ops)

    def moved(self, change: Change, share: float) -> PairOutputs:
        """The same with other weights."""
        rest = (self.pair, self.numbers, self.targets, self.gain)
        other = PairOutputs(self.lane, self.tensors, *rest)
        parts = [self._split(n, change[n] * share) for n in range(2)]
        other.weights = tuple(w + p[0] for w, p in zip(self.weights, parts, strict=True))
        other.intercepts = tuple(i + p[1] for i, p in zip(self.intercepts, parts, strict=True))
        return other

    def error(self) -> float:
        """Sum of the squared residuals."""
        return sum(squared(target - self._answer(n)[-1]) for n, target in enumerate(self.targets))

    def residuals(self) -> list[Tensor]:
        """What is missing in each batch. From here on derivatives can be asked for."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (*self.weights, self.intercepts[0])]
            self.weights, self.intercepts = tuple(leaves[:2]), (leaves[2], self.intercepts[1])
            self._leaves = leaves
            self._passed = [self._answer(n) for n in range(len(self.targets))]
        self.weights = tuple(w.detach() for w in self.weights)
        self.intercepts = tuple(i.detach() for i in self.intercepts)
        return [t - y[-1].detach() for t, y in zip(self.targets, self._passed, strict=True)]

    def jvp(self, number: int, change: Change) -> Tensor:
        (ours, shift), (theirs, added) = (self._split(n, change[n]) for n in range(2))
        y, between, _ = (t.detach() for t in self._passed[number])
        moved = self._layer(0, number, {}, ours, shift)
        with forward_derivatives():
            dual = forward_ad.make_dual(y.clone() if self._written_over else y, moved)
            tangent = forward_ad.unpack_dual(self._gone_on(number, dual)).tangent
        read, fixed = self.pair.consumer.x.id, self.weights[1]
        if tangent is not None and self._stacks:  # one product: what it makes is the larger part
            both = torch.cat([between, tangent], self._dim(1))
            return self._layer(1, number, {read: both}, torch.cat([theirs, fixed], 1), added)
        answer = self._layer(1, number, {read: between}, theirs, added)
        if tangent is not None:
            answer += self._layer(1, number, {read: tangent}, fixed, torch.zeros_like(added))
        return answer

    def vjp(self, number: int, residual: Tensor) -> Change:
        ours, theirs, shift = torch.autograd.grad(
            self._passed[number][-1],
            self._leaves,
            residual,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        over = [d for d in range(residual.ndim) if d != residual.ndim + self._dim(1)]
        added = residual.sum(over) * self.gain
        return (
            torch.cat([ours.flatten(1), shift[:, None] * self.free[0]], 1),
            torch.cat([theirs.flatten(1), added[:, None] * self.free[1]], 1),
        )

    def sent_back(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of both layers in one batch, and what reaches the producer's outputs from
        random residuals."""
        leaf = self._layer(0, number, {}, self.weights[0], self._added(0))
        noise = torch.randn(self.targets[number].shape, generator=generator).to(leaf)
        with torch.enable_grad():
            leaf.requires_grad_()
            between = self._gone_on(number, leaf.clone())
            given = {self.pair.consumer.x.id: between}
            answer = self._layer(1, number, given, self.weights[1], self._added(1))
            (reached,) = torch.autograd.grad(answer, leaf, noise)
        x = self.lane.envs[self.numbers[number]][self.pair.producer.x.id]
        return x, between.detach(), reached

    def _answer(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The producer's outputs, the consumer's inputs and its outputs."""
        y = self._layer(0, number, {}, self.weights[0], self._added(0))
        between = self._gone_on(number, y.clone() if self._written_over else y)
        given = {self.pair.consumer.x.id: between}
        return y, between, self._layer(1, number, given, self.weights[1], self._added(1))

    def _added(self, n: int) -> Tensor:
        bias = self.ends[n].bias
        return self.intercepts[n] if bias is None else self.tensors[bias] + self.intercepts[n]

    def _layer(
        self, n: int, number: int, given: Mapping[int, Tensor], weight: Tensor, added: Tensor
    ) -> Tensor:
        """One layer alone with this weight and, if its intercept is free, this added to it."""
        layer = self.ends[n]
        if n == 1:
            weight = weight * self.gain.reshape(-1, *[1] * (weight.ndim - 1))
            added = added * self.gain
        op = self.lane.program.ops[layer.op]
        if op.name == "aten.convolution":  # which adds the intercept on its way
            env = self.lane.envs[self.numbers[number]]
            x = given[layer.x.id] if layer.x.id in given else env[layer.x.id]
            adds = self.free[n] or layer.bias is not None
            return op.func(x, layer.turned(weight), added if adds else None, *op.args[3:])
        put = dict(given)
        if layer.read is not None:
            put[layer.read.id] = layer.as_read(weight)
        else:
            put[self._ids[layer.weight]] = layer.turned(weight)
        if layer.bias is not None:
            put[self._ids[layer.bias]] = added
        y = self.lane.try_ops(self.numbers[number], (layer.op,), put)[layer.y.id]
        if layer.bias is None and self.free[n]:
            y = y + added.reshape(-1, *[1] * layer.geometry.rank)
        return y

    def _gone_on(self, number: int, y: Tensor) -> Tensor:
        """From the producer's outputs to the consumer's inputs."""
        given = {self.pair.producer.y.id: y}
        gone = self.lane.try_ops(self.numbers[number], self._between, given)
        return gone[self.pair.consumer.x.id]

    def _split(self, n: int, change: Tensor) -> tuple[Tensor, Tensor]:
        return change[:, :-1].reshape(self.weights[n].shape), change[:, -1].contiguous()

    def _dim(self, n: int) -> int:
        """Where a layer's outputs have their channels, from the end."""
        return -1 - self.ends[n].geometry.rank
