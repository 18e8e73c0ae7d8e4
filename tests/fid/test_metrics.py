"""Metrics against closed forms and cases worked out by hand, and their refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fid import metrics
from fid.intervals import half_samples
from fid.labelled import interleave
from fid.metrics import (
    class_agreement,
    frechet_distance,
    half_sample_recalls,
    inception_scores,
    kernel_distances,
    manifold_membership,
    nearest_distances,
)
from gspn_dit.errors import UserError


def whitened(count: int, dim: int, seed: int) -> np.ndarray:
    """Points whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    points = np.random.default_rng(seed).normal(size=(count, dim))
    points -= points.mean(axis=0)
    return points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T


def test_frechet_distance_of_axis_aligned_gaussians() -> None:
    means, scales = np.array([1.0, -2.0, 0.5]), np.array([0.5, 2.0, 3.0])
    first = torch.from_numpy(whitened(50, 3, 0))
    second = torch.from_numpy(whitened(80, 3, 1) * scales + means)
    expected = (means**2).sum() + ((scales - 1) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    maps = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.7], [0.0, 0.5]])
    first, second = (torch.from_numpy(whitened(40, 2, seed) @ map_.T) for seed, map_ in enumerate(maps))
    covariances = [map_ @ map_.T for map_ in maps]
    # the trace of the root of a 2×2 matrix M is the root of tr M + 2·sqrt(det M)
    product = covariances[0] @ covariances[1]
    root_trace = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root_trace
    assert expected > 0.5
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    features = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    assert 0 <= frechet_distance(features, features) < 1e-6
    flat = torch.cat([features[:, :63], torch.ones(300, 1)], dim=1)  # a singular covariance
    assert 0 <= frechet_distance(flat, flat) < 1e-5


def test_frechet_distance_needs_full_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(20, 8, generator=generator), torch.randn(8, 8, generator=generator)
    assert frechet_distance(many[:9], many) > 0
    with pytest.raises(UserError, match="needs at least 9 samples, 8 given"):
        frechet_distance(few, many)
    with pytest.raises(UserError, match="needs at least 9 reference images, 8 given"):
        frechet_distance(many, few)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    good = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    broken = good.clone()
    broken[3, 1] = broken[7, 0] = bad
    for metric in (
        lambda: frechet_distance(broken, good),
        lambda: manifold_membership(good, broken),
        lambda: inception_scores(broken),
        lambda: kernel_distances(good, broken, 10),
    ):
        with pytest.raises(UserError, match=r"the features of 2 of 20 (samples|reference images) are NaN or infinite"):
            metric()


def test_a_distance_that_overflows_is_an_error() -> None:
    with pytest.raises(UserError, match="not finite"), np.errstate(all="ignore"):
        frechet_distance(torch.randn(20, 2).double() * 1e200, torch.randn(20, 2).double())


def test_inception_score_of_perfect_classes_is_their_number() -> None:
    labels = torch.arange(10).repeat(20)
    scores = inception_scores(100.0 * torch.nn.functional.one_hot(labels, 10).float())
    assert scores == pytest.approx([10] * 10, abs=1e-6)


def test_inception_score_of_no_information_is_one() -> None:
    assert inception_scores(torch.zeros(50, 10)) == pytest.approx([1.0] * 10)


def test_inception_score_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    marginal = (0.9 + 0.2) / 2, (0.1 + 0.8) / 2
    divergences = [sum(p * math.log(p / q) for p, q in zip(row, marginal)) for row in probabilities[:2].tolist()]
    first = math.exp(sum(divergences) / 2)  # the second split has no information: 1
    assert inception_scores(probabilities.log(), splits=2) == pytest.approx([first, 1], abs=1e-12)


def test_inception_score_depends_on_the_order_so_samples_are_interleaved() -> None:
    labels = np.arange(10).repeat(20)
    logits = 100.0 * torch.nn.functional.one_hot(torch.from_numpy(labels), 10).float()
    assert inception_scores(logits) == pytest.approx([1] * 10)
    assert inception_scores(logits[interleave(labels, 200)]) == pytest.approx([10] * 10)


def test_inception_score_needs_an_image_per_split() -> None:
    with pytest.raises(UserError, match="with 10 splits needs at least 10 samples, 9 given"):
        inception_scores(torch.zeros(9, 3))


