"""A shortcut is seen however the layer's outputs come to it: one function in several layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from thinet.calibrate.layers import find_layers, output_gains
from thinet.trace.analyse import analyse

WIDE = (3.0, 0.3, 1.0, 6.0)
"""What the four branches are worth."""


class Branch(nn.Module):
    """A normalised branch of two layers beside a stream, channels last or first, scaled or not."""

    def __init__(self, number: int, *, scaled: bool, first: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

        self.norm, self.f, self.g = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.f.weight, self.g.weight = drawn(32, 16), drawn(16, 32)
        self.f.bias, self.g.bias = drawn(32), drawn(16)
        self.gamma = None
        with torch.no_grad():
            self.g.weight *= WIDE[number]
            if scaled:
                self.gamma = nn.Parameter(torch.linspace(0.5, 2, 16) * torch.tensor([1, -1] * 8))
                self.g.weight /= self.gamma[:, None]
                self.g.bias /= self.gamma
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1) if self.first else x
        y = self.g(F.gelu(self.f(self.norm(y))))
        if self.first:
            y = y.permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y * (self.gamma.reshape(-1, 1, 1) if self.first else self.gamma)
        return x + y

    def whole(self) -> tuple[Tensor, Tensor]:
        """The second layer with what scales it."""
        gamma = torch.ones(16) if self.gamma is None else self.gamma
        return self.g.weight * gamma[:, None], self.g.bias * gamma


class Stream(nn.Module):
    def __init__(self, *, scaled: bool = False, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.stem, self.head = nn.Linear(10, 16), nn.Linear(16, 5)
        self.blocks = nn.Sequential(*(Branch(n, scaled=scaled, first=first) for n in range(4)))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.blocks(x.permute(0, 3, 1, 2)) if self.first else self.blocks(x)
        return self.head(x.permute(0, 2, 3, 1) if self.first else x)


def rows() -> Tensor:
    return torch.randn(600, 10, generator=torch.Generator().manual_seed(1))


LAYOUTS = {
    "tokens": (Stream, {}, (200, 3)),
    "a map": (Stream, {}, (50, 4, 3)),
    "scaled": (Stream, {"scaled": True}, ()),
    "scaled tokens": (Stream, {"scaled": True}, (200, 3)),
    "channels first": (Stream, {"first": True}, (50, 4, 3)),
    "scaled, channels first": (Stream, {"first": True, "scaled": True}, (50, 4, 3)),
}


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_are_cut_and_refitted_alike(layout: str, refine: int) -> None:
    kind, options, shape = LAYOUTS[layout]
    settings = thinet.RepairSettings(refine=refine)
    asked = {"budget": thinet.Budget(macs=0.6), "divisor": 1, "repair_settings": settings}
    asked["criterion"] = "weight-sum"  # which looks at no consumer, scaled or not
    plain, other = Stream().eval(), kind(**options).eval()
    x = rows()
    given = x.reshape(*shape, 10) if shape else x
    torch.testing.assert_close(other(given).reshape(600, 5), plain(x), rtol=1e-4, atol=1e-5)
    want = thinet.prune(plain, x, x, **asked)
    found = thinet.prune(other, given, given, **asked)
    assert found.plan.keep == want.plan.keep
    widths = [len(units) for units in want.plan.keep.values()]
    assert max(widths) > 2 * min(widths)  # the branches differ in what they are worth
    for ours, theirs in zip(found.model.blocks, want.model.blocks, strict=True):
        for a, b in zip(ours.whole(), theirs.whole(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def test_the_second_layer_makes_up_for_what_the_stream_has_lost() -> None:
    model = Stream().eval()
    x = rows().reshape(200, 3, 10)
    keep = {"blocks.0.f": list(range(6)), "blocks.3.f": list(range(20))}
    options = {"repair_settings": thinet.RepairSettings(refine=0, ridge=1e-8)}
    budget = thinet.Budget(keep={name: len(units) for name, units in keep.items()})
    small = thinet.prune(model, x, x, budget=budget, criterion="weight-sum", **options).model
    with torch.no_grad():
        streams = []
        for net in (model, small):
            for block in net.blocks[:3]:
                block.eval()
            streams.append(net.blocks[:3](net.stem(x)))
        want, now = model.blocks[3](streams[0]), streams[1]
        last = small.blocks[3]
        inputs = F.gelu(last.f(last.norm(now))).flatten(0, 1)
        one = torch.ones(600, 1)
        target = (want - now).flatten(0, 1)
        best = torch.linalg.lstsq(torch.cat([inputs, one], 1).double(), target.double()).solution
    torch.testing.assert_close(last.g.weight.double(), best[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last.g.bias.double(), best[-1], rtol=1e-3, atol=1e-4)


def test_which_shortcuts_are_seen() -> None:
    class Mixer(nn.Module):
        """Mixes tokens: its outputs lie along the axis before the last."""

        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.g(self.f(x.transpose(1, 2)).relu()).transpose(1, 2)

    class Elsewhere(Mixer):
        """What is added is of other places, or the branch goes on by itself too."""

        def forward(self, x: Tensor) -> Tensor:
            y = self.g(self.f(x.transpose(1, 2)).relu())
            return (x + y.reshape(len(x), 6, -1)) * y.mean()

    class Scales(Mixer):
        """Scaled twice, or by a number for each place and not for each output."""

        def __init__(self, *shapes: tuple[int, ...]) -> None:
            super().__init__()
            self.scales = nn.ParameterList([torch.rand(shape) for shape in shapes])

        def forward(self, x: Tensor) -> Tensor:
            y = self.g(self.f(x.transpose(1, 2)).relu())
            for scale in self.scales:
                y = y * scale
            return x + y.transpose(1, 2)

    x = torch.randn(4, 6, 5)
    nets = {
        Mixer(): True, Elsewhere(): False, Scales((6,)): True, Scales((1, 1, 6)): True,
        Scales((6,), (6,)): False, Scales((5, 1)): False, Scales((1,)): False,
        Scales((5, 6)): False,
    }  # fmt: skip
    for net, seen in nets.items():
        layers = {v.module: v for v in find_layers(analyse(net, x).program).values()}
        assert (layers["g"].shortcut is not None) == seen
    turned = {v.module: v for v in find_layers(analyse(Mixer(), x).program).values()}["g"]
    assert turned.as_made(x).shape == (4, 5, 6)
    torch.testing.assert_close(turned.as_made(x), x.transpose(1, 2))


class Scaled(nn.Module):
    """A convolution whose outputs are scaled on their way to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 3, padding=1)
        self.gamma = nn.Parameter(torch.tensor([1.0, -2, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu()) * self.gamma[:, None, None]


def test_a_scale_is_a_gain() -> None:
    layers = find_layers(analyse(Scaled(), torch.randn(2, 3, 5, 5)).program).values()
    found = {v.module: v for v in layers}["b"]
    assert found.gain == "gamma" and found.shortcut is not None and found.turned_by is None
    net = randomise(Stream(scaled=True, first=True))
    layers = find_layers(analyse(net, rows().reshape(50, 4, 3, 10)).program).values()
    found = {v.module: v for v in layers}["blocks.1.g"]
    assert found.gain == "blocks.1.gamma"
    gains = output_gains(found, dict(net.named_parameters()))
    torch.testing.assert_close(gains, net.blocks[1].gamma.detach().double())


class Shared(nn.Module):
    """One branch beside two streams, scaled differently; what it gives the second is small."""

    def __init__(self, second: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.other = nn.Linear(6, 16), nn.Linear(6, 16)
        self.f, self.g, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.before = Branch(3, scaled=False, first=False)
        self.ga = nn.Parameter(torch.ones(16))
        self.gb = nn.Parameter(torch.full((16,), second))

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.before(self.first(x)), self.before(self.other(x))
        u = u + self.g(self.f(u).relu()) * self.ga
        v = v + self.g(self.f(v).relu()) * self.gb
        return self.head(u) + self.head(v)


def test_a_layer_of_several_gains_is_fitted_to_its_own_outputs() -> None:
    x = torch.randn(800, 6, generator=torch.Generator().manual_seed(2))
    fresh = torch.randn(800, 6, generator=torch.Generator().manual_seed(3))
    model = Shared(0.002).eval()
    layers = [v for v in find_layers(analyse(model, x).program).values() if v.module == "g"]
    assert [v.shortcut for v in layers] == [None, None]
    errors: dict[bool, float] = {}
    for shortcut in (True, False):
        settings = thinet.RepairSettings(refine=0, shortcut=shortcut)
        budget = thinet.Budget(keep={"before.f": 12, "f": 20})
        small = thinet.prune(model, x, x, budget=budget, repair_settings=settings).model
        errors[shortcut] = (small(fresh) - model(fresh)).square().mean().item()
    assert errors[True] < 1.05 * errors[False]
