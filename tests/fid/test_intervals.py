"""Intervals by hand, derivatives against differences, and coverage against the spread of repeated sets of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fid import intervals
from fid.extraction import extract
from fid.features import FeatureNet
from fid.images import Reference
from fid.intervals import Interval, frechet_variance, half_samples, mean_variance, strata_of
from fid.metrics import half_sample_recalls, inception_scores, inside_manifold, manifold_membership, neighbourhood_radii
from fid.moments import Gaussian, Moments

# -- by hand ---------------------------------------------------------------------------------------------------------


def test_equal_numbers_of_each_class_are_a_plan_and_others_chance() -> None:
    balanced = np.array([3, 1, 1, 3, 3])  # within one
    assert strata_of(balanced) is balanced
    assert strata_of(np.array([3, 1, 1, 3, 3, 3])) is None
    assert strata_of(np.arange(5)) is None  # one each: nothing to compare within
    assert strata_of(None) is None


def test_the_interval_of_a_share() -> None:
    found = intervals.mean(np.arange(1000) < 300)
    half = 1.95996 * (0.3 * 0.7 / 999) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    assert intervals.mean(np.ones(9, dtype=bool))["low"] == 1
    assert intervals.mean(np.arange(100) < 99)["high"] == 1  # and no more


def test_what_differs_between_classes_alone_moves_no_planned_set() -> None:
    classes = np.arange(60) % 3
    assert mean_variance((classes == 1).astype(float), classes) == 0
    values = np.array([0.0, 2.0, 5.0, 9.0])  # variances 2 and 8 within, of 2 values of 4 each
    assert mean_variance(values, np.array([7, 7, 2, 2])) == pytest.approx((2 * 2 + 8 * 2) / 16)
    assert mean_variance(values) == pytest.approx(values.var(ddof=1) / 4)


def test_students_interval_and_the_bootstraps() -> None:
    found = intervals.student(np.array([1.0, 2.0, 3.0]), "splits")
    assert (found["low"], found["high"]) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert found["method"] == "Student's t over the splits"
    values = np.random.default_rng(0).normal(5, 2, 400)
    whole, fewer = intervals.bootstrap(values, "subsets"), intervals.bootstrap(values, "subsets", 100)
    width = 2 * 1.96 * values.std() / 20
    assert whole["high"] - whole["low"] == pytest.approx(width, rel=0.1)
    assert fewer["high"] - fewer["low"] == pytest.approx(2 * width, rel=0.1)
    assert intervals.bootstrap(values, "subsets") == whole and "wider than the samples alone" in str(whole["method"])


@pytest.mark.parametrize("labels", [None, np.arange(41) % 2])
def test_half_samples(labels: np.ndarray | None) -> None:
    halves = half_samples(41, labels)
    assert halves.shape == (50, 41) and (halves.sum(axis=1) == 20).all()
    assert len({row.tobytes() for row in halves}) == 50 and np.array_equal(halves, half_samples(41, labels))
    if labels is not None:
        assert (abs(halves[:, labels == 0].sum(axis=1) - 10) <= 1).all()


# -- derivatives -----------------------------------------------------------------------------------------------------


def weighted(rows: Tensor, weights: Tensor) -> Gaussian:
    """The moments of rows that count by weights, which sum to 1."""
    centre = weights @ rows
    return Gaussian(centre, (rows - centre).T @ ((rows - centre) * weights[:, None]))


def test_the_derivatives_of_the_distance_are_those_of_differences() -> None:
    """Towards images i and j: weight e is taken from all and given to one, or e to i and f to j."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator).double() * torch.linspace(0.5, 2, 5)
    reference = Gaussian(torch.ones(5).double() / 3, (torch.eye(5) * torch.linspace(3, 1, 5) + 0.3).double())
    expansion = intervals._Expansion.at(rows, reference)
    # the expansion is at the unbiased covariance, the weights give the plain one: as many more rows agree
    scale = (len(rows) / (len(rows) - 1)) ** 0.5
    centre = rows.mean(dim=0)

    def distance(**moved: float) -> float:
        weights = torch.full((40,), 1 / 40, dtype=torch.float64)
        for name, step in moved.items():
            weights = weights * (1 - step)
            weights[int(name[1:])] += step
        found = weighted(rows, weights)
        assert centre is not None
        return reference.frechet_distance(Gaussian(found.mean, found.covariance * scale**2))

    step = 1e-4
    found = expansion.influences(rows)
    for i in (0, 7, 30):
        slope = (distance(**{f"_{i}": step}) - distance(**{f"_{i}": -step})) / (2 * step)
        # a constant apart, and the unbiased covariance weighs every image by n / (n - 1)
        apart = rows - rows.mean(dim=0)
        quadratic = apart.square().sum(dim=1) - (expansion.coordinates(rows).square() / expansion.scales).sum(dim=1)
        linear = torch.from_numpy(found) - quadratic
        derivative = linear + scale**2 * quadratic
        assert slope == pytest.approx(float(derivative[i] - derivative.mean()), abs=1e-5)


