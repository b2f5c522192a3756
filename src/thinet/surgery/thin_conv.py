"""A convolution that multiplies only by the kernel taps that are left.

A convolution is a product of its weights, (N, C kh kw), with the patches of its input, (C kh kw,
places). Where whole rows of the patches meet nothing but zeros (Lebedev and Lempitsky, CVPR 2016:
one tap of one input map over all filters), these rows need not be made: the taps that are left are
gathered, and one thinner dense product, a 1 x 1 convolution, does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thinet.observe import preserved_rng

Tap = tuple[int, int, Sequence[int] | None]
"""Row and column in the kernel, and the input channels that it is left for (None: all)."""


class TakeTaps(nn.Module):
    """(.., C, h, w) -> (.., T, h', w'): for each tap that is left, the map that it looks at.

    Args:
        in_channels: C.
        taps: what is left, in the order of the result.
        stride, dilation: (rows, columns).
        padding: of zeros: left, right, top, bottom.
        kernel_size: of the convolution that it is taken from.
    """

    channels: Tensor

    def __init__(
        self,
        in_channels: int,
        taps: Sequence[Tap],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)
        self.places: list[tuple[int, int, int, int]] = []
        flat: list[int] = []
        for row, column, channels in taps:
            here = [] if channels is None else list(channels)
            self.places.append((row, column, len(flat), len(flat) + len(here)))
            flat += here
        inside = all(0 <= c < in_channels for c in flat) and all(
            0 <= r < self.kernel_size[0] and 0 <= c < self.kernel_size[1] for r, c, _ in taps
        )
        if not taps or not inside:
            raise ValueError("the taps are none, or not within the kernel and its input channels")
        self.register_buffer("channels", torch.tensor(flat, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = functional.pad(x, self.padding)
        (down, right), (row_step, column_step) = self.dilation, self.stride
        rows = (x.shape[-2] - down * (self.kernel_size[0] - 1) - 1) // row_step * row_step + 1
        columns = x.shape[-1] - right * (self.kernel_size[1] - 1) - 1
        columns = columns // column_step * column_step + 1
        taken: list[Tensor] = []
        for row, column, start, stop in self.places:
            top, left = row * down, column * right
            view = x[..., top : top + rows : row_step, left : left + columns : column_step]
            if start < stop:
                view = view.index_select(-3, self.channels[start:stop])
            taken.append(view)
        return torch.cat(taken, dim=-3)

    def extra_repr(self) -> str:
        return f"{len(self.places)} places of a {self.kernel_size} kernel, stride={self.stride}"


class ThinConv2d(nn.Sequential):
    """`TakeTaps` and a 1 x 1 convolution: what a `Conv2d` computes whose other taps are zero."""

    taps: TakeTaps
    mix: nn.Conv2d


def thin_convolution(out_channels: int, bias: bool, **options: Any) -> nn.Module:
    """A `ThinConv2d` with random weights that are the same each time; options as `TakeTaps`."""
    taken = TakeTaps(**options)
    every = options["in_channels"]
    count = sum(every if channels is None else len(channels) for *_, channels in options["taps"])
    with preserved_rng():
        torch.manual_seed(0)
        mix = nn.Conv2d(count, out_channels, 1, bias=bias)
    thin = ThinConv2d()
    thin.add_module("taps", taken)
    thin.add_module("mix", mix)
    return thin


def options_of(module: nn.Conv2d, stays: Tensor) -> Mapping[str, Any]:
    """The options of `thin_convolution` in place of a convolution, as plain data.

    Args:
        stays: bool (C, kh, kw), the taps that are left.
    """
    taps: list[list[Any]] = []
    for row in range(stays.shape[1]):
        for column in range(stays.shape[2]):
            channels = stays[:, row, column].nonzero().flatten().tolist()
            if channels:
                whole = len(channels) == module.in_channels
                taps.append([row, column, None if whole else channels])
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "bias": module.bias is not None,
        "taps": taps,
        "kernel_size": list(module.kernel_size),
        "stride": list(module.stride),
        "padding": list(module._reversed_padding_repeated_twice),
        "dilation": list(module.dilation),
    }


@torch.no_grad()
def take_weights(thin: nn.Module, module: nn.Conv2d, stays: Tensor) -> None:
    """Give a new `ThinConv2d` the weights of the convolution whose place it takes."""
    assert isinstance(thin, ThinConv2d)
    left = module.weight.permute(0, 2, 3, 1)[:, stays.permute(1, 2, 0)]
    thin.mix.weight.copy_(left[:, :, None, None])
    thin.mix.weight.requires_grad_(module.weight.requires_grad)
    if module.bias is not None and thin.mix.bias is not None:
        thin.mix.bias.copy_(module.bias)
        thin.mix.bias.requires_grad_(module.bias.requires_grad)


def not_thinnable(module: nn.Conv2d) -> str | None:
    """None, or why taps cannot be taken out of a convolution."""
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, which may compute something of its own"
    if module.groups != 1:
        return f"it has {module.groups} groups, and a tap of one does not reach all filters"
    if module.padding_mode != "zeros":
        return f"it pads by {module.padding_mode!r}; only zeros are supported"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weights are computed from others before each forward pass (a mask, a norm)"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which what takes its place would not have"
    return None


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what others have hung on it."""
