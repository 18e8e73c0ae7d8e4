"""Metrics as pure functions of feature arrays, over torch-fidelity's functions, in float64 and finite or an error.

torch-fidelity accepts fewer samples than dimensions, NaN features and too few samples for the splits without a word,
so every function here checks its input first.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gspn_dit.errors import UserError

IS_SPLITS = 10
NEIGHBOURHOOD = 3
KID_SUBSETS = 50
KID_SUBSET_SIZE = 300
PAIRWISE_CHUNK = 1024
MAX_PAIRWISE_PRODUCTS = 2**44  # multiplications; beyond it the nearest-image search is left out


def _require(features: torch.Tensor, needed: int, metric: str, what: str) -> torch.Tensor:
    """`features` in float64 on the CPU, after checks of their number and finiteness."""
    if len(features) < needed:
        raise UserError(f"{metric} needs at least {needed} {what}, {len(features)} given")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        raise UserError(f"{metric}: the features of {bad} of {len(features)} {what} are NaN or infinite")
    return features.detach().cpu().double()


def _finite(value: float, metric: str) -> float:
    if not math.isfinite(value):
        raise UserError(f"{metric} is not finite ({value}); the features are degenerate")
    return float(value)


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance of two Gaussian fits (arXiv 1706.08500 eq. 6): |μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½).

    The trace of the root is the sum of the roots of the eigenvalues of Σ₁Σ₂; tiny negative ones count as zero.

    Args:
        features: samples [n, d], n ≥ d + 1, so that the covariance can have full rank.
        reference: real images [m, d], m ≥ d + 1.
    """
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    needed = features.shape[1] + 1
    statistics = [
        fid_features_to_statistics(_require(features, needed, "the Fréchet distance", "samples")),
        fid_features_to_statistics(_require(reference, needed, "the Fréchet distance", "reference images")),
    ]
    try:
        value = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    except np.linalg.LinAlgError as error:
        raise UserError(f"the Fréchet distance is not finite: {error}") from error
    return max(0.0, _finite(value, "the Fréchet distance"))


def inception_score(logits: torch.Tensor, splits: int = IS_SPLITS) -> tuple[float, float]:
    """Inception score exp(E KL(p(y|x) ‖ p(y))) (arXiv 1606.03498): mean and standard deviation over splits.

    The splits are consecutive and nothing is shuffled, so give the logits in an order in which every run is balanced
    (`fid.images.interleave`): splits of a class-ordered set would each see one class and score 1.

    Args:
        logits: [n, classes], n ≥ splits.
        splits: how many consecutive parts are scored apart.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    checked = _require(logits, splits, f"the Inception score with {splits} splits", "samples")
    result = isc_features_to_metric(checked, splits=splits, shuffle=False)
    return _finite(result[KEY_METRIC_ISC_MEAN], "the Inception score"), _finite(
        result[KEY_METRIC_ISC_STD], "the Inception score"
    )


def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, neighbourhood: int = NEIGHBOURHOOD
) -> tuple[float, float]:
    """Precision and recall by k-nearest-neighbour manifolds (arXiv 1904.06991).

    Precision is the share of samples inside the reference's manifold, recall the share of reference images inside
    the samples' manifold.

    Args:
        features: samples [n, d], n ≥ neighbourhood + 1.
        reference: real images [m, d], m ≥ neighbourhood + 1.
        neighbourhood: k; a manifold is the union of balls that reach every point's k-th neighbour.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    needed = neighbourhood + 1
    result = prc_features_to_metric(
        _require(features, needed, f"precision and recall with k = {neighbourhood}", "samples"),
        _require(reference, needed, f"precision and recall with k = {neighbourhood}", "reference images"),
        prc_neighborhood=neighbourhood,
        save_cpu_ram=True,
        verbose=False,
    )
    return _finite(result[KEY_METRIC_PRECISION], "precision"), _finite(result[KEY_METRIC_RECALL], "recall")


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, subset_size: int, subsets: int = KID_SUBSETS, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (arXiv 1801.01401): unbiased MMD² with the kernel (x·y/d + 1)³, mean and deviation over subsets.

    Args:
        features: samples [n, d], n ≥ subset_size.
        reference: real images [m, d], m ≥ subset_size.
        subset_size: images drawn from each side for one estimate, ≥ 2.
        subsets: how many estimates.
        seed: of the draws.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    needed = max(2, subset_size)
    result = kid_features_to_metric(
        _require(features, needed, "the kernel distance", "samples"),
        _require(reference, needed, "the kernel distance", "reference images"),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return _finite(result[KEY_METRIC_KID_MEAN], "the kernel distance"), _finite(
        result[KEY_METRIC_KID_STD], "the kernel distance"
    )


def nearest_distances(pixels: np.ndarray, reference: np.ndarray) -> np.ndarray | None:
    """L2 distance of every image to its nearest reference image, pixel values in 0…1.

    Exact: squared distances of 8-bit values are whole numbers that float64 holds, so a copy has distance 0.

    Args:
        pixels: uint8 [n, H, W, C].
        reference: uint8 [m, H, W, C].

    Returns:
        float64 [n], or None when the search would take longer than it is worth (more than 2⁴⁴ products).
    """
    if pixels.shape[1:] != reference.shape[1:]:
        raise ValueError(f"images of shape {pixels.shape[1:]} against reference {reference.shape[1:]}")
    if pixels.size * len(reference) > MAX_PAIRWISE_PRODUCTS:
        return None
    best = np.full(len(pixels), np.inf)
    flat_samples = pixels.reshape(len(pixels), -1)
    flat_reference = reference.reshape(len(reference), -1)
    for first in range(0, len(flat_reference), PAIRWISE_CHUNK):
        real = flat_reference[first : first + PAIRWISE_CHUNK].astype(np.float64)
        real_norms = (real**2).sum(axis=1)
        for start in range(0, len(flat_samples), PAIRWISE_CHUNK):
            part = slice(start, start + PAIRWISE_CHUNK)
            drawn = flat_samples[part].astype(np.float64)
            squared = (drawn**2).sum(axis=1)[:, None] + real_norms[None] - 2.0 * drawn @ real.T
            best[part] = np.minimum(best[part], squared.min(axis=1))
    return np.sqrt(best) / 255.0


def class_agreement(logits: torch.Tensor, labels: np.ndarray) -> float:
    """Share of images that the feature net assigns to their label; logits [n, classes], labels [n]."""
    return float((logits.argmax(dim=1).cpu().numpy() == labels).mean())