def test_the_curvature_is_that_of_differences_in_one_dimension() -> None:
    """With one feature the distance is (m - m₀)² + (s - s₀)²: by hand, ∂²/∂v² = s₀ / (2 s³) for the variance v = s²."""
    rows = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]).double()
    reference = Gaussian(torch.tensor([0.5]).double(), torch.tensor([[4.0]]).double())
    variance, root = 20 / 3, 2.0
    expansion = intervals._Expansion.at(rows, reference)
    x, y = expansion.coordinates(rows[:1]), expansion.coordinates(rows[2:3])  # deviations -3 and 1
    second = root / (2 * variance**1.5)
    # the mean's own 2·a·b, less what moving it takes from the variance: -2·(1 - s₀/s)·a·b
    expected = second * 9 * 1 + 2 * (root / variance**0.5) * (-3) * 1
    assert float(expansion.curvature(x, y)) == pytest.approx(expected, abs=1e-9)


# -- against the spread of repeated sets -----------------------------------------------------------------------------


def gaussian_set(seed: int, shift: float, scale: float) -> Tensor:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)).double() * scale
    rows[:, 0] += shift
    return rows


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.1), (0.5, 1.3)])
def test_a_distances_interval_is_as_wide_as_it_scatters(shift: float, scale: float) -> None:
    """Also where the distance is nothing but its bias. The spread of 60 sets is known to 9 %."""
    reference = Gaussian(torch.zeros(8).double(), torch.eye(8).double())
    sets = [gaussian_set(seed, shift, scale) for seed in range(60)]
    values = [reference.frechet_distance(Gaussian.fit(Moments.of(rows))) for rows in sets]
    errors = [frechet_variance(rows, reference) ** 0.5 for rows in sets]
    assert 0.8 < np.mean(errors) / np.std(values, ddof=1) < 1.25
    assert intervals.frechet(sets[0], reference, 1e-9)["low"] == 0


