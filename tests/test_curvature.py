"""Loss-aware choosing: Gamma by one backward pass an image, and what it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import thinet
from thinet.calibrate.collect import collect
from thinet.calibrate.curvature import collect_curvature, weighed
from thinet.calibrate.patches import patches
from thinet.calibrate.statistics import group_statistics
from thinet.errors import CalibrationError, OptionError
from thinet.trace.analyse import analyse


class Small(nn.Module):
    """Two convolutions, the second strided, grouped where asked for, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 5, 3, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(functional.relu_(self.norm(self.first(x))))
        return self.head(functional.relu(y, inplace=True).mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 9, 9, generator=generator), torch.randint(4, (n,), generator=generator))
        for n in (3, 5)
    ]


def by_hand(model: Small, layer: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Sum over positions of g g' for one image."""
    kept: list[Tensor] = []

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        kept.append(output)
        output.retain_grad()
        return output + 0  # what follows works in place

    handle = layer.register_forward_hook(hook)
    functional.cross_entropy(model(image[None]), label[None]).backward()
    handle.remove()
    gradient = kept[0].grad
    assert gradient is not None
    rows = gradient.flatten(2)[0].T if gradient.ndim == 4 else gradient
    return (rows.T @ rows).double()


def roots(model: nn.Module, data: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    analysis = analyse(model, data[0][0][:1])
    sites = {site.module: site.op for group in analysis.groups for site in group.sites}
    found = collect_curvature(
        model, data, program=analysis.program, wanted=list(sites.values()), **options
    )
    return analysis, {name: found[op] for name, op in sites.items()}


def test_gamma_is_the_mean_of_what_each_image_sends_back() -> None:
    model = small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    _, found = roots(model, batches())
    assert found.keys() == {"second", "head"}
    for name, root in found.items():
        parts = [
            by_hand(model, model.get_submodule(name), image, label)
            for images, labels in batches()
            for image, label in zip(images, labels, strict=True)
        ]
        gamma = torch.stack(parts).mean(0)
        assert torch.allclose(root.T @ root, gamma, atol=1e-6 * float(gamma.abs().max())), name
    model.zero_grad()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_without_labels_they_are_drawn_from_the_models_own_answers() -> None:
    model = small()
    images = torch.cat([x for x, _ in batches()])
    one = images[:1]
    many = [(one.expand(500, -1, -1, -1), None)]
    _, found = roots(model, many)
    likely = model(one).softmax(1)[0].detach()
    gamma = sum(
        likely[label] * by_hand(model, model.second, one[0], torch.tensor(label))
        for label in range(4)
    )
    assert isinstance(gamma, Tensor)
    drawn = found["second"].T @ found["second"]
    assert (drawn - gamma).norm() < 0.15 * gamma.norm()
    again = roots(model, many)[1]["second"]
    other = roots(model, many, seed=1)[1]["second"]
    assert torch.equal(again, found["second"]) and not torch.equal(other, again)


def test_the_gram_is_half_the_squared_change_of_the_loss_to_first_order() -> None:
    model, data = small(), batches()
    analysis, found = roots(model, data)
    group = next(g for g in analysis.groups if g.name == "first")
    (op,) = (site.op for site in group.sites)
    given = {op: found["second"]}
    seen = collect(
        model, [x for x, _ in data], program=analysis.program, groups=[group], roots=given
    )
    stats = group_statistics(model, group, seen)
    assert stats.gram is not None
    gamma = found["second"].T @ found["second"]
    with torch.no_grad():
        x = torch.cat([functional.relu(model.norm(model.first(x))) for x, _ in data])
        phi = patches(x, seen.layers[op].geometry)
        weight = model.second.weight.detach()
    for unit in (0, 3):
        columns = slice(unit * 9, unit * 9 + 9)
        part = (phi[:, columns] @ weight[:, unit].flatten(1).T).double()
        wanted = torch.einsum("rn,nm,rm->r", part, gamma, part).mean() / 2
        assert float(stats.gram[unit, unit]) == pytest.approx(float(wanted), rel=1e-4)


def test_weighed_by_one_is_the_weight_itself() -> None:
    weight = torch.randn(4, 3, 2, 2)
    assert weighed(weight, None) is weight
    assert torch.equal(weighed(weight, torch.eye(4)), weight)


class Deaf(nn.Module):
    """Units 4 to 7 are loud, and all they reach is an output that the classifier does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)
        self.head = nn.Linear(2, 3)
        with torch.no_grad():
            self.second.weight.copy_(torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [9.0] * 4]))
            self.head.weight[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("criterion", ["thinet", "thinet-omp", "block-obs"])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_the_loss_does_not_hear_goes_first(criterion: str, labelled: bool) -> None:
    torch.manual_seed(0)
    model, x = Deaf().eval(), torch.randn(40, 6)
    data = [(x, torch.randint(3, (40,)))] if labelled else [x]
    options: dict[str, Any] = {"budget": thinet.Budget(keep={"first": 4}), "criterion": criterion}
    loud = thinet.prune(model, x[:1], data, **options)
    assert len({4, 5, 6, 7}.intersection(loud.plan.keep["first"])) >= 3
    heard = thinet.prune(model, x[:1], data, loss_aware=True, **options)
    assert heard.plan.keep["first"] == (0, 1, 2, 3)
    assert heard.plan.settings["loss_aware"] is True
    assert torch.allclose(heard.model(x), model(x), atol=1e-3)


def test_widths_go_by_the_loss_too() -> None:
    model, data = small(), batches()
    wide = [(x.repeat(4, 1, 1, 1), y.repeat(4)) for x, y in data]
    found = thinet.prune(
        model, wide[0][0][:1], wide, budget=thinet.Budget(macs=0.6), loss_aware=True, divisor=1
    )
    errors = [g.error for g in found.report.groups if g.kept < g.channels]
    assert found.report.reached == pytest.approx(0.6, abs=0.01)
    assert errors and all(error is not None and error > 0 for error in errors)


def test_a_consumer_too_wide_for_its_moments_is_weighed_on_the_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6400, 2), nn.Linear(2, 3)
    )
    with torch.no_grad():
        model[3].weight[0, 3200:], model[3].weight[1, :3200] = 0, 0
        model[3].weight[1] *= 9
        model[4].weight[:, 1] = 0
    x = torch.randn(8, 3, 12, 12)
    options: dict[str, Any] = {"budget": thinet.Budget(keep=0.5), "only": "0", "repair": "none"}
    assert thinet.prune(model, x[:1], [x], **options).plan.keep["0"] == tuple(range(32, 64))
    heard = thinet.prune(model, x[:1], [x], loss_aware=True, **options)
    assert heard.plan.keep["0"] == tuple(range(32))


def test_what_cannot_be_weighed_is_refused() -> None:
    model, data = small(), batches()
    half = thinet.Budget(keep=0.5)
    with pytest.raises(OptionError, match="loss_aware"):
        thinet.prune(model, data[0][0], data, budget=half, loss_aware=True, sampling="paper")
    with pytest.raises(OptionError, match="criterion 'weight-sum' does not look"):
        thinet.prune(model, data[0][0], data, budget=half, loss_aware=True, criterion="weight-sum")
    maps = nn.Sequential(model.first, nn.ReLU(), model.second)
    with pytest.raises(CalibrationError, match="logits of shape"):
        thinet.prune(maps, data[0][0], data, budget=half, loss_aware=True)
    wrong = [(x, y + 4) for x, y in data]
    with pytest.raises(CalibrationError, match="do not fit logits"):
        thinet.prune(model, data[0][0], wrong, budget=half, loss_aware=True)
