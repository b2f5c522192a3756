"""One contract for all criteria, and each against what its definition says by brute force."""

import itertools
from dataclasses import replace

import pytest
import torch

from thinet.calibrate.gram import gram
from thinet.criteria import Consumer, GroupStatistics, Order, base, criteria, criterion, get
from thinet.criteria.block_obs import eliminate
from thinet.criteria.fpgm import distance_sums
from thinet.criteria.group_brain_damage import penalties, tap_norms
from thinet.criteria.l2 import norms
from thinet.criteria.taylor import normalised
from thinet.criteria.thinet import greedy
from thinet.criteria.thinet_omp import pursue
from thinet.criteria.weight_sum import weight_sums
from thinet.errors import CalibrationError, CriterionError, OptionError, RepairError

UNITS = 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def consumer(rows: torch.Tensor, weight: torch.Tensor, units: torch.Tensor | None = None):
    second = rows.T @ rows / len(rows)
    columns = weight.flatten(1)
    energy = float((rows @ columns.T).square().sum() / len(rows))
    units = torch.arange(weight.shape[1]) if units is None else units
    return Consumer(weight, units, second, energy)


@pytest.fixture
def stats() -> GroupStatistics:
    """A convolution and a linear layer that reads each unit twice and two foreign channels."""
    mixing = random(24, 24, seed=1) / 4 + torch.eye(24)
    conv = consumer(random(90, 24) @ mixing, random(5, UNITS, 2, 2, seed=2))
    units = torch.tensor([3, 0, -1, 5, 1, 2, 4, 4, 1, 0, 5, 3, -1, 2])
    linear = consumer(random(90, 14, seed=3) + 0.5, random(20, 14, seed=4), units)
    total = sum(gram(c.second, c.weight, c.units, UNITS) / c.energy for c in (conv, linear))
    return GroupStatistics(
        name="features.3",
        channels=UNITS,
        gram=total,
        consumers=(conv, linear),
        filters=(random(UNITS, 7, seed=5), random(UNITS, 3, seed=6)),
        zeros=random(UNITS, seed=7).sigmoid(),
        taylor=random(UNITS, seed=8).abs(),
        taylor_fo=random(UNITS, seed=9).square(),
        bn_scale=random(UNITS, seed=10),
    )


def permuted(stats: GroupStatistics, order: list[int]) -> GroupStatistics:
    """The same group with unit `order[i]` now called i."""
    index = torch.tensor(order)
    new_name = torch.empty(UNITS + 1, dtype=torch.long)
    new_name[index], new_name[-1] = torch.arange(UNITS), -1
    return replace(
        stats,
        gram=stats.gram[index][:, index],
        consumers=tuple(replace(c, units=new_name[c.units]) for c in stats.consumers),
        filters=tuple(f[index] for f in stats.filters),
        **{n: getattr(stats, n)[index] for n in ("zeros", "taylor", "taylor_fo", "bn_scale")},
    )


# The contract that every criterion keeps.


@pytest.mark.parametrize("name", criteria())
def test_order_of_all_units_and_keep(name, stats):
    order = get(name)(stats)
    assert sorted(order.removed) == list(range(UNITS))
    for count in range(1, UNITS + 1):
        kept = order.keep(count)
        assert kept == tuple(sorted(set(range(UNITS)) - set(order.removed[: UNITS - count])))
    for count in (0, UNITS + 1):
        with pytest.raises(OptionError, match=f"cannot keep {count} of {UNITS} channels"):
            order.keep(count)


@pytest.mark.parametrize("name", criteria())
def test_the_same_statistics_give_the_same_order(name, stats):
    state = torch.get_rng_state()
    first = get(name)(stats)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert get(name)(stats) == first


@pytest.mark.parametrize("name", sorted(set(criteria()) - {"random"}))
def test_the_order_does_not_depend_on_how_units_are_numbered(name, stats):
    numbering = [4, 2, 5, 0, 1, 3]
    found = get(name)(permuted(stats, numbering))
    want = get(name)(stats)
    assert tuple(numbering[i] for i in found.removed) == want.removed
    if want.errors is not None:
        assert found.errors == pytest.approx(want.errors)


@pytest.mark.parametrize("name", criteria())
def test_errors_start_at_zero_never_fall_and_end_at_the_units_energy(name, stats):
    errors = get(name)(stats).errors
    if errors is None:
        assert name not in {"thinet", "thinet-omp", "block-obs"}
        return
    assert len(errors) == UNITS + 1
    assert errors[0] == 0
    assert list(errors) == sorted(errors)


