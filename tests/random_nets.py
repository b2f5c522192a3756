"""Random networks: a list of steps, each a tiny module wired to earlier results.

A step is (kind, a, b, c): the kind picks a builder below, the numbers its sizes and inputs. A
builder that cannot take the shapes at hand returns None and the step is left out, so every list
of steps is a network, and hypothesis may shrink it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = tuple[str, int, int, int]
Builder = Callable[[Sequence[Tensor], int, int], nn.Module | None]

ACTS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(F.relu, torch.sigmoid, F.hardswish, F.silu, torch.tanh, F.elu),
    *(F.gelu, F.leaky_relu, F.softplus, torch.cos, torch.exp, F.relu6),
)


class Do(nn.Module):
    """A function without weights; `fn` is of module level, so that copies share nothing."""

    def __init__(self, fn: Callable[..., Any], *numbers: int) -> None:
        super().__init__()
        self.fn, self.numbers = fn, numbers

    def forward(self, *x: Tensor) -> Any:
        return self.fn(*x, *self.numbers)


class With(nn.Module):
    """A function of the input and of some layers."""

    def __init__(self, fn: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.fn, self.layers = fn, nn.ModuleList(layers)

    def forward(self, *x: Tensor) -> Tensor:
        return self.fn(*x, *self.layers)


class Scale(nn.Module):
    def __init__(self, channels: int, buffer: bool) -> None:
        super().__init__()
        scale = torch.linspace(0.5, 1.5, channels).view(-1, 1, 1)
        if buffer:
            self.register_buffer("scale", scale)
        else:
            self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Permute(nn.Module):
    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class Attention(nn.Module):
    """Over pixels; sizes by constant, by attribute or derived."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q, self.k, self.v = (nn.Linear(channels, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = (
            f(t).view(b, h * w, self.heads, self.head_dim).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(b, h * w, -1))
        return x + y.transpose(1, 2).reshape(b, -1, h, w)


# --- functions ------------------------------------------------------------------------------


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle_by_constant(x: Tensor, groups: int, each: int) -> Tensor:
    b, _, h, w = x.shape
    return x.view(b, groups, each, h, w).transpose(1, 2).reshape(b, groups * each, h, w)


def constant_view(x: Tensor, channels: int) -> Tensor:
    y = x.reshape(x.shape[0], channels, -1)
    return (y * y.mean(-1, keepdim=True)).reshape(x.shape[0], -1, *x.shape[2:])


