"""Two layers as one function: the consumer's outputs of both layers' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from thinet.calibrate.layers import Layer
from thinet.calibrate.pairs import Pair
from thinet.gauss_newton import Change
from thinet.observe import forward_derivatives
from thinet.trace.interpret import Lane


class PairOutputs:
    """The consumer's outputs as a function of both layers' weights, beside their targets.

    Attributes:
        weights, intercepts: of the producer and the consumer; intercepts are what is added.
        gain: of the norm behind the consumer, to be multiplied along its channels.
        free: whether a layer's intercept has a place to go.
        size: outputs of all batches together.
    """

    def __init__(
        self,
        lane: Lane,
        tensors: Mapping[str, Tensor],
        pair: Pair,
        targets: list[Tensor],
        gain: Tensor,
    ) -> None:
        self.lane, self.tensors, self.pair = lane, tensors, pair
        self.targets, self.gain = targets, gain
        ends = (pair.producer, pair.consumer)
        self.weights = tuple(tensors[layer.weight] for layer in ends)
        self.intercepts = tuple(w.new_zeros(len(w)) for w in self.weights)
        self.free = tuple(layer.bias is not None or layer.norm is not None for layer in ends)
        self.size = sum(target.numel() for target in targets)
        self._ids = {name: value_id for value_id, name in lane.program.names.items()}

    def moved(self, change: Change, share: float) -> PairOutputs:
        """The same with other weights."""
        other = PairOutputs(self.lane, self.tensors, self.pair, self.targets, self.gain)
        parts = [self._split(n, change[n] * share) for n in range(2)]
        other.weights = tuple(w + p[0] for w, p in zip(self.weights, parts, strict=True))
        other.intercepts = tuple(i + p[1] for i, p in zip(self.intercepts, parts, strict=True))
        return other

    def error(self) -> float:
        """Sum of the squared residuals."""
        return sum(
            float((target - self._answer(n)).square().sum(dtype=torch.float64))
            for n, target in enumerate(self.targets)
        )

    def residuals(self) -> list[Tensor]:
        """What is missing in each batch. From here on `vjp` can be asked."""
        with torch.enable_grad():
            self._leaves = [w.detach().requires_grad_() for w in (*self.weights, *self.intercepts)]
            self._answers = [
                self._run(n, self._leaves[:2], self._leaves[2:]) for n in range(len(self.targets))
            ]
        return [t - y.detach() for t, y in zip(self.targets, self._answers, strict=True)]

    def jvp(self, number: int, change: Change) -> Tensor:
        with forward_derivatives():
            parts = [self._split(n, change[n]) for n in range(2)]
            weights = [
                forward_ad.make_dual(w, p[0]) for w, p in zip(self.weights, parts, strict=True)
            ]
            intercepts = [
                forward_ad.make_dual(i, p[1]) for i, p in zip(self.intercepts, parts, strict=True)
            ]
            answer = forward_ad.unpack_dual(self._run(number, weights, intercepts))
            if answer.tangent is None:
                return torch.zeros_like(answer.primal)
            return answer.tangent.clone()

    def vjp(self, number: int, residual: Tensor) -> Change:
        grads = torch.autograd.grad(
            self._answers[number],
            self._leaves,
            residual,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return tuple(
            torch.cat([grads[n].flatten(1), grads[2 + n][:, None] * self.free[n]], 1)
            for n in range(2)
        )

    def sent_back(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of both layers in one batch, and what reaches the producer's outputs from
        random residuals."""
        y = self._made(number, self.weights, self.intercepts)
        noise = torch.randn(self.targets[number].shape, generator=generator).to(y)
        with torch.enable_grad():
            leaf = y.requires_grad_()
            env = self._gone_on(number, leaf.clone(), self.weights)  # may be written in place
            answer = env[self.pair.consumer.y.id] * self.gain
            (reached,) = torch.autograd.grad(answer, leaf, noise)
        x = self.lane.envs[number][self.pair.producer.x.id]
        return x, env[self.pair.consumer.x.id].detach(), reached

    def _answer(self, number: int) -> Tensor:
        return self._run(number, self.weights, self.intercepts)

    def _run(self, number: int, weights: Sequence[Tensor], intercepts: Sequence[Tensor]) -> Tensor:
        consumer = self.pair.consumer
        env = self._gone_on(number, self._made(number, weights, intercepts), weights)
        return (env[consumer.y.id] + along(consumer, intercepts[1])) * self.gain

    def _made(self, number: int, weights: Sequence[Tensor], intercepts: Sequence[Tensor]) -> Tensor:
        """The producer's outputs."""
        producer = self.pair.producer
        given = self._weight(producer, weights[0])
        y = self.lane.try_ops(number, self.pair.ops[:1], given)[producer.y.id]
        return y + along(producer, intercepts[0])

    def _gone_on(self, number: int, y: Tensor, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        """The tensors from the producer's outputs through the consumer's."""
        given = {self.pair.producer.y.id: y, **self._weight(self.pair.consumer, weights[1])}
        return self.lane.try_ops(number, self.pair.ops[1:], given)

    def _weight(self, layer: Layer, weight: Tensor) -> dict[int, Tensor]:
        if layer.transposed is not None:
            return {layer.transposed.id: weight.T}
        return {self._ids[layer.weight]: weight}

    def _split(self, n: int, change: Tensor) -> tuple[Tensor, Tensor]:
        return change[:, :-1].reshape(self.weights[n].shape), change[:, -1].contiguous()


def along(layer: Layer, values: Tensor) -> Tensor:
    """One value for each channel, shaped to meet the layer's outputs."""
    return values.reshape(-1, *[1] * layer.geometry.rank)
