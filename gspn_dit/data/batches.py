"""Training and validation batches by sample number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.data.images import ImageSet
from gspn_dit.data.latent_shards import LatentSet
from gspn_dit.data.latents import AutoencoderLatent, Latent

CACHE_BYTES = 1 << 30
"""Sets whose decoded pixels fit are decoded once and kept."""


@dataclass(frozen=True)
class Batches:
    """Latents and labels of an image set; every batch is a function of (seed, sample numbers)."""

    images: ImageSet
    latent: Latent
    seed: int
    horizontal_flip: bool = False

    @cached_property
    def _cached_pixels(self) -> np.ndarray | None:
        size_bytes = len(self.images) * self.images.image_size**2 * self.images.channels
        return self.images.pixels() if size_bytes <= CACHE_BYTES else None

    def decode_small_set(self) -> None:
        """Decode a set that fits the cache now; raises LocalUserError for an image that cannot be read."""
        _ = self._cached_pixels

    def load(self, indices: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return pixels uint8 [B, H, W, C] and labels int64 [B] of images by index."""
        cached = self._cached_pixels
        pixels = self.images.pixels(indices) if cached is None else cached[indices]
        return pixels, torch.from_numpy(self.images.labels[indices])

    def shuffled(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents float32 [B, C, H, W] and labels int64 [B] for sample numbers, shuffled epoch by epoch."""
        pixels, labels = self.load(rng.data_indices(self.seed, numbers, len(self.images)))
        pixels = mirror(pixels, draw_flips(self.seed, numbers, self.horizontal_flip))
        return self.latent.encode(pixels, draw_posterior(self.latent, self.seed, rng.Stream.POSTERIOR, numbers)), labels

    def at(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents and labels of images by index, without augmentation."""
        pixels, labels = self.load(np.asarray(indices))
        noise = draw_posterior(self.latent, self.seed, rng.Stream.VALIDATION_POSTERIOR, indices)
        return self.latent.encode(pixels, noise), labels


@dataclass(frozen=True)
class LatentBatches:
    """Batches of encoded images: `Batches` without the encoder; flips and posterior draws are the same functions."""

    images: LatentSet
    latent: AutoencoderLatent
    seed: int
    horizontal_flip: bool = False

    def _load(self, items: np.ndarray, flips: np.ndarray, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        moments = torch.from_numpy(self.images.moments(items, flips))
        return self.latent.draw(moments, noise), torch.from_numpy(self.images.labels[items])

    def shuffled(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents float32 [B, C, H, W] and labels int64 [B] for sample numbers, shuffled epoch by epoch."""
        items = rng.data_indices(self.seed, numbers, len(self.images))
        flips = draw_flips(self.seed, numbers, self.horizontal_flip)
        return self._load(items, flips, draw_posterior(self.latent, self.seed, rng.Stream.POSTERIOR, numbers))

    def at(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents and labels of images by index, without augmentation."""
        noise = draw_posterior(self.latent, self.seed, rng.Stream.VALIDATION_POSTERIOR, indices)
        return self._load(np.asarray(indices), np.zeros(len(indices), dtype=bool), noise)


def draw_flips(seed: int, numbers: Sequence[int], horizontal_flip: bool) -> np.ndarray:
    """Tell which samples are mirrored, bool [B]: half of them, by number, if `horizontal_flip` says so."""
    if not horizontal_flip:
        return np.zeros(len(numbers), dtype=bool)
    return rng.uniform(seed, rng.Stream.FLIP, numbers).numpy() < 0.5


def mirror(pixels: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Mirror the images [B, H, W, C] for which `flips` [B] is true."""
    return np.where(flips[:, None, None, None], pixels[:, :, ::-1], pixels) if flips.any() else pixels


def draw_posterior(
    latent: Latent, seed: int, stream: rng.Stream, numbers: Sequence[int], size: tuple[int, int] | None = None
) -> Tensor | None:
    """Return the noise that draws latents from posteriors, by number [B, C, h, w], or None where there are none.

    `size` is (h, w); None for the latent's own.
    """
    if not latent.has_posterior:
        return None
    return rng.normal(seed, stream, numbers, (latent.channels, *(size or (latent.size, latent.size))))
