"""Mean and covariance in float64, added up batch by batch and process by process, and the distance of two Gaussians."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gspn_dit.errors import UserError

NEGATIVE = 1e-6  # share of the largest eigenvalue; a covariance has rounding errors far below it


@dataclass(frozen=True)
class Moments:
    """Number, mean and scatter of vectors; sets are merged without the cancellation that raw sums suffer from."""

    count: int
    mean: Tensor
    """float64 [d]."""
    scatter: Tensor
    """Sum of (x - mean)(x - mean)ᵀ, float64 [d, d]."""

    @classmethod
    def zeros(cls, dim: int) -> Moments:
        """The moments of no vectors at all."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of rows [n, d] of any floating-point type."""
        if not len(rows):
            return cls.zeros(rows.shape[1])
        rows = rows.detach().cpu().double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub and LeVeque 1979)."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, float64 [d, d]."""
        return self.scatter / max(1, self.count - 1)


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together; at least one part."""
    first, *rest = parts
    for part in rest:
        first = first.merge(part)
    return first


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian that distances are measured to: a mean float64 [d] and a covariance float64 [d, d]."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, moments: Moments) -> Gaussian:
        """The Gaussian with these moments."""
        return cls(moments.mean, moments.covariance)

    @cached_property
    def factor(self) -> Tensor:
        """F of the covariance's numerical rank r, float64 [r, d], with FᵀF = Σ.

        Directions without variance (a rank-deficient covariance has many) are left out: their eigenvalues are rounding
        errors, and the root of a rounding error is not small.
        """
        values, vectors = torch.linalg.eigh(_finite(self.covariance))
        largest = max(float(values[-1]), 0.0)
        if float(values[0]) < -NEGATIVE * max(largest, 1e-300):
            raise UserError(
                f"the Fréchet distance needs covariances without negative eigenvalues; the smallest is {values[0]:.3g}"
            )
        kept = values > len(values) * torch.finfo(values.dtype).eps * largest
        return (vectors[:, kept] * values[kept].sqrt()).T

    def frechet_distance(self, other: Gaussian) -> float:
        """|μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), arXiv 1706.08500 eq. 6; ≥ 0 and finite, or a UserError.

        The trace of the root is the sum of the square roots of the eigenvalues of the symmetric matrix F Σ₂ Fᵀ with
        Σ₁ = FᵀF: those of Σ₁Σ₂ that are not zero, but from a stable decomposition. Eigenvalues that rounding made
        negative count as zero.
        """
        product = self.factor @ _finite(other.covariance) @ self.factor.T
        values = torch.linalg.eigvalsh(_finite(product + product.T) / 2)
        apart = self.mean - other.mean
        traces = self.covariance.trace() + other.covariance.trace()
        value = float(apart @ apart + traces - 2 * values.clamp_min(0).sqrt().sum())
        if not math.isfinite(value):
            raise UserError(f"the Fréchet distance is not finite ({value}); the features are degenerate")
        return max(0.0, value)


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise UserError("the Fréchet distance is not finite: a covariance holds NaN or infinite values")
    return matrix
