"""Metrics as pure functions of feature arrays, in float64 and finite or an error, equal to torch-fidelity's.

torch-fidelity accepts fewer samples than dimensions, NaN features and too few samples for the splits without a word,
so every function here checks its input first. The values behind a mean are returned too: intervals come from them.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from fid.moments import Gaussian, Moments
from gspn_dit.errors import UserError

IS_SPLITS = 10
NEIGHBOURHOOD = 3
KID_SUBSETS = 50
PAIRWISE_CHUNK = 1024
LISTED = 33  # of every sample: itself and its nearest neighbours, among which those of a half are looked for
MAX_PAIRWISE_PRODUCTS = 2**44  # multiplications; beyond it the nearest-image search is left out


def _require(features: torch.Tensor, needed: int, metric: str, what: str) -> torch.Tensor:
    """`features` on the CPU, after checks of their number and finiteness."""
    if len(features) < needed:
        raise UserError(f"{metric} needs at least {needed} {what}, {len(features)} given")
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        bad = int((~finite).sum())
        raise UserError(f"{metric}: the features of {bad} of {len(features)} {what} are NaN or infinite")
    return features.detach().cpu()


def _finite(values: np.ndarray, metric: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError(f"{metric} is not finite ({values[~np.isfinite(values)][0]}); the features are degenerate")
    return values


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance of two Gaussian fits (arXiv 1706.08500 eq. 6), see `fid.moments.Gaussian`.

    Args:
        features: samples [n, d], n ≥ d + 1, so that the covariance can have full rank.
        reference: real images [m, d], m ≥ d + 1.
    """
    needed = features.shape[1] + 1
    checked = (
        _require(features, needed, "the Fréchet distance", "samples"),
        _require(reference, needed, "the Fréchet distance", "reference images"),
    )
    drawn, real = (Gaussian.fit(Moments.of(rows)) for rows in checked)
    return real.frechet_distance(drawn)


def inception_scores(logits: torch.Tensor, splits: int = IS_SPLITS) -> np.ndarray:
    """Inception score exp(E KL(p(y|x) ‖ p(y))) (arXiv 1606.03498) of every consecutive split, float64 [splits].

    Nothing is shuffled, so give the logits in an order in which every run is balanced (`fid.labelled.interleave`):
    splits of a class-ordered set would each see one class and score 1.

    Args:
        logits: [n, classes], n ≥ splits.
        splits: how many consecutive parts are scored apart.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    checked = _require(logits, splits, f"the Inception score with {splits} splits", "samples")
    edges = [index * len(checked) // splits for index in range(splits + 1)]
    parts = [checked[start:stop] for start, stop in pairwise(edges)]
    scores = [isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN] for part in parts]
    return _finite(np.array(scores), "the Inception score")


def _distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Euclidean distances float64 [n, m]; at most `PAIRWISE_CHUNK` of the rows at once are worth the memory."""
    blocks = [torch.cdist(rows.double(), block.double()) for block in others.split(8 * PAIRWISE_CHUNK)]
    return torch.cat(blocks, dim=1)


def neighbourhood_radii(features: torch.Tensor, neighbourhood: int = NEIGHBOURHOOD) -> torch.Tensor:
    """Distance of every row [n, d] to its k-th nearest other row, float64 [n]."""
    nearest = [
        _distances(rows, features).kthvalue(neighbourhood + 1).values  # the row itself is the first
        for rows in features.split(PAIRWISE_CHUNK)
    ]
    return torch.cat(nearest)


