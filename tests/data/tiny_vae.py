"""Autoencoders of a few thousand random weights, and sets of images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

SIZE, FACTOR, CHANNELS = 8, 2, 2
"""Image pixels, pixels per latent cell, channels of a latent."""


def write_vae(directory: Path, seed: int = 0, image_channels: int = 1, scale: float = 0.5, shift: float = 0.25) -> Path:
    """Save an autoencoder of factor 2 with 2 latent channels; another seed has other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=4,
            sample_size=SIZE,
            mid_block_add_attention=False,
            scaling_factor=scale,
            shift_factor=shift,
        )
    vae.save_pretrained(directory)
    return directory


def image_of(number: int, size: int = SIZE, mode: str = "L") -> Image.Image:
    """An image that its number decides."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write_folder(directory: Path, count: int = 13, classes: tuple[str, ...] = ("ant", "bee"), mode: str = "L") -> Path:
    """Save `count` images in class folders, in turn."""
    for number in range(count):
        folder = directory / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        image_of(number, mode=mode).save(folder / f"{number:03d}.png")
    return directory