@pytest.mark.parametrize("name", criteria())
def test_statistics_are_left_as_they_were(name, stats):
    before = [c.second.clone() for c in stats.consumers] + [stats.gram.clone(), stats.zeros.clone()]
    get(name)(stats)
    after = [c.second for c in stats.consumers] + [stats.gram, stats.zeros]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", sorted(set(criteria()) - {"random"}))
def test_what_is_needed_must_be_there(name):
    with pytest.raises(CalibrationError) as error:
        get(name)(GroupStatistics("layer1.0.conv1", UNITS))
    need = next(iter(get(name).needs))
    assert f"group 'layer1.0.conv1': criterion {name!r} needs {need}, which" in str(error.value)


@pytest.mark.parametrize("name", sorted(set(criteria()) - {"random"}))
def test_values_that_are_not_finite_name_the_group(name, stats):
    nan = float("nan")
    broken = replace(
        stats,
        consumers=tuple(replace(c, weight=c.weight * nan) for c in stats.consumers),
        filters=tuple(f * nan for f in stats.filters),
        **{
            n: getattr(stats, n) * nan for n in ("gram", "zeros", "taylor", "taylor_fo", "bn_scale")
        },
    )
    with pytest.raises(CalibrationError, match=r"group 'features\.3': its statistics hold NaN"):
        get(name)(broken)


@pytest.mark.parametrize("name", sorted(set(criteria()) - {"random"}))
def test_dead_units_go_by_index(name):
    """A group in which nothing matters at all."""
    dead = Consumer(torch.zeros(2, 4), torch.arange(4), torch.zeros(4, 4), 0.0)
    nothing = torch.zeros(4)
    stats = GroupStatistics(
        "dead", 4, torch.zeros(4, 4), (dead,), (torch.zeros(4, 3),), *(nothing,) * 4
    )
    order = get(name)(stats)
    assert sorted(order.removed) == [0, 1, 2, 3]
    if name not in {"thinet-omp"}:
        assert order.removed == (0, 1, 2, 3)


# The table.


def test_an_unknown_name_gets_the_nearest_names():
    with pytest.raises(OptionError, match=r"unknown criterion 'tinet'; did you mean 'thinet'"):
        get("tinet")
    with pytest.raises(OptionError, match=r"unknown criterion 'xxxxx'; there are .*thinet"):
        get("xxxxx")


def test_a_user_adds_one(stats, monkeypatch):
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))

    @criterion("last-first", needs={"filters"})
    def last_first(stats: GroupStatistics) -> Order:
        return Order(tuple(range(stats.channels))[::-1])

    assert "last-first" in criteria()
    assert get("last-first") is last_first
    assert last_first(stats).keep(2) == (0, 1)
    with pytest.raises(OptionError, match="'last-first' exists already"):
        criterion("last-first", needs=())
    with pytest.raises(OptionError, match="needs unknown statistics colour"):
        criterion("other", needs={"colour"})

    @criterion("forgetful", needs=())
    def forgetful(stats: GroupStatistics) -> Order:
        return Order((0, 1))

    with pytest.raises(OptionError, match=r"must order units 0\.\.5, each once; it returned 2"):
        forgetful(stats)


def test_the_table_is_complete():
    assert set(criteria()) == {
        "apoz", "block-obs", "bn-scale", "fpgm", "group-brain-damage", "l2", "random",
        "taylor", "taylor-fo", "thinet", "thinet-omp", "weight-sum",
    }  # fmt: skip


# ThiNet's greedy and its relatives, each step by its definition on stored samples.


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_what_costs_least_at_each_step(seed):
    samples = random(40, 7, seed=seed) + 0.5 * random(40, 1, seed=99)
    order, errors = greedy(samples.T @ samples)
    removed: list[int] = []
    for step in range(7):
        costs = {
            j: float(samples[:, [*removed, j]].sum(1).square().sum())
            for j in range(7)
            if j not in removed
        }
        removed.append(min(costs, key=costs.__getitem__))
        assert order[step] == removed[-1]
        assert errors[step].item() == pytest.approx(costs[removed[-1]])


