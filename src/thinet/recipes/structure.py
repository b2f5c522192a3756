"""What a recipe needs to know of a network: chains of convolutions, residual blocks, the head.

All of it is read off the traced program and the groups; no module is found by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from thinet.calibrate.layers import Layer, find_layers
from thinet.errors import RecipeError, TraceError
from thinet.observe import preserved_rng
from thinet.plan import Replacement
from thinet.surgery.replace import replace
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis, layer_name
from thinet.trace.program import Value
from thinet.trace.replica import meta_copy
from thinet.types import ChannelGroup, ExampleInputs

ADDITIONS = ("aten.add", "aten.add_")
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True, eq=False)
class Network:
    """A model with what tracing it on example inputs has shown."""

    model: nn.Module
    inputs: ExampleInputs
    analysis: Analysis
    layers: dict[int, Layer]

    @property
    def kind(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__


@dataclass(frozen=True)
class Block:
    """A residual block: the groups inside of it, in order, none of which reaches the shortcut."""

    name: str
    inner: tuple[ChannelGroup, ...]


def network(model: nn.Module, inputs: ExampleInputs) -> Network:
    """Trace a model. Raises: TraceError: it does not run on the inputs."""
    analysis = analyse(model, inputs)
    return Network(model, inputs, analysis, find_layers(analysis.program))


def convolution_chain(net: Network, length: int, what: str) -> tuple[ChannelGroup, ...]:
    """The groups of `length` convolutions, each of which alone feeds the next.

    Raises:
        RecipeError: there are more or fewer convolutions, or they branch; `what` says for whom
            the recipe is.
    """
    convolutions = [layer for layer in net.layers.values() if layer.geometry.rank]
    if len(convolutions) != length:
        raise RecipeError(
            f"{what} needs {length} convolutions one after another; this {net.kind} has "
            f"{len(convolutions)}"
        )
    names = [layer_name(layer.weight) for layer in convolutions]
    groups = {group.name: group for group in net.analysis.groups}
    for name, after in pairwise(names):
        group = groups.get(name)
        if group is None or group.producers != (name,) or group.consumers != (after,):
            fed = ", ".join(group.consumers) if group else "nothing that is known"
            raise RecipeError(
                f"{what} needs {length} convolutions one after another; in this {net.kind} "
                f"{name} does not feed {after} alone but {fed or 'the output'}"
            )
    return tuple(groups[name] for name in names)


def residual_blocks(net: Network) -> tuple[Block, ...]:
    """Blocks of convolutions around which a shortcut leads, in order.

    From each sum of two activations the way back leads to the last convolution of the block, and
    on through groups that only the block's own layers read, none of which the shortcut needs.
    """
    makers, upstream = _flow(net)
    feeding = {
        site.op: group
        for group in net.analysis.groups
        for site in group.sites
        if min(site.units) >= 0
    }
    found: list[Block] = []
    for op in net.analysis.program.ops:
        operands = op.inputs() if op.name in ADDITIONS else []
        for operand, other in zip(operands, reversed(operands)):
            last = _layer_behind(net, makers, operand, op.index)
            if last is not None and operand is not other:
                made = _maker(makers, other, op.index)
                beside = upstream[made] if made is not None else frozenset[int]()
                inner = _inside(net, feeding, last, beside)
                names = [*(group.name for group in inner), layer_name(last.weight)]
                if inner:
                    found.append(Block(_common(names), inner))
    return tuple(found)


def _inside(
    net: Network, feeding: dict[int, ChannelGroup], last: Layer, beside: frozenset[int]
) -> tuple[ChannelGroup, ...]:
    """The groups between a block's input and its last layer, in order."""
    by_name = {layer_name(layer.weight): layer for layer in net.layers.values()}
    seen = {layer_name(last.weight)}
    inner: list[ChannelGroup] = []
    layers = [last]
    while layers:
        group = feeding.get(layers.pop().op)
        if group is None or group in inner or layer_name(last.weight) in group.producers:
            continue
        made = set(group.producers)
        alone = made <= by_name.keys() and set(group.consumers) <= seen | made
        if alone and not any(by_name[name].op in beside for name in made):
            inner.insert(0, group)
            layers.extend(by_name[name] for name in made - seen)
            seen |= made
    return tuple(inner)


