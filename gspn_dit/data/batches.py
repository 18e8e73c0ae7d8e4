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
from gspn_dit.data.latents import Latent

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

    def training(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents float32 [B, C, H, W] and labels int64 [B] for sample numbers, shuffled epoch by epoch."""
        pixels, labels = self.load(rng.data_indices(self.seed, numbers, len(self.images)))
        if self.horizontal_flip:
            flip = rng.uniform(self.seed, rng.Stream.FLIP, numbers).numpy() < 0.5
            pixels = np.where(flip[:, None, None, None], pixels[:, :, ::-1], pixels)
        return self.latent.encode(pixels), labels

    def validation(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents and labels of images by index, without augmentation."""
        pixels, labels = self.load(np.asarray(indices))
        return self.latent.encode(pixels), labels