def test_greedy_prefers_channels_that_cancel():
    # 0 is smallest; then 1 and 2 cancel each other although 3 is smaller than either
    samples = torch.tensor([[1.0, 0, 0, 0], [0, 3, -3, 0], [0, 0, 0, 2]])
    order, errors = greedy(samples.T @ samples)
    assert order == [0, 3, 1, 2]
    assert errors.tolist() == [1, 5, 14, 5]
    assert get("thinet")(GroupStatistics("g", 4, samples.T @ samples)).errors == (0, 1, 5, 14, 14)


def naive_pursuit(samples: torch.Tensor) -> tuple[list[int], list[float]]:
    y, residual = samples.sum(1), samples.sum(1)
    chosen: list[int] = []
    errors = []
    for _ in range(samples.shape[1]):
        gains = {
            j: float((residual @ samples[:, j]) ** 2 / samples[:, j].square().sum())
            for j in range(samples.shape[1])
            if j not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))
        part = samples[:, chosen]
        residual = y - part @ torch.linalg.lstsq(part, y[:, None]).solution.squeeze(1)
        errors.append(float(residual.square().sum()))
    return chosen, errors


@pytest.mark.parametrize("seed", range(5))
def test_pursuit_is_orthogonal_matching_pursuit(seed):
    samples = random(40, 7, seed=seed) + 0.5 * random(40, 1, seed=99)
    want, want_errors = naive_pursuit(samples)
    order, errors = pursue(samples.T @ samples)
    # The last residual of all is zero: nothing is left to choose by.
    assert order == want
    assert errors.tolist() == pytest.approx(want_errors, abs=1e-9)
    found = get("thinet-omp")(GroupStatistics("g", 7, samples.T @ samples))
    assert found.removed == tuple(reversed(want))
    energy = float(samples.sum(1).square().sum())
    assert found.errors == pytest.approx([*reversed(want_errors), energy], abs=1e-9)


def test_pursuit_with_a_dead_and_a_repeated_channel():
    samples = random(30, 5)
    samples[:, 1], samples[:, 4] = 0, samples[:, 0]
    order, errors = pursue(samples.T @ samples)
    assert set(order[:3]) in ({0, 2, 3}, {4, 2, 3})
    assert errors[2:].tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def refit_loss(rows: torch.Tensor, c: Consumer, removed: list[int]) -> float:
    """Energy that the kept columns cannot explain, by least squares on the rows."""
    taps = rows.shape[1] // c.weight.shape[1]
    owner = c.units.repeat_interleave(taps)
    kept = torch.tensor([int(u) not in removed for u in owner])
    y = rows @ c.weight.flatten(1).T
    if not kept.any():
        return float(y.square().sum()) / len(rows) / c.energy
    solution = torch.linalg.lstsq(rows[:, kept], y).solution
    return float((y - rows[:, kept] @ solution).square().sum()) / len(rows) / c.energy


@pytest.fixture
def two_consumers() -> list[tuple[torch.Tensor, Consumer]]:
    conv_rows = random(90, 24) @ (random(24, 24, seed=1) / 4 + torch.eye(24))
    units = torch.tensor([3, 0, -1, 5, 1, 2, 4, 4, 1, 0, 5, 3, 5])
    rows = random(90, 13, seed=3) + 0.5
    return [
        (conv_rows, consumer(conv_rows, random(5, UNITS, 2, 2, seed=2))),
        (rows, consumer(rows, random(20, 13, seed=4), units)),  # uneven units, N > columns
    ]


@pytest.mark.parametrize("pending", [1, 5, 256])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_block_obs_is_greedy_elimination_with_full_refit(
    two_consumers, which, pending, monkeypatch
):
    monkeypatch.setattr("thinet.criteria.block_obs._PENDING", pending)
    pairs = [two_consumers[i] for i in which]
    order, errors = eliminate([c for _, c in pairs], UNITS, ridge=0)
    removed: list[int] = []
    for step in range(UNITS):
        losses = {
            j: sum(refit_loss(rows, c, [*removed, j]) for rows, c in pairs)
            for j in range(UNITS)
            if j not in removed
        }
        removed.append(min(losses, key=losses.__getitem__))
        assert order[step] == removed[-1]
        assert errors[step].item() == pytest.approx(losses[removed[-1]], rel=1e-8)


def test_block_obs_survives_dead_repeated_and_too_few_rows():
    rows = random(10, 24)
    rows[:, 4:8] = 0
    rows[:, 8:12] = rows[:, 12:16]
    c = consumer(rows, random(5, UNITS, 2, 2, seed=2))
    order, errors = eliminate([c], UNITS)
    assert order[0] == 1
    assert torch.isfinite(errors).all()
    assert errors[0].item() == pytest.approx(0, abs=1e-4)


