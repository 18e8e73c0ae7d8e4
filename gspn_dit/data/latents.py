"""The `Latent` interface: what lies between 8-bit images and the model's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.config import LatentConfig
from gspn_dit.errors import UserError


class Latent(ABC):
    """Encodes images to latents and decodes them; `spec` says which latent it is and travels with checkpoints."""

    channels: int
    """Channels of a latent."""
    size: int
    """Height and width of a latent."""
    factor: int = 1
    """Image pixels per latent pixel, along each side."""

    def to(self, device: str | torch.device) -> Latent:
        """Move what the latent computes with to a device; returns itself."""
        return self

    def save(self, directory: Path) -> dict[str, Any]:
        """Write into a directory what decoding needs beside the spec; returns the spec, its paths relative to it."""
        return self.spec()

    @abstractmethod
    def encode(self, images: np.ndarray) -> Tensor:
        """Return latents, float32 [B, channels, size, size], of uint8 images [B, H, W, C]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Return uint8 images [B, H, W, C] of latents; raises UserError if any is not finite."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return plain JSON values from which `latent_from_spec` builds an equal latent."""


class IdentityLatent(Latent):
    """Pixels scaled to [-1, 1]."""

    def __init__(self, image_size: int, image_channels: int) -> None:
        self.size, self.channels = image_size, image_channels

    def encode(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return pixels.to(torch.float32) / 127.5 - 1

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_uint8(latents)

    def spec(self) -> dict[str, Any]:
        return {"name": "identity", "image_size": self.size, "image_channels": self.channels}


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images [B, C, H, W] in [-1, 1] into uint8 [B, H, W, C]: 127.5·x + 128, clamped and truncated as in ADM."""
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise UserError(
            f"{bad} of {len(images)} samples hold NaN or infinite values: the weights have diverged; "
            "use an earlier checkpoint"
        )
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def create_latent(config: LatentConfig, image_size: int, image_channels: int) -> Latent:
    """Build the latent a config names for images of a size and a number of channels."""
    assert config.name == "identity"
    return IdentityLatent(image_size, image_channels)


def latent_from_spec(spec: Mapping[str, Any]) -> Latent:
    """Build the latent that `Latent.spec` described; raises UserError for one this version does not know."""
    if spec.get("name") != "identity":
        raise UserError(f"the checkpoint's latent '{spec.get('name')}' is not known to this version")
    return IdentityLatent(int(spec["image_size"]), int(spec["image_channels"]))