class Population:
    """Sets of "digits" from the real ones: features moved and blurred, so that the distance is 1 to 10."""

    def __init__(self, real: Tensor, labels: np.ndarray, kept: float, blur: float, shift: float) -> None:
        self.real, self.how = real, (kept, blur, shift)
        self.members = [torch.from_numpy(np.flatnonzero(labels == label)) for label in range(10)]

    def draw(self, seed: int, count: int, balanced: bool) -> tuple[Tensor, np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 10 if balanced else torch.randint(10, (count,), generator=generator)
        uniforms, rows = torch.rand(count, generator=generator), torch.empty(count, dtype=torch.int64)
        for label, members in enumerate(self.members):
            own = labels == label
            rows[own] = members[(uniforms[own] * len(members)).long()]
        kept, blur, shift = self.how
        noise = torch.randn(count, self.real.shape[1], generator=generator).double()
        of_class = 0.2 * (labels % 3 == 0)[:, None]  # classes differ in how well they are drawn
        return kept * self.real[rows] + blur * noise + shift + of_class, labels.numpy()


POPULATIONS = {"near": (0.98, 0.1, 0.0), "middle": (0.9, 0.25, 0.05), "far": (0.8, 0.4, 0.1)}


def coverage(values: np.ndarray, found: list[Interval]) -> tuple[float, float]:
    """The share of intervals that hold the mean of all values, and their mean half width over 1.96 deviations."""
    low, high = (np.array([interval[end] for interval in found]) for end in ("low", "high"))
    held = (low <= values.mean()) & (values.mean() <= high)
    return float(held.mean()), float((high - low).mean() / (2 * 1.96 * values.std(ddof=1)))


@pytest.fixture(scope="module")
def real(net: FeatureNet, digits: Reference) -> tuple[Tensor, np.ndarray]:
    assert digits.images.labels is not None
    return extract(net, digits.images.pixels).features.double(), digits.images.labels


@pytest.mark.slow
def test_distances_and_precision_cover_what_they_say(real: tuple[Tensor, np.ndarray]) -> None:
    """Pooled over six populations of 150 sets each, 93 to 97 % of the 95 % intervals hold what they are about.

    The share of one population has a standard error of 2 %, its spread one of 6 %.
    """
    reference, radii = Gaussian.fit(Moments.of(real[0])), neighbourhood_radii(real[0])
    shares: dict[str, list[float]] = {"fd": [], "precision": []}
    for how in POPULATIONS.values():
        population = Population(*real, *how)
        for balanced in (True, False):
            found: dict[str, list[Any]] = {"fd": [], "precision": []}
            for seed in range(150):
                rows, labels = population.draw(seed, 1000 if balanced else 360, balanced)
                strata = strata_of(labels)
                assert (strata is None) == (not balanced)
                value = reference.frechet_distance(Gaussian.fit(Moments.of(rows)))
                found["fd"].append((value, intervals.frechet(rows, reference, value, strata)))
                inside = inside_manifold(rows, real[0], radii).numpy()
                found["precision"].append((inside.mean(), intervals.mean(inside, strata)))
            for name, pairs in found.items():
                share, width = coverage(np.array([value for value, _ in pairs]), [interval for _, interval in pairs])
                assert share > 0.89 and 0.85 < width < 1.15, (name, how, balanced)
                shares[name].append(share)
    assert all(0.93 <= np.mean(found) <= 0.97 for found in shares.values()), shares


@pytest.mark.slow
def test_recall_covers_what_it_says(real: tuple[Tensor, np.ndarray]) -> None:
    """Over three populations of 100 sets of 300 samples against 479 images; the pooled share's error is 1.3 %."""
    shares, reference = [], real[0][::3]
    for name, balanced in (("near", True), ("middle", True), ("middle", False)):
        population = Population(*real, *POPULATIONS[name])
        values, found = [], []
        for seed in range(100):
            rows, labels = population.draw(seed, 300, balanced)
            value = float(manifold_membership(rows, reference)[1].mean())
            replicas = half_sample_recalls(rows, reference, half_samples(300, strata_of(labels)))
            values.append(value)
            found.append(intervals.delete_half(value, replicas))
        share, width = coverage(np.array(values), found)
        assert 0.8 < width < 1.25, (name, balanced)
        shares.append(share)
    assert 0.93 <= np.mean(shares) <= 0.97, shares


@pytest.mark.slow
def test_the_inception_scores_interval_covers_what_it_says() -> None:
    values, found = [], []
    for seed in range(400):
        logits = 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(seed))
        scores = inception_scores(logits)
        values.append(scores.mean())
        found.append(intervals.student(scores, "splits"))
    share, width = coverage(np.array(values), found)
    assert 0.93 <= share <= 0.97 and 1 < width < 1.3  # ten splits know their spread to a quarter: hence Student's t
