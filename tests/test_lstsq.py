"""Repair solvers against torch.linalg.lstsq on stored float64 rows."""

import pytest
import torch

from thinet.calibrate.moments import Moments
from thinet.errors import RepairError
from thinet.lstsq import cholesky, solve_full, solve_scale

ROWS, COLUMNS, OUTPUTS = 80, 9, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moments_of(phi: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    seen = Moments(phi.shape[1], target.shape[1])
    seen.add(phi, target)
    return seen.second, seen.mean, seen.cross, seen.y_mean


@pytest.fixture
def phi() -> torch.Tensor:
    return random(ROWS, COLUMNS) + 2  # means far from zero, so that the intercept matters


@pytest.fixture
def target(phi) -> torch.Tensor:
    return phi @ random(COLUMNS, OUTPUTS, seed=1) + 5 + 0.1 * random(ROWS, OUTPUTS, seed=2)


@pytest.mark.parametrize("intercept", [True, False])
def test_no_ridge_is_plain_least_squares(phi, target, intercept):
    prior = random(OUTPUTS, COLUMNS, seed=3)
    weight, bias = solve_full(*moments_of(phi, target), prior, ridge=0, intercept=intercept)
    design = torch.cat([phi, torch.ones(ROWS, 1)], 1) if intercept else phi
    want = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(weight, want[:COLUMNS].T)
    torch.testing.assert_close(bias, want[COLUMNS] if intercept else torch.zeros_like(bias))


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_ridge_pulls_to_the_prior(phi, target, ridge):
    prior = random(OUTPUTS, COLUMNS, seed=3)
    weight, bias = solve_full(*moments_of(phi, target), prior, ridge=ridge)
    centred, wanted = phi - phi.mean(0), target - target.mean(0)
    strength = (ridge * centred.square().mean() * ROWS).sqrt()
    want = torch.linalg.lstsq(
        torch.cat([centred, strength * torch.eye(COLUMNS, dtype=torch.float64)]),
        torch.cat([wanted, strength * prior.T]),
    ).solution
    torch.testing.assert_close(weight, want.T)
    torch.testing.assert_close(bias, target.mean(0) - weight @ phi.mean(0))


def test_an_endless_ridge_leaves_the_prior(phi, target):
    prior = random(OUTPUTS, COLUMNS, seed=3)
    weight, bias = solve_full(*moments_of(phi, target), prior, ridge=1e12)
    torch.testing.assert_close(weight, prior)
    torch.testing.assert_close(bias, (target - phi @ prior.T).mean(0))


@pytest.mark.parametrize("hazard", ["dead", "constant", "twin"])
@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_columns_that_tell_nothing_keep_the_fit_and_their_weights(phi, target, hazard, ridge):
    if hazard == "twin":
        phi[:, 3] = phi[:, 5]
    else:
        phi[:, 3] = 0.0 if hazard == "dead" else 7.0
    prior = random(OUTPUTS, COLUMNS, seed=3)
    weight, bias = solve_full(*moments_of(phi, target), prior, ridge=ridge)
    design = torch.cat([phi, torch.ones(ROWS, 1)], 1)
    best = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    spread = target.std().item()
    torch.testing.assert_close(phi @ weight.T + bias, best, atol=1e-3 * spread, rtol=0)
    if hazard == "twin":  # nearest to the prior: both twins move alike
        moved = weight - prior
        torch.testing.assert_close(moved[:, 3], moved[:, 5], atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(weight[:, 3], prior[:, 3], atol=1e-4, rtol=0)


def test_fewer_rows_than_columns_fit_exactly_without_wild_weights():
    phi, target = random(5, COLUMNS), random(5, OUTPUTS, seed=1)
    prior = torch.zeros(OUTPUTS, COLUMNS, dtype=torch.float64)
    weight, bias = solve_full(*moments_of(phi, target), prior, ridge=0)
    torch.testing.assert_close(phi @ weight.T + bias, target, atol=1e-5, rtol=0)
    design = phi - phi.mean(0)
    least = torch.linalg.lstsq(design, target - target.mean(0), driver="gelsd").solution.T
    torch.testing.assert_close(weight, least, atol=1e-5, rtol=0)


def test_kept_columns_make_up_for_the_removed_ones(phi):
    dense = random(OUTPUTS, COLUMNS, seed=4)
    kept = torch.tensor([0, 2, 3, 7])
    seen = Moments(COLUMNS, OUTPUTS)
    seen.add(phi, phi @ dense.T)
    part = seen.select(kept)
    weight, bias = solve_full(
        part.second, part.mean, part.cross, part.y_mean, dense[:, kept], ridge=0
    )
    lost = (phi[:, kept] @ weight.T + bias - phi @ dense.T).square().sum()
    design = torch.cat([phi[:, kept], torch.ones(ROWS, 1)], 1)
    solution = torch.linalg.lstsq(design, phi @ dense.T).solution
    want = (design @ solution - phi @ dense.T).square().sum()
    torch.testing.assert_close(lost, want)


def test_scale_is_least_squares_over_the_parts():
    parts = random(60, 6)
    kept = [1, 2, 5]
    want = torch.linalg.lstsq(parts[:, kept], parts.sum(1, keepdim=True)).solution.squeeze(1)
    scale = solve_scale(parts.T @ parts, torch.tensor(kept))
    torch.testing.assert_close(scale, want)


def test_scale_leaves_a_dead_channel_at_one_and_everything_kept_at_ones():
    parts = random(60, 6)
    parts[:, 2] = 0
    gram = parts.T @ parts
    assert solve_scale(gram, torch.tensor([1, 2, 5]))[1].item() == 1.0
    torch.testing.assert_close(
        solve_scale(gram, torch.arange(6)), torch.ones(6, dtype=torch.float64)
    )


def test_systems_without_a_solution_name_the_layer(phi, target):
    second, mean, cross, y_mean = moments_of(phi, target)
    prior = torch.zeros(OUTPUTS, COLUMNS)
    broken = second.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(RepairError, match=r"^layer1\.0\.conv2: .* holds NaN or infinite values"):
        solve_full(broken, mean, cross, y_mean, prior, name="layer1.0.conv2")
    with pytest.raises(RepairError, match=r"^layer1\.0\.conv2: .* of 9 unknowns is singular"):
        solve_full(-second, mean, cross, y_mean, prior, name="layer1.0.conv2")
    with pytest.raises(RepairError, match="layer2: the repaired weights are not finite"):
        solve_full(second, mean, cross / 0, y_mean, prior, name="layer2")
    with pytest.raises(RepairError, match="layer3: the least-squares system holds NaN"):
        solve_scale(torch.full((3, 3), float("inf")), torch.tensor([0]), name="layer3")


def test_jitter_only_where_needed():
    _, none = cholesky(torch.eye(3, dtype=torch.float64), "x")
    _, some = cholesky(torch.ones(3, 3, dtype=torch.float64), "x")
    assert none == 0.0
    assert 0 < some <= 1e-8


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_is_the_least_squares_over_all_that_may_be_dropped(p):
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(40, 3, dtype=torch.float64, generator=generator) + 1
    target = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    prior = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    n = len(phi)
    weight, bias = solve_full(
        phi.T @ phi / n, phi.mean(0), phi.T @ target / n, target.mean(0), prior,
        ridge=0, dropout=p,
    )  # fmt: skip
    # The change from the prior sees each of the 8 masks as often as it comes.
    rows, answers = [], []
    for mask in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3):
        often = torch.prod(torch.where(mask > 0, 1 - p, p)).sqrt()
        noisy = torch.cat([phi * mask / (1 - p), torch.ones(n, 1, dtype=torch.float64)], 1)
        rows.append(often * noisy)
        answers.append(often * (target - phi @ prior.T))
    change = torch.linalg.lstsq(torch.cat(rows), torch.cat(answers)).solution
    torch.testing.assert_close(weight, prior + change[:3].T)
    torch.testing.assert_close(bias, change[3])


def validated_by_hand(phi: torch.Tensor, target: torch.Tensor, prior: torch.Tensor):
    """The best of the pulls by generalised cross-validation, with the hat matrix written out."""
    rows, columns = phi.shape
    x, y = phi - phi.mean(0), target - target.mean(0)
    mean = float((x.T @ x / rows).diagonal().mean())
    found = []
    for factor in (1, 3, 10, 30, 100, 300, 1000):
        pulled = x.T @ x / rows + 1e-3 * factor * mean * torch.eye(columns)
        hat = x @ torch.linalg.inv(pulled) @ x.T / rows
        missed = (torch.eye(rows) - hat) @ (y - x @ prior.T)
        score = missed.square().sum() / (1 - (hat.trace() + 1) / rows) ** 2
        weight = prior + (torch.linalg.inv(pulled) @ x.T @ (y - x @ prior.T) / rows).T
        found.append((float(score), weight))
    return min(found, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("rows", [12, 20, 21, 30, 60, 99])
def test_with_few_rows_cross_validation_chooses_the_pull(rows):
    phi, prior = random(rows, 20, seed=rows) + 1, random(3, 20, seed=1)
    true = prior + 0.1 * random(3, 20, seed=2)
    target = phi @ true.T + 2 * random(rows, 3, seed=3)
    seen = Moments(20, 3)
    seen.add(phi, target)
    parts = seen.second, seen.mean, seen.cross, seen.y_mean
    options = {"ridge": 1e-3, "rows": rows, "y_variance": seen.y_variance()}
    weight, bias = solve_full(*parts, prior, **options)
    assert torch.allclose(weight, validated_by_hand(phi, target, prior), atol=1e-6)
    assert torch.allclose(bias, seen.y_mean - weight @ seen.mean)
    plain, _ = solve_full(*parts, prior, ridge=1e-3)
    assert (weight - true).square().sum() < (plain - true).square().sum()


@pytest.mark.parametrize("rows", [700, 1500])
def test_a_wide_system_is_validated_by_estimated_traces(rows):
    phi, prior = random(rows, 600, seed=rows) + 1, random(3, 600, seed=1)
    true = prior + 0.05 * random(3, 600, seed=2)
    target = phi @ true.T + random(rows, 3, seed=3)
    seen = Moments(600, 3)
    seen.add(phi, target)
    weight, _ = solve_full(
        seen.second, seen.mean, seen.cross, seen.y_mean, prior,
        ridge=1e-3, rows=rows, y_variance=seen.y_variance(),
    )  # fmt: skip
    by_hand = validated_by_hand(phi, target, prior)
    assert torch.allclose(weight, by_hand, atol=1e-6 * float(by_hand.abs().max()))


def test_with_enough_rows_the_pull_is_the_one_that_was_asked_for():
    phi, prior = random(100, 20), random(3, 20, seed=1)
    target = phi @ prior.T + random(100, 3, seed=3)
    seen = Moments(20, 3)
    seen.add(phi, target)
    parts = seen.second, seen.mean, seen.cross, seen.y_mean
    options = {"ridge": 1e-3, "rows": 100, "y_variance": seen.y_variance()}
    assert torch.equal(solve_full(*parts, prior, **options)[0],
                       solve_full(*parts, prior, ridge=1e-3)[0])  # fmt: skip


def test_a_system_is_singular_by_no_more_than_the_rounding_of_float32():
    turn = torch.linalg.qr(random(6, 6)).Q
    for lowest, solved in ((-3e-4, True), (-5e-3, False)):
        system = (turn * torch.tensor([lowest, 0, 0, 1.0, 2, 3 - lowest])) @ turn.T
        if solved:
            _, added = cholesky(system, "conv")
            assert -lowest < added <= 1e-3 * (1 + 1e-9)
        else:
            with pytest.raises(RepairError, match="conv: the least-squares system of 6 unknowns"):
                cholesky(system, "conv")
