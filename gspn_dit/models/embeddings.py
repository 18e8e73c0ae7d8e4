"""Patches in and out, timesteps and class labels; shared by every model family."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.ops.contract import compute_dtype


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


def sincos_positions(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Encode a grid's coordinates by sines and cosines (DiT, arXiv 2212.09748; ViT, arXiv 2010.11929).

    Args:
        rows: [H], coordinate of each row.
        columns: [W], coordinate of each column.
        channels: C, divisible by 4; the first half tells the column, the second the row, each C/4 sines and then C/4
            cosines at frequencies 10000^(-4i/C).

    Returns:
        [H, W, C], float32.
    """
    exponents = torch.arange(channels // 4, device=rows.device, dtype=torch.float32) / (channels // 4)
    frequencies = torch.exp(-math.log(10_000) * exponents)
    of_rows, of_columns = (
        torch.cat([angles.sin(), angles.cos()], dim=-1)
        for angles in (coordinates.float()[:, None] * frequencies for coordinates in (rows, columns))
    )
    shape = (len(rows), len(columns), -1)
    return torch.cat([of_columns[None].expand(shape), of_rows[:, None].expand(shape)], dim=-1)


ROTARY_BASE = 100
"""Of the frequencies of `rotate`, less than for text: a side has tens of tokens, not thousands (arXiv 2403.13298)."""


def rotate(vectors: Tensor) -> Tensor:
    """Turn pairs of values by angles that grow with the place, so that products of two depend on their distance.

    Axial rotary positions (arXiv 2104.09864; for images 2403.13298): the first half of the D values tells the column,
    the second the row, each D/4 pairs (i, i + D/4) at frequencies 100^(-4i/D).

    Args:
        vectors: queries or keys [..., H, W, D], 4 divides D.

    Returns:
        [..., H, W, D], in the dtype of `vectors`.
    """
    height, width, size = vectors.shape[-3:]
    pairs = size // 4
    frequencies = ROTARY_BASE ** -(torch.arange(pairs, device=vectors.device, dtype=torch.float32) / pairs)
    rows, columns = (torch.arange(side, device=vectors.device)[:, None] * frequencies for side in (height, width))
    grid = (height, width, pairs)
    angles = torch.stack([columns[None].expand(grid), rows[:, None].expand(grid)], dim=-2)  # [H, W, 2, D/4]
    first, second = vectors.float().unflatten(-1, (2, 2, pairs)).unbind(-2)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-2)
    return turned.flatten(-3).to(vectors.dtype)


SMOOTH = 0.01
"""Scale of timesteps for a model whose derivative in time is learnt from: 10 radians per unit of time at most."""


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep followed by a two-layer MLP (DiT, arXiv 2212.09748).

    The n frequencies are scale · 10000^(-i/n), in radians per timestep. With `endpoint` they are scale ·
    10000^(-i/(n-1)), so that the last one is scale/10000: diffusers' `DiTTransformer2DModel` spaces them so, DiT itself
    does not. DiT's scale is 1, and so steep that the derivative in time is noise (sCM, arXiv 2410.11081).
    """

    def __init__(self, hidden_size: int, frequencies: int = 256, endpoint: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.endpoint, self.scale = frequencies, endpoint, scale
        self.expand = nn.Linear(frequencies, hidden_size)
        self.mix = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] in [0, 1000] as [B, hidden_size]."""
        return self.mix(self.features(timesteps))

    def features(self, timesteps: Tensor) -> Tensor:
        """Return what the last layer maps, [B, hidden_size], for timesteps [B]."""
        half = self.frequencies // 2
        # In the order of DiT and diffusers: at timestep 999 another rounding of the exponents is seen in the output.
        exponents = -math.log(10_000) * torch.arange(half, device=timesteps.device, dtype=torch.float32)
        scaled = timesteps.to(compute_dtype(self.expand.weight.dtype))[:, None] * self.scale
        angles = scaled * torch.exp(exponents / (half - self.endpoint))
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.silu(self.expand(sinusoids.to(self.expand.weight.dtype)))

    @torch.no_grad()
    def imitate(self, other: TimestepEmbedding, ridge: float = 1e-3) -> None:
        """Fit the last layer to what another embedding says of the timesteps 0, 1, …, 1000: a smooth curve of it.

        Args:
            other: of the same hidden size.
            ridge: penalty of the squared weights, relative to the mean variance of `features`.
        """
        timesteps = torch.arange(1001.0, device=self.mix.weight.device)
        features, wanted = self.features(timesteps).double(), other(timesteps).double()
        middle, mean = features.mean(dim=0), wanted.mean(dim=0)
        gram = (features - middle).T @ (features - middle)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weight = torch.linalg.solve(gram, (features - middle).T @ (wanted - mean)).T
        self.mix.weight.copy_(weight)
        self.mix.bias.copy_(mean - weight @ middle)


class ClassEmbedding(nn.Embedding):
    """A vector for each class, and one more, with id `num_classes`, for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__(num_classes + 1, hidden_size)


class Modulation(nn.Linear):
    """Shifts, scales and gates as a linear map of SiLU(conditioning); starts at zero."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__(hidden_size, parts * hidden_size)
        self.parts = parts
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, conditioning: Tensor) -> Tensor:
        """Map conditioning [B, C] to [parts, B, 1, 1, C]."""
        parts = super().forward(F.silu(conditioning)).unflatten(-1, (self.parts, -1))
        return parts.transpose(0, 1)[:, :, None, None]


def modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor, epsilon: float = 1e-6, rms: bool = False) -> Tensor:
    """Return norm(tokens)·(1 + scale) + shift; tokens [B, H, W, C], shift and scale [B, 1, 1, C].

    The norm is LayerNorm, or with `rms` RMSNorm (arXiv 1910.07467), which subtracts no mean.
    """
    shape = tokens.shape[-1:]
    normed = F.rms_norm(tokens, shape, eps=epsilon) if rms else F.layer_norm(tokens, shape, eps=epsilon)
    return normed * (1 + scale) + shift


class ModulatedOutput(nn.Module):
    """LayerNorm with shift and scale from the conditioning, then a linear map to patches; starts at zero."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.modulation = Modulation(hidden_size, 2)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Map tokens [B, H, W, C] and conditioning [B, C] to patches [B, H, W, out_channels·p·p]."""
        shift, scale = self.modulation(conditioning)
        return self.linear(modulated_norm(tokens, shift, scale))