def test_precision_and_recall_by_hand() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0]])  # each ball reaches 1 far
    samples = torch.tensor([[0.5], [1.5], [10.0], [10.5]])  # balls of 1, 1, 0.5, 0.5
    realistic, covered = manifold_membership(samples, reference, neighbourhood=1)
    assert (realistic.tolist(), covered.tolist()) == ([True, True, False, False], [True, True, True])
    # the other way round: of the reference, 0 lies 10 and 1 lies 9 from the nearest sample
    samples = torch.tensor([[2.0], [2.25], [10.0]])
    realistic, covered = manifold_membership(samples, reference, neighbourhood=1)
    assert (realistic.tolist(), covered.tolist()) == ([True, True, False], [False, False, True])


def test_precision_and_recall_of_a_set_against_itself_and_far_away() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    assert all(members.all() for members in manifold_membership(features, features))
    assert not any(members.any() for members in manifold_membership(features, features + 1000))
    with pytest.raises(UserError, match="with k = 3 needs at least 4 samples, 3 given"):
        manifold_membership(features[:3], features)


@pytest.mark.parametrize(("count", "neighbourhood"), [(40, 3), (41, 1), (200, 3), (9, 3)])
def test_recalls_of_halves_are_those_of_the_halves_alone(count: int, neighbourhood: int) -> None:
    """Among few samples all neighbours are listed; among many a half nearly always finds its own in the list."""
    generator = torch.Generator().manual_seed(count)
    samples, real = torch.randn(count, 4, generator=generator), torch.randn(70, 4, generator=generator)
    halves = half_samples(count)
    expected = [manifold_membership(samples[part], real, neighbourhood)[1].mean() for part in torch.from_numpy(halves)]
    assert half_sample_recalls(samples, real, halves, neighbourhood) == pytest.approx(expected, abs=1e-12)
    assert np.std(expected) > 0


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(6, 4)), generator.normal(size=(6, 4)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 4 + 1) ** 3

    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / 30 for x in (first, second))
    expected = within - 2 * kernel(first, second).mean()
    found = kernel_distances(torch.from_numpy(first), torch.from_numpy(second), 6, subsets=3)
    assert found == pytest.approx([expected] * 3, rel=1e-9)


def test_kernel_distance_repeats_with_its_seed() -> None:
    first, second = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    once, again, other = (kernel_distances(first, second, 20, seed=seed) for seed in (1, 1, 2))
    assert (once == again).all() and (once != other).all()
    with pytest.raises(UserError, match="needs at least 60 samples, 50 given"):
        kernel_distances(first, second, 60)


def test_nearest_distances_by_hand() -> None:
    reference = np.array([[0, 0], [255, 255]], np.uint8).reshape(2, 1, 2, 1)
    drawn = np.array([[255, 255], [51, 0], [255, 102]], np.uint8).reshape(3, 1, 2, 1)
    np.testing.assert_allclose(nearest_distances(drawn, reference), [0, 0.2, 0.6], atol=1e-12)


def test_nearest_distances_search_the_whole_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    drawn, reference = (generator.integers(0, 256, (count, 3, 3, 3), dtype=np.uint8) for count in (23, 31))
    difference = drawn[:, None].astype(float) - reference[None]
    expected = np.sqrt((difference**2).sum(axis=(2, 3, 4))).min(axis=1) / 255
    monkeypatch.setattr(metrics, "PAIRWISE_CHUNK", 7)
    np.testing.assert_allclose(nearest_distances(drawn, reference), expected, rtol=1e-12)
    assert nearest_distances(reference, reference).max() == 0
    monkeypatch.setattr(metrics, "MAX_PAIRWISE_PRODUCTS", 100)
    assert nearest_distances(drawn, reference) is None


def test_class_agreement_counts_matches() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.1]])
    assert class_agreement(logits, np.array([0, 1, 1, 1])) == 0.75


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_interleaving_balances_every_prefix(labels: list[int]) -> None:
    array = np.array(labels)
    order = interleave(array, len(labels))
    assert sorted(order.tolist()) == list(range(len(labels)))
    for label in set(labels):
        assert (np.diff(order[array[order] == label]) > 0).all()  # the order inside a class stays
    complete = min(labels.count(label) for label in set(labels)) * len(set(labels))
    for end in range(complete + 1):
        counts = [int((array[order[:end]] == label).sum()) for label in set(labels)]
        assert max(counts) - min(counts) <= 1


def test_without_labels_the_order_stays() -> None:
    assert interleave(None, 4).tolist() == [0, 1, 2, 3]
