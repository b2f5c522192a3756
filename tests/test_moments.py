"""Streamed sums against the same sums over stored float64 rows."""

import pytest
import torch

from thinet.calibrate import moments
from thinet.calibrate.moments import Moments
from thinet.errors import CalibrationError


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(50, 7, generator=generator, dtype=torch.float64) + 1
    return phi, torch.randn(50, 3, generator=generator, dtype=torch.float64) - 2


@pytest.mark.parametrize("panel", [2, 7, 100])
def test_moments_are_those_of_all_rows(rows, panel, monkeypatch):
    monkeypatch.setattr(moments, "_PANEL", panel)
    monkeypatch.setattr(moments, "_ROWS", 8)
    phi, y = rows
    seen = Moments(7, 3)
    seen.add(phi[:11], y[:11])
    torch.testing.assert_close(seen.second, phi[:11].T @ phi[:11] / 11)
    seen.add(phi[11:], y[11:])
    assert seen.rows == 50
    torch.testing.assert_close(seen.second, phi.T @ phi / 50)
    torch.testing.assert_close(seen.mean, phi.mean(0))
    torch.testing.assert_close(seen.cross, phi.T @ y / 50)
    torch.testing.assert_close(seen.y_mean, y.mean(0))
    torch.testing.assert_close(seen.y_energy, y.square().mean(0))
    torch.testing.assert_close(seen.y_variance(), y.var(0, correction=0))
    torch.testing.assert_close(seen.covariance(), torch.cov(phi.T, correction=0))
    both = torch.cov(torch.cat([phi, y], 1).T, correction=0)
    torch.testing.assert_close(seen.cross_covariance(), both[:7, 7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float64_whatever_the_rows(rows, dtype):
    phi = rows[0].to(dtype)
    seen = Moments(7)
    for block in phi.split(5):
        seen.add(block)
    assert seen.second.dtype == torch.float64
    torch.testing.assert_close(
        seen.second, phi.double().T @ phi.double() / 50, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("restored", [False, True])
def test_large_means_do_not_drown_the_covariance(rows, restored):
    phi, y = ((part + 1000).float() for part in rows)
    phi[:, 2] = 777.7
    seen = Moments(7, 3)
    for block, target in zip(phi.split(5), y.split(5), strict=True):
        if restored:
            seen = Moments.from_tensors(seen.tensors())
        seen.add(block, target)
    both = torch.cov(torch.cat([phi, y], 1).double().T, correction=0)
    torch.testing.assert_close(seen.covariance(), both[:7, :7], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.cross_covariance(), both[:7, 7:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.y_variance(), both.diagonal()[7:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.covariance()[2, 2].item(), 0.0, atol=1e-9, rtol=0)


def test_merge_is_as_if_all_rows_had_come_to_one(rows):
    phi, y = rows
    first, second, whole = Moments(7, 3), Moments(7, 3), Moments(7, 3)
    first.add(phi[:20], y[:20])
    second.add(phi[20:], y[20:])
    whole.add(phi, y)
    first.merge(second)
    assert first.rows == whole.rows
    for name, sums in whole.tensors().items():
        torch.testing.assert_close(first.tensors()[name], sums)
    with pytest.raises(CalibrationError, match="of 2 columns and 0 targets cannot be added to 7"):
        first.merge(Moments(2))


def test_tensors_and_back(rows):
    seen = Moments(7, 3)
    seen.add(*rows)
    back = Moments.from_tensors(seen.tensors())
    seen.add(*rows)
    back.add(*rows)
    assert back.rows == 100
    torch.testing.assert_close(back.covariance(), seen.covariance())
    torch.testing.assert_close(back.cross_covariance(), seen.cross_covariance())
    torch.testing.assert_close(back.y_variance(), seen.y_variance())
    with pytest.raises(CalibrationError, match="no yy, rows among the stored sums"):
        Moments.from_tensors(dict(list(seen.tensors().items())[:-2]))


def test_select_is_as_if_only_those_columns_had_been_added(rows):
    phi, y = rows
    some = torch.tensor([5, 0, 2])
    seen, want = Moments(7, 3), Moments(3, 3)
    seen.add(phi, y)
    want.add(phi[:, some], y)
    for name, sums in seen.select(some).tensors().items():
        torch.testing.assert_close(sums, want.tensors()[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("side", ["input", "output"])
def test_values_that_are_not_finite_are_refused_by_name_and_not_added(rows, value, side):
    phi, y = (part.float() for part in rows)
    seen = Moments(7, 3, where="layer4.0.conv2")
    bad = phi.clone() if side == "input" else y.clone()
    bad[3, 1] = value
    with pytest.raises(CalibrationError) as error:
        seen.add(*((bad, y) if side == "input" else (phi, bad)))
    assert f"layer4.0.conv2: 1 of {bad.shape[1]} {side} columns hold NaN" in str(error.value)
    assert "first: column 1" in str(error.value)
    assert seen.rows == 0
    assert not any(sums.any() for sums in seen.tensors().values())


def test_targets_of_another_precision_are_refused_by_that_of_the_products(rows):
    phi, y = rows
    huge = torch.full_like(y, 1e25)
    with pytest.raises(CalibrationError, match="3 of 3 output columns hold NaN, infinite or over"):
        Moments(7, 3).add(phi.float(), huge.bfloat16())
    seen = Moments(7, 3)
    seen.add(phi, huge.float())
    torch.testing.assert_close(seen.y_mean, huge.float()[0].double())


def test_rows_that_do_not_fit_are_refused(rows):
    phi, y = rows
    with pytest.raises(CalibrationError, match=r"\(50, 7\) and targets of shape \(50, 0\)"):
        Moments(7, 3).add(phi)
    with pytest.raises(CalibrationError, match=r"targets of shape \(49, 3\)"):
        Moments(7, 3).add(phi, y[1:])
    with pytest.raises(CalibrationError, match="do not fit moments of 6 columns"):
        Moments(6).add(phi)


def test_no_rows_is_an_error_and_not_a_nan():
    empty = Moments(2, where="features.3")
    empty.add(torch.zeros(0, 2))
    with pytest.raises(CalibrationError, match=r"features\.3: no calibration rows"):
        empty.covariance()


def _sum_over_processes(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    seen = Moments(300, 2)
    phi = torch.randn(40, 300, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    seen.add(phi, phi[:, :2])
    seen.all_reduce()
    if rank == 0:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in seen.tensors().items()}, results)
    torch.distributed.destroy_process_group()


def test_all_reduce_sums_over_processes(tmp_path):
    from safetensors.torch import load_file

    store, results = str(tmp_path / "store"), str(tmp_path / "sums.safetensors")
    torch.multiprocessing.spawn(_sum_over_processes, (store, results), nprocs=2)
    got = Moments.from_tensors(load_file(results))
    want = Moments(300, 2)
    for rank in range(2):
        phi = torch.randn(
            40, 300, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
        )
        want.add(phi, phi[:, :2])
    assert got.rows == 80
    torch.testing.assert_close(got.second, want.second)
    torch.testing.assert_close(got.cross, want.cross)


def test_all_reduce_alone_changes_nothing(rows):
    seen = Moments(7, 3)
    seen.add(*rows)
    seen.all_reduce()
    assert seen.rows == 50