def test_block_obs_refuses_moments_that_are_none(stats):
    broken = replace(stats.consumers[0], second=-stats.consumers[0].second)
    with pytest.raises(RepairError, match=r"group 'features\.3': .* is singular"):
        get("block-obs")(replace(stats, consumers=(broken,)))


# Scores, worked by hand.


def test_apoz_removes_the_highest_share_of_zeros_first():
    stats = GroupStatistics("g", 4, zeros=torch.tensor([0.25, 0.75, 0.5, 0.75]))
    assert get("apoz")(stats).removed == (1, 3, 2, 0)


def test_weight_sum_and_l2_over_two_producers():
    first = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[-1.0], [0.0], [2.0]])
    assert weight_sums((first, second)).tolist() == [4, 3, 4]
    assert norms((first, second)).square().tolist() == pytest.approx([6, 9, 8])
    stats = GroupStatistics("g", 3, filters=(first, second))
    assert get("weight-sum")(stats).removed == (1, 0, 2)
    assert get("l2")(stats).removed == (0, 2, 1)


def test_taylor_is_normalised_over_the_layer():
    assert normalised(torch.tensor([3.0, 0.0, 4.0])).tolist() == pytest.approx([0.6, 0, 0.8])
    assert normalised(torch.zeros(2)).tolist() == [0, 0]
    scores = torch.tensor([3.0, 0.0, 4.0])
    assert get("taylor")(GroupStatistics("g", 3, taylor=scores)).removed == (1, 0, 2)
    assert get("taylor-fo")(GroupStatistics("g", 3, taylor_fo=scores)).removed == (1, 0, 2)


def test_bn_scale_goes_by_absolute_value():
    stats = GroupStatistics("g", 3, bn_scale=torch.tensor([-3.0, 0.5, 1.0]))
    assert get("bn-scale")(stats).removed == (1, 2, 0)


def test_fpgm_removes_what_the_others_can_replace():
    filters = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0], [30.0, 40.0]])
    sums = distance_sums((filters[:, :1], filters[:, 1:])).tolist()
    to_last = [50, 45, (30**2 + 32**2) ** 0.5]
    want = [5 + 8 + to_last[0], 5 + 5 + to_last[1], 8 + 5 + to_last[2], sum(to_last)]
    assert sums == pytest.approx(want)
    assert get("fpgm")(GroupStatistics("g", 4, filters=(filters,))).removed == (1, 2, 0, 3)


def test_group_brain_damage_adds_the_norms_of_taps():
    kernel = torch.zeros(2, 2, 1, 2)
    kernel[:, 0, 0, 0] = torch.tensor([3.0, 4.0])  # tap norms 5 and 0
    kernel[:, 1, 0, :] = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # tap norms 2 and 2
    assert tap_norms(kernel).tolist() == [[5, 0], [2, 2]]
    linear = torch.tensor([[1.0, 0.0, 6.0]])
    consumers = (
        Consumer(kernel, torch.tensor([0, 1])),
        Consumer(linear, torch.tensor([1, 1, -1])),
    )
    assert penalties(consumers, 3).tolist() == [5, 5, 0]
    assert get("group-brain-damage")(GroupStatistics("g", 3, consumers=consumers)).removed == (
        2,
        0,
        1,
    )


def test_random_depends_on_name_and_seed_only():
    orders = {
        (name, seed): get("random")(GroupStatistics(name, 30, seed=seed)).removed
        for name, seed in itertools.product(["layer1", "layer2"], [0, 1])
    }
    assert len(set(orders.values())) == 4
    assert orders["layer1", 0][:4] == get("random")(GroupStatistics("layer1", 30)).removed[:4]


def test_a_criterion_that_returns_no_order_is_named(stats, monkeypatch):
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))
    nothing = criterion("nothing", needs="filters")(lambda _: None)
    assert nothing.needs == {"filters"}
    with pytest.raises(OptionError, match=r"'nothing' must return a thinet.criteria.Order.*None"):
        nothing(stats)


def test_a_criterion_that_fails_names_the_group_and_itself(stats, monkeypatch):
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))

    @criterion("boom", needs=())
    def boom(stats: GroupStatistics) -> Order:
        raise ZeroDivisionError("by nought")

    with pytest.raises(CriterionError, match="'boom' failed with ZeroDivisionError: by nought"):
        boom(stats)
