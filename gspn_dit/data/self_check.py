"""A look at a few real latents before a run: are they of mean 0 and deviation 1, and do they lead back to their images?

A latent that is normalised twice, or not at all, trains without an error and costs points of FID; so do the weights of
another autoencoder. A few images show it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.data.batches import Batches
from gspn_dit.data.buckets import BucketBatches
from gspn_dit.data.images import evenly_spaced
from gspn_dit.data.latents import AutoencoderLatent, Latent
from gspn_dit.errors import UserError

CHECKED_IMAGES = 32
"""Whose latents are judged."""
RECONSTRUCTED_IMAGES = 8
"""Of them, decoded: it takes longer."""
LARGEST_FACTOR = 2.0
"""How far the deviation of the median channel may be from 1, up or down, before a run is refused."""
LARGEST_MEAN = 2.0
"""How far the mean of the median channel may be from 0. Autoencoders without statistics by channel are off by about 1:
that of Stable Diffusion by 0.5, and by 1.1 in its worst channel, by the means that EDM2 uses (arXiv 2312.02696)."""
ONE_FACTOR, ONE_MEAN = 10.0, 5.0
"""The same of a single channel: a few of many may be unusual in some kind of images."""
LISTED_CHANNELS = 8
RECONSTRUCTED = 0.5
"""Share of their variance that images, or latents, must keep on the way there and back for an autoencoder to count as
trained: what the latents of another one deviate by means nothing, and is only told."""


def check_latents(latent: Latent, batches: Any, refuse: bool = True) -> tuple[str, ...]:
    """Return what to say of the latents that a run trains on, a line each; nothing of pixels.

    Args:
        latent: the run's.
        batches: of its data, `Batches`, `BucketBatches` or `LatentBatches`; of the latter the images are not at hand.
            None: no image can be asked for, and nothing is looked at.
        refuse: `latent.check`; False: tell, whatever is found.

    Raises:
        UserError: the autoencoder is a trained one, and mean or deviation of its latents is off, of the median channel
            or far off of a single one.
    """
    if not isinstance(latent, AutoencoderLatent):
        return ()
    if batches is None:
        return ("not looked at: a stream without a validation split has no images to ask for before the first step",)
    items = evenly_spaced(len(batches.images), CHECKED_IMAGES).tolist()
    parts = batches.parts_at(items) if isinstance(batches, BucketBatches) else [items]
    values = torch.cat([batches.at(part)[0].transpose(0, 1).flatten(1) for part in parts], dim=1)
    means, deviations = values.mean(dim=1), values.std(dim=1, correction=0)
    line, kept = _reconstruction(latent, batches, max(parts, key=len))
    lines = [_statistics(means, deviations), line]
    trained = kept >= RECONSTRUCTED
    if not trained:
        lines.append("the autoencoder hardly reconstructs them: is it trained, and for such images?")
    problem = _problem(means.numpy(), deviations.numpy())
    if trained and problem is not None:
        said = f"{problem} where about 0 and 1 are expected"
        if not refuse:
            return (*lines, f"{said}; trained on all the same (latent.check is false)")
        raise UserError(
            f"the latents of {latent.place}: {said} (scale {_short(latent.scale)}, shift {_short(latent.shift)}), so "
            "they are normalised twice, or not at all; correct scaling_factor, latents_mean and latents_std in the "
            "autoencoder's config.json, or set latent.check false if the images are that unusual"
        )
    return tuple(lines)


def _reconstruction(latent: AutoencoderLatent, batches: Any, items: list[int]) -> tuple[str, float]:
    """Return what to say of some images, of one size, there and back, and the share of variance that is kept."""
    items = [items[place] for place in evenly_spaced(len(items), RECONSTRUCTED_IMAGES)]
    latents, _ = batches.at(items)
    decoded = latent.decode(latents.to(latent.vae.device))
    if isinstance(batches, (Batches, BucketBatches)):
        pixels, _ = batches.load(np.asarray(items))
        kept = explained_variance(pixels.astype(np.float64), decoded.astype(np.float64))
        return f"reconstruction of {len(items)} images: PSNR {psnr(pixels, decoded):.1f} dB", kept
    kept = explained_variance(latents.numpy(), latent.encode(decoded).numpy())
    return f"reconstruction of {len(items)} latents, decoded and encoded: {max(kept, 0):.0%} of variance", kept


def _problem(means: np.ndarray, deviations: np.ndarray) -> str | None:
    """Return what is off, None if nothing is, of means and deviations by channel: first of the median channel."""
    shift, deviation = np.median(np.abs(means)), np.median(deviations)
    many = f"the median of {len(means)} channels" if len(means) > 1 else "the only channel"
    if shift > LARGEST_MEAN:
        return f"{many} is {shift:.3g} off in its mean"
    if not 1 / LARGEST_FACTOR < deviation < LARGEST_FACTOR:
        return f"{many} has a deviation of {deviation:.3g}"
    factors = np.maximum(deviations, 1 / np.maximum(deviations, np.finfo(np.float32).tiny))
    worst = np.argmax(np.maximum(np.abs(means) / ONE_MEAN, factors / ONE_FACTOR))
    if abs(means[worst]) > ONE_MEAN or factors[worst] > ONE_FACTOR:
        return (
            f"channel {worst} of {len(means)} has a mean of {means[worst]:.3g}, a deviation of {deviations[worst]:.3g}"
        )
    return None


def _statistics(means: Tensor, deviations: Tensor) -> str:
    return f"of {len(means)} channels: means {_numbers(means)}, deviations {_numbers(deviations)}"


def _numbers(values: Tensor) -> str:
    """Return every number where they are few, else what lies between them: least, median and greatest."""
    if len(values) > LISTED_CHANNELS:
        return f"{values.min():.2g} to {values.max():.2g} (median {values.quantile(0.5):.2g})"
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