def squeeze_excite(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    return x * torch.sigmoid(up(F.relu(down(x.mean((2, 3), keepdim=True)))))


def residual(x: Tensor, first: nn.Module, norm: nn.Module, second: nn.Module) -> Tensor:
    return x + second(F.relu(norm(first(x))))


def add_projected(x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
    return x + layer(y)


def twice(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.relu(layer(x)))


def channels_last(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def spatial_attention(x: Tensor, layer: nn.Module) -> Tensor:
    return x * torch.sigmoid(layer(torch.cat([x.mean(1, True), x.amax(1, True)], 1)))


def scale_first(x: Tensor, amount: int) -> Tensor:
    y = x + 0.1
    y[:, :amount].mul_(2)
    return y


def chunk(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, 1)


def split(x: Tensor, first: int) -> tuple[Tensor, ...]:
    return x.split([first, x.shape[1] - first], 1)


def pad(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, before, after))


def flip(x: Tensor) -> Tensor:
    return x.flip(1)


def flip_add(x: Tensor) -> Tensor:
    return x + 2 * x.flip(1)


def roll(x: Tensor, by: int) -> Tensor:
    return x.roll(by, 1)


def strided(x: Tensor, step: int) -> Tensor:
    return x[:, ::step]


def first_channels(x: Tensor, n: int) -> Tensor:
    return x[:, :n]


def last_channels(x: Tensor, n: int) -> Tensor:
    return x[:, -n:]


def glu(x: Tensor) -> Tensor:
    return F.glu(x, 1)


def centre(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def by_width(x: Tensor) -> Tensor:
    return x * x.shape[1] ** -0.5


def total(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


def repeat(x: Tensor) -> Tensor:
    return x.repeat(1, 2, 1, 1)


def interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)


def stack(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], 1).flatten(1, 2)


def zip_channels(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], 2).flatten(1, 2)


def join(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


# --- builders: inputs, b, c -> module or None -----------------------------------------------


def conv(x: Sequence[Tensor], b: int, c: int) -> nn.Module:
    k = (1, 3)[c % 2]
    return nn.Conv2d(x[0].shape[1], 3 + b % 4, k, padding=k // 2, bias=c % 3 > 0)


def grouped(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
    n = x[0].shape[1]
    groups = [g for g in (2, 3, 4) if n % g == 0]
    if not groups:
        return None
    g = groups[b % len(groups)]
    return nn.Conv2d(n, g * (1 + c % 3), 3, padding=1, groups=g)


def depthwise(x: Sequence[Tensor], b: int, c: int) -> nn.Module:
    n = x[0].shape[1]
    return nn.Conv2d(n, n * (1 + b % 2), 3, padding=1, groups=n)


def transposed(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
    n = x[0].shape[1]
    groups = 2 if c % 3 == 0 and n % 2 == 0 else 1
    out = groups * (2 + b % 3)
    return nn.ConvTranspose2d(n, out, 2, stride=2, groups=groups) if x[0].shape[2] < 5 else None


def weight_normed(x: Sequence[Tensor], b: int, c: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(conv(x, b, c))


def pool(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
    if x[0].shape[2] < 2:
        return None
    return (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Upsample((3, 3)))[c % 4]


def add(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
    first, second = x
    if first.shape[2:] != second.shape[2:]:
        return None
    if first.shape != second.shape:
        return With(add_projected, nn.Conv2d(second.shape[1], first.shape[1], 1))
    return Do((torch.add, torch.mul, torch.maximum)[c % 3])


def pair(fn: Callable[..., Tensor], alike: bool) -> Builder:
    def build(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
        fits = x[0].shape == x[1].shape if alike else x[0].shape[2:] == x[1].shape[2:]
        return Do(fn) if fits and x[0].shape[1] + x[1].shape[1] <= 16 else None

    return build


def se(x: Sequence[Tensor], b: int, c: int) -> nn.Module:
    n, mid = x[0].shape[1], 3 + b % 2
    return With(squeeze_excite, nn.Conv2d(n, mid, 1), nn.Conv2d(mid, n, 1))


def block(x: Sequence[Tensor], b: int, c: int) -> nn.Module:
    n, mid = x[0].shape[1], 3 + b % 3
    first, second = nn.Conv2d(n, mid, 3, padding=1), nn.Conv2d(mid, n, 1, bias=False)
    return With(residual, first, nn.BatchNorm2d(mid), second)


def group_norm(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
    n = x[0].shape[1]
    return nn.GroupNorm((1, 2)[c % 2], n) if n % 2 == 0 and x[0].shape[2] > 1 else None


def divided(by: int, make: Callable[[int], nn.Module], most: int = 16) -> Builder:
    """For operations that need channels in multiples of `by`."""

    def build(x: Sequence[Tensor], b: int, c: int) -> nn.Module | None:
        n = x[0].shape[1]
        return make(n) if n % by == 0 and n <= most else None

    return build


def width(x: Sequence[Tensor]) -> int:
    return x[0].shape[1]


PLAIN: dict[str, Builder] = {
    "conv": conv,
    "depthwise": depthwise,
    "norm": lambda x, b, c: nn.BatchNorm2d(width(x)),
    "act": lambda x, b, c: Do(ACTS[c % len(ACTS)]),
    "relu_": lambda x, b, c: With(in_place, nn.ReLU(inplace=True)),
    "prelu": lambda x, b, c: nn.PReLU(width(x)),
    "scale": lambda x, b, c: Scale(width(x), bool(b % 2)),
    "pool": pool,
    "add": add,
    "cat": pair(join, alike=False),
    "se": se,
    "block": block,
    "linear": lambda x, b, c: With(channels_last, nn.Linear(width(x), 3 + b % 4)),
    "twice": lambda x, b, c: With(twice, nn.Conv2d(width(x), width(x), 1)),
}

ODD: dict[str, Builder] = {
    "grouped": grouped,
    "transposed": transposed,
    "weight_norm": weight_normed,
    "group_norm": group_norm,
    "layer_norm": lambda x, b, c: With(channels_last, nn.LayerNorm(width(x))),
    "instance_norm": lambda x, b, c: nn.InstanceNorm2d(width(x)) if x[0].shape[2] > 1 else None,
    "stack": pair(stack, alike=True),
    "zip": pair(zip_channels, alike=True),
    "attention": lambda x, b, c: Attention(width(x), 2, 2 + b % 2),
    "spatial": lambda x, b, c: With(spatial_attention, nn.Conv2d(2, 1, 1)),
    "chunk": divided(2, lambda n: Do(chunk)),
    "split": lambda x, b, c: Do(split, 1 + b % (width(x) - 1)) if width(x) > 1 else None,
    "glu": divided(2, lambda n: Do(glu)),
    "shuffle": divided(2, lambda n: Do(shuffle, 2)),
    "shuffle_constant": divided(2, lambda n: Do(shuffle_by_constant, 2, n // 2)),
    "pixel_shuffle": divided(4, lambda n: nn.PixelShuffle(2)),
    "view": divided(1, lambda n: Do(constant_view, n)),
    "pad": lambda x, b, c: Do(pad, b % 3, c % 3) if width(x) < 12 else None,
    "flip": lambda x, b, c: Do((flip, flip_add)[c % 2]),
    "roll": lambda x, b, c: Do(roll, 1 + b % 3),
    "strided": lambda x, b, c: Do(strided, 2 + b % 2) if width(x) > 3 else None,
    "first": lambda x, b, c: Do((first_channels, last_channels)[c % 2], 1 + b % 4),
    "scale_first": lambda x, b, c: Do(scale_first, 1 + b % 4),
    "repeat": divided(1, lambda n: Do(repeat), most=8),
    "interleave": divided(1, lambda n: Do(interleave), most=8),
    "mix": lambda x, b, c: Do((centre, by_width, softmax, total)[c % 4]),
    "permute": lambda x, b, c: Permute(
        torch.randperm(width(x), generator=torch.Generator().manual_seed(b))
    ),
}

ALL = PLAIN | ODD
PAIRS = {"add", "cat", "stack", "zip"}


def in_place(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x + 0.1)


class RandomNet(nn.Module):
    """A stem, the steps, and a head that reads every result that no step has read."""

    def __init__(self, steps: Sequence[Step], flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.steps = nn.ModuleList()
        self.wires: list[tuple[int, ...]] = []
        self.kinds: list[str] = []
        values = [self.stem(self.example())]
        with torch.no_grad():
            for kind, a, b, c in steps:
                last = len(values) - 1
                wires = (last - a % min(len(values), 3),)
                wires += (last - b % len(values),) if kind in PAIRS else ()
                module = ALL[kind]([values[i] for i in wires], b, c)
                if module is None:
                    continue
                result = module.eval()(*(values[i] for i in wires))
                values += result if isinstance(result, tuple) else (result,)
                self.steps.append(module)
                self.wires.append(wires)
                self.kinds.append(kind)
            used = {i for wires in self.wires for i in wires}
            self.ends = [i for i in range(len(values)) if i not in used]
            self.head = nn.Linear(sum(self.read(values[i]).shape[1] for i in self.ends), 3)

    @staticmethod
    def example() -> Tensor:
        return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))

    def read(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.flatten else x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for module, wires in zip(self.steps, self.wires, strict=True):
            result = module(*(values[i] for i in wires))
            values += result if isinstance(result, tuple) else (result,)
        return self.head(torch.cat([self.read(values[i]) for i in self.ends], 1))

    def describe(self) -> str:
        parts = zip(self.kinds, self.wires, self.steps, strict=True)
        lines = [f"  {i + 1}: {k}{w} {m}" for i, (k, w, m) in enumerate(parts)]
        return "\n".join([*lines, f"  head of {self.ends}, flatten={self.flatten}"])