def inside_manifold(features: torch.Tensor, manifold: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """Whether each row [n, d] lies in a ball around a row of `manifold` [m, d] with its radius [m]; bool [n]."""
    parts = [(_distances(rows, manifold) <= radii).any(dim=1) for rows in features.split(PAIRWISE_CHUNK)]
    return torch.cat(parts)


def manifold_membership(
    features: torch.Tensor,
    reference: torch.Tensor,
    neighbourhood: int = NEIGHBOURHOOD,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples lie in the reference's manifold, and which reference images in the samples' (arXiv 1904.06991).

    Args:
        features: samples [n, d], n ≥ neighbourhood + 1.
        reference: real images [m, d], m ≥ neighbourhood + 1.
        neighbourhood: k; a manifold is the union of balls that reach every point's k-th neighbour.
        device: where the distances are computed, in float64.

    Returns:
        bool [n], whose mean is the precision, and bool [m], whose mean is the recall.
    """
    needed, metric = neighbourhood + 1, f"precision and recall with k = {neighbourhood}"
    drawn = _require(features, needed, metric, "samples").to(device)
    real = _require(reference, needed, metric, "reference images").to(device)
    covered = inside_manifold(real, drawn, neighbourhood_radii(drawn, neighbourhood))
    realistic = inside_manifold(drawn, real, neighbourhood_radii(real, neighbourhood))
    return realistic.cpu().numpy(), covered.cpu().numpy()


def half_sample_recalls(
    features: torch.Tensor,
    reference: torch.Tensor,
    halves: np.ndarray,
    neighbourhood: int = NEIGHBOURHOOD,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Recall, see `manifold_membership`, of parts of the samples, float64 [parts].

    A sample's neighbours in a part are looked for among its nearest 32 in all; where a half holds fewer than k of
    these, which happens once in ten million, the farthest of them counts.

    Args:
        features: samples [n, d].
        reference: real images [m, d].
        halves: bool [parts, n], about half of the samples each.
    """
    drawn, real = features.to(device), reference.to(device)
    parts = torch.from_numpy(halves).to(device)
    found = [
        _distances(rows, drawn).topk(min(LISTED, len(drawn)), largest=False) for rows in drawn.split(PAIRWISE_CHUNK)
    ]
    values, indices = (torch.cat([getattr(part, name) for part in found])[:, 1:] for name in ("values", "indices"))
    radii = []
    for part in parts:
        rank = part[indices].cumsum(dim=1)
        places = torch.where(
            rank[:, -1] >= neighbourhood, (rank >= neighbourhood).int().argmax(dim=1), len(rank[0]) - 1
        )
        radius = values.gather(1, places[:, None]).squeeze(1)
        radii.append(torch.where(part, radius, -1.0))  # no distance is that small
    covered = torch.zeros(len(parts), dtype=torch.int64, device=device)
    for rows in real.split(PAIRWISE_CHUNK):
        distances = _distances(rows, drawn)
        covered += torch.stack([(distances <= radius).any(dim=1).sum() for radius in radii])
    return (covered.double() / len(real)).cpu().numpy()


def kernel_distances(
    features: torch.Tensor, reference: torch.Tensor, subset_size: int, subsets: int = KID_SUBSETS, seed: int = 0
) -> np.ndarray:
    """Kernel distance (arXiv 1801.01401): unbiased MMD² with the kernel (x·y/d + 1)³ of each subset, float64 [subsets].

    Args:
        features: samples [n, d], n ≥ subset_size.
        reference: real images [m, d], m ≥ subset_size.
        subset_size: images drawn from each side for one estimate, ≥ 2.
        subsets: how many estimates.
        seed: of the draws, made as torch-fidelity makes them.
    """
    from torch_fidelity.metric_kid import kernel_mmd

    needed = max(2, subset_size)
    drawn = _require(features, needed, "the kernel distance", "samples").numpy()
    real = _require(reference, needed, "the kernel distance", "reference images").numpy()
    generator = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        first = drawn[generator.choice(len(drawn), subset_size, replace=False)]
        second = real[generator.choice(len(real), subset_size, replace=False)]
        estimates.append(kernel_mmd(first.astype(np.float64), second.astype(np.float64)))
    return _finite(np.array(estimates), "the kernel distance")


def nearest_features(features: torch.Tensor, reference: torch.Tensor, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of `reference` [m, d] for every row [n, d]: indices and distances, nearest first, [n, count]."""
    found = [_distances(rows, reference).topk(count, largest=False) for rows in features.split(PAIRWISE_CHUNK)]
    indices = torch.cat([part.indices for part in found])
    return indices.numpy(), torch.cat([part.values for part in found]).numpy()


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
    """Share of images that the feature extractor assigns to their label; logits [n, classes], labels [n]."""
    return float((logits.argmax(dim=1).cpu().numpy() == labels).mean())
