"""95 % intervals of the scores, computed from one set of samples, the reference held fixed.

Each says how far its score would move with other samples of the same model. A Fréchet distance has no plain bootstrap
or jackknife: both take the noise of a nearly flat minimum for a slope, and come out up to 1.5 times too wide. Its
interval is the delta method's to second order. Recall is no mean over samples; its interval comes from half-samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fid.moments import Gaussian, Moments, merged

LEVEL = 0.95
NORMAL = 1.9599639845
"""97.5 % quantile of the normal distribution."""
RESAMPLES = 2000
PAIRS = 4096
"""Pairs of contrasts that the curvature of a Fréchet distance is averaged over."""
HALF_SAMPLES = 50
CHUNK = 4096
DELTA = "infinitesimal jackknife, corrected to second order, reference fixed"
MEAN = "normal, from the values' own variance"
HALVES = f"delete-half jackknife, {HALF_SAMPLES} half-samples of the samples, reference fixed"
STUDENT = "Student's t over the {}"
BOOTSTRAP = (
    f"percentile bootstrap, {RESAMPLES} resamples of the {{}}; wider than the samples alone move the score, since "
    "subsets of the reference differ too"
)

Interval = dict[str, float | str]


def _interval(low: float, high: float, method: str) -> Interval:
    return {"low": float(low), "high": float(high), "level": LEVEL, "method": method}


def strata_of(labels: np.ndarray | None) -> np.ndarray | None:
    """Return class ids [n] if every class has as many samples, within one, and None otherwise.

    Equal numbers are a plan: another set would have them too, and only what differs within a class moves its scores.
    Labels drawn at random are as good as none: they differ from set to set as images do.
    """
    if labels is None:
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return labels if counts.min() > 1 and counts.max() - counts.min() <= 1 else None


def _pairs(count: int, strata: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return two index arrays [⌊count/2⌋] that pair images at random, with few exceptions within their class."""
    order = np.random.default_rng(0).permutation(count)
    if strata is not None:
        order = order[np.argsort(strata[order], kind="stable")]
    order = order[: count // 2 * 2]
    return order[0::2], order[1::2]


def mean_variance(values: np.ndarray, strata: np.ndarray | None = None) -> float:
    """The variance of the mean of independent values [n], n ≥ 2; within strata [n], where these are given."""
    if strata is None:
        return float(values.var(ddof=1)) / len(values)
    _, ids, counts = np.unique(strata, return_inverse=True, return_counts=True)
    sums, squares = (np.bincount(ids, weights=values**power) for power in (1, 2))
    within = (squares - sums**2 / counts) / (counts - 1)
    return float((within.clip(0) * counts).sum()) / len(values) ** 2


def mean(values: np.ndarray, strata: np.ndarray | None = None, greatest: float = 1.0) -> Interval:
    """The interval of the mean of shares or other values in 0…greatest, [n], of independent samples."""
    values = np.asarray(values, dtype=np.float64)
    centre, half = values.mean(), NORMAL * math.sqrt(mean_variance(values, strata))
    return _interval(max(0.0, centre - half), min(greatest, centre + half), MEAN)


def student(values: np.ndarray, what: str) -> Interval:
    """The interval of the mean of a handful of values, [n], n ≥ 2, that are one of each of `what`."""
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * math.sqrt(mean_variance(values))
    return _interval(values.mean() - half, values.mean() + half, STUDENT.format(what))


def bootstrap(values: np.ndarray, what: str, size: int | None = None, seed: int = 0) -> Interval:
    """The interval of the mean of `values`, [n], by resampling them.

    Args:
        values: what the mean is of.
        what: what they are one of each, in words.
        size: values per resample, fewer than n where they are not independent: as many as would be.
    """
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (RESAMPLES, size or len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return _interval(low, high, BOOTSTRAP.format(what))


# -- recall ----------------------------------------------------------------------------------------------------------


def half_samples(count: int, strata: np.ndarray | None = None) -> np.ndarray:
    """Halves of `count` samples, bool [HALF_SAMPLES, count]; with strata, class ids [count], one of every pair."""
    generator = np.random.default_rng(1)
    chosen = np.zeros((HALF_SAMPLES, count), dtype=bool)
    if strata is None:
        for row in chosen:
            row[generator.permutation(count)[: count // 2]] = True
        return chosen
    first, second = _pairs(count, strata)
    left = generator.random((HALF_SAMPLES, len(first))) < 0.5
    chosen[:, first], chosen[:, second] = left, ~left
    return chosen


def delete_half(value: float, replicas: np.ndarray) -> Interval:
    """The interval of a share about `value` from its values on `half_samples` (Shao and Wu 1989).

    A statistic of independent samples varies among the halves of one set as it does among whole sets. The bootstrap's
    copies of a sample would be its nearest neighbours, at distance 0, and a delete-one jackknife is 1.7 times too wide.
    """
    half = NORMAL * float(replicas.std(ddof=1))
    return _interval(max(0.0, value - half), min(1.0, value + half), HALVES)


# -- Fréchet distances -----------------------------------------------------------------------------------------------


def frechet(rows: Tensor, reference: Gaussian, value: float, strata: np.ndarray | None = None) -> Interval:
    """The interval of a Fréchet distance `value` of samples' features [n, d] to a reference, never below 0."""
    half = NORMAL * math.sqrt(frechet_variance(rows, reference, strata))
    return _interval(max(0.0, value - half), value + half, DELTA)


def frechet_variance(rows: Tensor, reference: Gaussian, strata: np.ndarray | None = None) -> float:
    """The variance of a Fréchet distance of samples' features [n, d], by the delta method to second order.

    With δ the deviation of the samples' mean and covariance from the model's, the distance is a + Lδ + ½ δᵀHδ. The
    variance of the influences, the infinitesimal jackknife's estimate, has the slope at the samples' own moments, L +
    Hδ, so that on average it is Var(Lδ) + tr(HCHC) where ½ tr(HCHC) would be right (Efron and Stein 1981 of the
    jackknife): half of what two independent deviations make of H is taken off, and what is left is at least that half.

    Args:
        rows: float32 or float64 [n, d], n ≥ 4.
        reference: the Gaussian the distance is to.
        strata: class ids [n] of a set that has as many samples of each, see `strata_of`.
    """
    expansion = _Expansion.at(rows, reference)
    influences = np.concatenate([expansion.influences(part) for part in rows.split(CHUNK)])
    first = mean_variance(influences, strata)
    second = float(np.mean(list(_curvatures(expansion, rows, strata)))) / len(rows) ** 2
    return max(first - second / 2, second / 2)


@dataclass(frozen=True)
class _Expansion:
    """The Fréchet distance's first two derivatives at the samples' moments (Bhatia, Jain and Lim 2019 for the root's).

    With F of the reference's covariance FᵀF and the eigenvectors V and eigenvalues s² of F Σ Fᵀ, an image x counts by
    its deviation c = x - μ and its coordinates u = VᵀF c, in which the optimal map to the reference is 1/s.
    """

    mean: Tensor
    shift: Tensor
    """The samples' mean from the reference's, float64 [d]."""
    transform: Tensor
    """FᵀV of the directions that both vary in, float64 [d, r]."""
    scales: Tensor
    """s, float64 [r]."""

    @classmethod
    def at(cls, rows: Tensor, reference: Gaussian) -> _Expansion:
        moments = merged(Moments.of(part) for part in rows.split(CHUNK))
        product = reference.factor @ moments.covariance @ reference.factor.T
        squares, vectors = torch.linalg.eigh((product + product.T) / 2)
        kept = squares > len(squares) * torch.finfo(squares.dtype).eps * squares[-1]
        transform = reference.factor.T @ vectors[:, kept]
        return cls(moments.mean, moments.mean - reference.mean, transform, squares[kept].sqrt())

    def coordinates(self, rows: Tensor) -> Tensor:
        """u of rows [n, d], [n, r]."""
        return (rows.double() - self.mean) @ self.transform

    def influences(self, rows: Tensor) -> np.ndarray:
        """The first derivative towards each of rows [n, d], up to a constant, [n]."""
        apart = rows.double() - self.mean
        first = apart.square().sum(dim=1) + 2 * apart @ self.shift
        return (first - (self.coordinates(rows).square() / self.scales).sum(dim=1)).numpy()

    def curvature(self, u: Tensor, v: Tensor) -> Tensor:
        """The second derivative towards two images of coordinates [n, r] each, up to terms of one alone; [n]."""
        both, s = u * v, self.scales
        weights = 1 / (s[:, None] * s * (s[:, None] + s))
        return ((both @ weights) * both).sum(dim=1) + 2 * (both / s).sum(dim=1)


def _curvatures(expansion: _Expansion, rows: Tensor, strata: np.ndarray | None) -> Iterator[float]:
    """Mean squares of δᵀHδ' of two images' independent deviations; differences of paired images stand for those."""
    indices = torch.from_numpy(np.stack(_pairs(len(rows), strata)))
    generator = torch.Generator().manual_seed(0)
    size = indices.shape[1]
    one = torch.randint(size, (PAIRS,), generator=generator)
    other = (one + 1 + torch.randint(size - 1, (PAIRS,), generator=generator)) % size
    for left, right in zip(one.split(CHUNK // 4), other.split(CHUNK // 4), strict=True):
        (a, b), (c, d) = ([expansion.coordinates(rows[row]) for row in indices[:, part]] for part in (left, right))
        same = expansion.curvature(a, c) + expansion.curvature(b, d)
        crossed = expansion.curvature(a, d) + expansion.curvature(b, c)
        yield float(((same - crossed) / 2).square().mean())
