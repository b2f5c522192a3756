"""The paper's strategies for VGG-16 (ThiNet, ICCV 2017, section 4.2), for plain chains like it."""

from __future__ import annotations

from collections.abc import Sequence

from thinet.budget import units
from thinet.recipes.recipe import Recipe, Step, Tuning
from thinet.recipes.structure import Network, convolution_chain, pooled_head
from thinet.types import ChannelGroup

CONVOLUTIONS = 13
CUT = 10
"""conv1_1 to conv4_3: they hold most of the multiply-adds; the last three hold few."""

LAYER = Tuning(1, 1e-3)
BEFORE_POOL = Tuning(2, 1e-3, (1,))
LAST = Tuning(12, 1e-3, (4, 8))
SOURCE = "ThiNet, ICCV 2017, section 4.2"

TINY = (0.25,) * 12 + (0.5,)
"""16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128 and 256 channels of VGG-16's."""


def conv(net: Network, keep: float | None) -> Recipe:
    """`vgg16-conv`: half of the channels of the first ten convolutions, one after another."""
    chain = convolution_chain(net, CONVOLUTIONS, "the recipe vgg16-conv")
    fractions = [0.5 if keep is None else keep] * CUT
    return Recipe("vgg16-conv", _steps(chain[:CUT], fractions), SOURCE)


def gap(net: Network, keep: float | None) -> Recipe:
    """`vgg16-gap`: the same, then a global average pool for the fully connected layers."""
    chain = convolution_chain(net, CONVOLUTIONS, "the recipe vgg16-gap")
    fractions = [0.5 if keep is None else keep] * CUT
    return Recipe("vgg16-gap", (*_steps(chain[:CUT], fractions), _head(net, chain)), SOURCE)


def tiny(net: Network, keep: float | None) -> Recipe:
    """`vgg16-tiny`: a quarter of the channels, half of the last ones, and the pooled head.

    The paper gives the widths and not the order: here the head comes after the tenth layer, as in
    `vgg16-gap`, so that the last convolutions are cut for the head that stays.
    """
    chain = convolution_chain(net, CONVOLUTIONS, "the recipe vgg16-tiny")
    first = _steps(chain[:CUT], TINY[:CUT])
    last = _steps(chain[CUT:], TINY[CUT:])
    return Recipe("vgg16-tiny", (*first, _head(net, chain), *last), SOURCE)


def _steps(chain: Sequence[ChannelGroup], fractions: Sequence[float]) -> tuple[Step, ...]:
    """One step a layer; conv1_2, conv2_2 and conv3_3, before a pooling, are trained longer."""
    steps: list[Step] = []
    for number, (group, fraction) in enumerate(zip(chain, fractions, strict=True), start=1):
        tuning = BEFORE_POOL if number in (2, 4, 7) and len(chain) == CUT else LAYER
        if number == len(chain):
            tuning = LAST
        steps.append(Step(group.name, {group.name: units(group, fraction)}, tuning))
    return tuple(steps)


def _head(net: Network, chain: Sequence[ChannelGroup]) -> Step:
    last = chain[-1]
    replaced = pooled_head(net, last.name, last.channels)
    return Step(replaced[-1].module, {}, LAST, replaced)
