"""Patches in and out, timesteps and class labels; shared by every model family."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut [B, C, H, W] into patches: [B, H/p, W/p, C·p·p]."""
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"a latent of {height}×{width} is not divisible by the patch size {patch_size}")
    grid = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Invert `patchify`: [B, h, w, C·p·p] to [B, C, h·p, w·p]."""
    batch, height, width, values = patches.shape
    channels = values // patch_size**2
    grid = patches.reshape(batch, height, width, channels, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height * patch_size, width * patch_size)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep followed by a two-layer MLP (DiT, arXiv 2212.09748)."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.expand = nn.Linear(frequencies, hidden_size)
        self.mix = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] in [0, 1000] as [B, hidden_size]."""
        half = self.frequencies // 2
        exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mix(F.silu(self.expand(sinusoids.to(self.expand.weight.dtype))))


class ClassEmbedding(nn.Embedding):
    """A vector for each class, and one more, with id `num_classes`, for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__(num_classes + 1, hidden_size)


class ModulatedOutput(nn.Module):
    """LayerNorm with shift and scale from the conditioning, then a linear map to patches; starts at zero."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Map tokens [B, H, W, C] and conditioning [B, C] to patches [B, H, W, out_channels·p·p]."""
        shift, scale = self.modulation(F.silu(conditioning))[:, None, None].chunk(2, dim=-1)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return self.linear(normed * (1 + scale) + shift)
