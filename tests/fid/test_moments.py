"""Moments that are merged, and the distance of two Gaussians, against closed forms and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fid.extraction import RunningMoments
from fid.moments import Gaussian, Moments, merged
from gspn_dit.errors import UserError


def rows(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(rows(dim, dim, seed))[0]


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_gaussians_that_share_their_axes_have_a_closed_form(dim: int) -> None:
    turn = rotation(dim, 0)
    variances = [torch.linspace(0.1, 3, dim, dtype=torch.float64), torch.linspace(2, 0, dim, dtype=torch.float64)]
    first, second = (
        Gaussian(turn @ rows(1, dim, seed)[0], turn @ torch.diag(part) @ turn.T) for seed, part in enumerate(variances)
    )
    apart = rows(1, dim, 0)[0] - rows(1, dim, 1)[0]
    expected = float(apart @ apart + ((variances[0].sqrt() - variances[1].sqrt()) ** 2).sum())
    assert first.frechet_distance(second) == pytest.approx(expected, abs=1e-6)
    assert second.frechet_distance(first) == pytest.approx(expected, abs=1e-6)


def test_gaussians_that_do_not_commute_have_the_distance_of_their_transport() -> None:
    """If T is symmetric and positive, (Σ, TΣT) are T apart: tr Σ + tr TΣT - 2 tr TΣ."""
    turn, scale = rotation(6, 3), torch.linspace(0.5, 2, 6, dtype=torch.float64)
    transport, start = turn @ torch.diag(scale) @ turn.T, rows(9, 6, 4)
    covariance = start.T @ start
    moved = transport @ covariance @ transport
    expected = float(covariance.trace() + moved.trace() - 2 * (transport @ covariance).trace())
    centre = torch.zeros(6, dtype=torch.float64)
    assert Gaussian(centre, covariance).frechet_distance(Gaussian(centre, moved)) == pytest.approx(expected, abs=1e-6)


def test_a_set_against_itself_is_zero_also_without_full_rank() -> None:
    few = Gaussian.fit(Moments.of(rows(20, 64)))
    assert 0 <= few.frechet_distance(few) < 1e-6
    assert few.factor.shape == (19, 64)
    torch.testing.assert_close(few.factor.T @ few.factor, few.covariance, rtol=0, atol=1e-12)
    nothing = Gaussian(torch.ones(3).double(), torch.zeros(3, 3).double())
    assert nothing.frechet_distance(nothing) == 0


def test_the_distance_is_torch_fidelity_s_own() -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    first, second = rows(200, 32, 1), rows(300, 32, 2) * 1.5 + 0.3
    statistics = [fid_features_to_statistics(part) for part in (first, second)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    found = Gaussian.fit(Moments.of(first)).frechet_distance(Gaussian.fit(Moments.of(second)))
    assert found == pytest.approx(expected, abs=1e-6)


def test_covariances_that_are_none_are_refused() -> None:
    centre, one = torch.zeros(2).double(), torch.eye(2).double()
    with pytest.raises(UserError, match=r"without negative eigenvalues; the smallest is -0\.5"):
        Gaussian(centre, torch.diag(torch.tensor([1, -0.5]).double())).frechet_distance(Gaussian(centre, one))
    for bad in (math.nan, math.inf):
        for first, second in ((one, one * bad), (one * bad, one)):
            with pytest.raises(UserError, match="not finite"):
                Gaussian(centre, first).frechet_distance(Gaussian(centre, second))
    with pytest.raises(UserError, match="not finite"):
        Gaussian(centre + math.nan, one).frechet_distance(Gaussian(centre, one))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.sampled_from([0.0, 1e6]))
def test_merged_moments_are_those_of_the_whole(sizes: list[int], offset: float) -> None:
    """Also where the mean is a million deviations away, which raw sums of squares would not survive."""
    whole = rows(sum(sizes), 3) + offset
    found = merged(Moments.of(part) for part in whole.split(sizes))
    assert found.count == len(whole)
    if len(whole):
        np.testing.assert_allclose(found.mean, whole.mean(dim=0), rtol=1e-12, atol=1e-12)
        centred = whole - whole.mean(dim=0)
        np.testing.assert_allclose(found.scatter, centred.T @ centred, rtol=1e-7, atol=1e-7)
    if len(whole) > 1:
        np.testing.assert_allclose(found.covariance, np.cov(whole, rowvar=False), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 2000])
def test_running_moments_do_not_depend_on_the_batches(batch_size: int) -> None:
    values, running = rows(1100, 4), RunningMoments(4)
    for part in values.split(batch_size):
        running.add(part)
    found, expected = running.finish(), Moments.of(values)
    assert found.count == 1100
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=0, atol=1e-9)