Makers = dict[int, list[int]]
"""For each value, the operations that give it; several where it is changed in place."""


def _flow(net: Network) -> tuple[Makers, list[frozenset[int]]]:
    """Who makes each value, and for each operation the layers that it or its inputs come from."""
    makers: Makers = {}
    upstream: list[frozenset[int]] = []
    for op in net.analysis.program.ops:
        made = (_maker(makers, value, op.index) for value in op.inputs())
        own = {op.index} if op.index in net.layers else set[int]()
        upstream.append(frozenset(own.union(*(upstream[m] for m in made if m is not None))))
        for value in op.outputs():
            makers.setdefault(value.id, []).append(op.index)
    return makers, upstream


def _maker(makers: Makers, value: Value, before: int) -> int | None:
    """The last operation before another that gave a value."""
    return next((m for m in reversed(makers.get(value.id, ())) if m < before), None)


def _layer_behind(net: Network, makers: Makers, value: Value, before: int) -> Layer | None:
    """The layer whose output, through operations that keep its shape, is this value."""
    made = _maker(makers, value, before)
    while made is not None and made not in net.layers:
        op = net.analysis.program.ops[made]
        same = [v for v in op.inputs() if v.shape == value.shape]
        if op.name in ADDITIONS or not same:
            return None
        value = same[0]
        made = _maker(makers, value, made)
    return net.layers[made] if made is not None else None


def pooled_head(net: Network, last: str, channels: int) -> tuple[Replacement, ...]:
    """Replacements that put a global average pool and one linear layer behind a convolution.

    The last pooling layer becomes the global one and earlier ones behind the convolution go, so
    that the average is taken over the convolution's own maps, as in the authors' networks.

    Args:
        last: path of the last convolution.
        channels: its filters, as it is now.

    Raises:
        RecipeError: there are no fully connected layers, or no pooling layer before them, or the
            network does not run so.
    """
    paths = [path for path, _ in net.analysis.program.called]
    after = paths[paths.index(last) + 1 :] if last in paths else []
    full = [layer for layer in net.layers.values() if not layer.geometry.rank]
    names = [layer_name(layer.weight) for layer in full]
    if not full or not set(names) <= set(after):
        raise RecipeError(
            f"a global average pool takes the place of fully connected layers behind {last}; this "
            f"{net.kind} has none"
        )
    between = after[: after.index(names[0])]
    pools = [path for path in between if isinstance(net.model.get_submodule(path), POOLS)]
    if not pools:
        raise RecipeError(
            f"a global average pool takes the place of the pooling layer between {last} and "
            f"{names[0]}; this {net.kind} has none there"
        )
    classes = net.analysis.program.ops[full[-1].op].outputs()[0].shape[-1]
    whole = _common(names) if len(names) > 1 else names[0]
    gone: list[str] = []
    if not whole or _reshapes(net.model.get_submodule(whole)):
        # The head cannot go as one: its last layer stays in place, the others are passed through.
        whole = names[-1]
        span = after[after.index(names[0]) : after.index(whole)]
        gone = [p for p in span if isinstance(net.model.get_submodule(p), (nn.Linear, nn.Dropout))]
    replaced = (
        *(Replacement(path, "identity") for path in pools[:-1]),
        Replacement(pools[-1], "global-average-pool"),
        *(Replacement(path, "identity") for path in gone),
        Replacement(whole, "linear", {"in_features": channels, "out_features": classes}),
    )
    _check_runs(net, replaced)
    return replaced


def _reshapes(module: nn.Module) -> bool:
    """Whether something in it is more than layers on vectors."""
    return any(
        isinstance(m, (nn.Flatten, nn.Unflatten, nn.Conv2d, *POOLS)) for m in module.modules()
    )


def _check_runs(net: Network, replaced: Sequence[Replacement]) -> None:
    with preserved_rng():
        changed = meta_copy(net.model)
    replace(changed, replaced)
    try:
        analyse(changed, net.inputs)
    except TraceError as error:
        raise RecipeError(
            f"this {net.kind} does not run with a global average pool at {replaced[-1].module}: "
            f"{error}; its forward code must take the sizes from its modules"
        ) from error


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    parts = [path.split(".")[:-1] for path in paths]
    common: list[str] = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
