"""Intervals against known spreads: the binomial's, and a Fréchet distance's over many drawn sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fid.extraction import GroupedMoments, group_ids
from fid.intervals import STUDENT_T_9, bootstrap, jackknife
from fid.moments import Gaussian


def test_the_bootstrap_of_shares_and_means() -> None:
    shares = bootstrap(np.arange(1000) < 300, "samples")
    error = (0.3 * 0.7 / 1000) ** 0.5
    assert shares["low"] == pytest.approx(0.3 - 1.96 * error, abs=0.3 * error)
    assert shares["high"] == pytest.approx(0.3 + 1.96 * error, abs=0.3 * error)
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(values, "splits")
    assert (found["low"] + found["high"]) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap(values, "splits") == found and "splits" in found["method"]
    assert bootstrap(np.ones(9), "samples")["low"] == 1
    fewer = bootstrap(values, "subsets", 100)  # a quarter of them: twice as wide
    assert fewer["high"] - fewer["low"] == pytest.approx(2 * (found["high"] - found["low"]), rel=0.1)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.1), (0.5, 1.3)])
def test_the_jackknife_is_as_wide_as_the_distance_scatters(shift: float, scale: float) -> None:
    dim, count = 8, 400
    reference = Gaussian(torch.zeros(dim).double(), torch.eye(dim).double())
    values, errors = [], []
    for seed in range(60):
        rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double() * scale
        rows[:, 0] += shift
        grouped = GroupedMoments(dim)
        grouped.add(rows, group_ids(count))
        groups = grouped.finish()
        value = reference.frechet_distance(Gaussian(rows.mean(dim=0), rows.T.cov()))
        found = jackknife(groups, reference, value)
        assert found["low"] >= 0
        values.append(value)
        errors.append((found["high"] - value) / STUDENT_T_9)
    assert 0.75 < np.mean(errors) / np.std(values) < 1.75
