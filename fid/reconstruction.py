"""How near reconstructed images are to their originals, image by image: PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fid.labelled import LabelledImages

CHUNK = 64
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Return 10·log10(255² / mean squared error) of each of uint8 images [n, H, W, C], float64 [n], in decibels.

    Equal images have an error of half a value in one place, so that means stay finite.
    """
    errors = np.square(images.astype(np.float64) - originals).reshape(len(images), -1)
    return 10 * np.log10(255**2 / np.maximum(errors.mean(axis=1), 0.25 / errors.shape[1]))


def _gaussian_window() -> Tensor:
    """Return the weights of a place's neighbourhood, float64 [11]; both sides' product is that of the plane."""
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _blurred(planes: Tensor) -> Tensor:
    """Average planes [n, 1, H, W] over neighbourhoods that lie within them, [n, 1, H-10, W-10]."""
    weights = _gaussian_window()
    rows = torch.nn.functional.conv2d(planes, weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1))


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Return the structural similarity of uint8 images [n, H, W, C], float64 [n] (Wang et al. 2004).

    Gaussian neighbourhoods of 11×11 with σ = 1.5 that lie within the image, K = 0.01 and 0.03; the channels' mean.
    NaN of images smaller than a neighbourhood.
    """
    channels = images.shape[3]
    if min(images.shape[1:3]) < WINDOW:
        return np.full(len(images), np.nan)
    x, y = (
        torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2).reshape(-1, 1, *part.shape[1:3]).double()
        for part in (images, originals)
    )
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    values = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    values = values / ((mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2))
    return values.flatten(1).mean(dim=1).reshape(-1, channels).mean(dim=1).numpy()


def pairs(images: LabelledImages, originals: LabelledImages) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield some images at a time with their originals, uint8 [n, H, W, C]."""
    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        yield np.asarray(images.pixels[rows]), np.asarray(originals.pixels[rows])
