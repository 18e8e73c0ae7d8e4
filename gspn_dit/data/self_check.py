"""A look at a few real latents before a run: are they of unit variance, and do they lead back to their images?

A latent that is normalised twice, or not at all, trains without an error and costs points of FID; so do the weights of
another autoencoder. Eight images show it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from gspn_dit.data.batches import Batches
from gspn_dit.data.images import evenly_spaced
from gspn_dit.data.latents import AutoencoderLatent, Latent
from gspn_dit.errors import UserError

CHECKED_IMAGES = 8
LARGEST_FACTOR = 2.0
"""How far the deviation of latents may be from 1, up or down, before a run is refused."""
LISTED_CHANNELS = 8
RECONSTRUCTED = 0.5
"""Share of their variance that images, or latents, must keep on the way there and back for an autoencoder to count as
trained: what the latents of another one deviate by means nothing, and is only told."""


def check_latents(latent: Latent, batches: Any) -> tuple[str, ...]:
    """Return what to say of the latents that a run trains on, a line each; nothing of pixels.

    Args:
        latent: the run's.
        batches: of its data, `Batches` or `LatentBatches`; of the latter the images are not at hand.

    Raises:
        UserError: the autoencoder is a trained one, and the deviation of its latents is off by a factor of 2 or more.
    """
    if not isinstance(latent, AutoencoderLatent):
        return ()
    items = evenly_spaced(len(batches.images), CHECKED_IMAGES)
    latents, _ = batches.at(items.tolist())
    decoded = latent.decode(latents.to(latent.vae.device))
    lines = [_statistics(latents)]
    if isinstance(batches, Batches):
        pixels, _ = batches.load(items)
        kept = explained_variance(pixels.astype(np.float64), decoded.astype(np.float64))
        lines.append(f"reconstruction of {len(items)} images: PSNR {psnr(pixels, decoded):.1f} dB")
    else:
        again = latent.encode(decoded)
        kept = explained_variance(latents.numpy(), again.numpy())
        lines.append(f"reconstruction of {len(items)} latents, decoded and encoded: {max(kept, 0):.0%} of variance")
    deviation = latents.std(dim=(0, 2, 3)).square().mean().sqrt().item()
    trained = kept >= RECONSTRUCTED
    if not trained:
        lines.append("the autoencoder hardly reconstructs them: is it trained, and for such images?")
    elif not 1 / LARGEST_FACTOR < deviation < LARGEST_FACTOR:
        raise UserError(
            f"the latents of {latent.place} deviate by {deviation:.3g} where about 1 is expected "
            f"(scale {_short(latent.scale)}, shift {_short(latent.shift)}): they are normalised twice, or not at all; "
            "correct scaling_factor, latents_mean and latents_std in the autoencoder's config.json"
        )
    return tuple(lines)


def _statistics(latents: Tensor) -> str:
    means, deviations = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return f"of {len(means)} channels: means {_numbers(means)}, deviations {_numbers(deviations)}"


def _numbers(values: Tensor) -> str:
    if len(values) > LISTED_CHANNELS:
        return f"{values.min():.2g} to {values.max():.2g}"
    return " ".join(f"{value:.2g}" for value in values.tolist())


def _short(value: float | list[float]) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"of {len(value)} channels"


def explained_variance(values: np.ndarray, others: np.ndarray) -> float:
    """Return 1 - Σ(values - others)² / Σ(values - mean)², the mean taken over the first axis.

    >>> explained_variance(np.array([1.0, 3.0]), np.array([1.5, 3.0]))
    0.875
    """
    spread = np.square(values - values.mean(axis=0)).sum()
    return float(1 - np.square(values - others).sum() / spread) if spread else -math.inf


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Return 10 · log10(255² / mean squared difference) of uint8 images, in decibels."""
    error = np.mean((images.astype(np.float64) - others) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf
