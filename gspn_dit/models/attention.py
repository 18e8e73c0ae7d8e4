"""Attention as token mixers: over all tokens, linear in their number, or to the neighbours of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.embeddings import rotate
from gspn_dit.models.flops import attention_multiply_adds
from gspn_dit.models.mixer import UNSEEN, Mixer, maps_multiply_adds
from gspn_dit.ops.contract import autocast_dtype, without_autocast


@dataclass(frozen=True)
class HeadOptions:
    """Of `LinearAttentionMixer`; other attention has more."""

    num_heads: int = dataclasses.field(default=6, metadata=UNSEEN)
    """Divides the channels."""


@dataclass(frozen=True)
class AttentionOptions(HeadOptions):
    """Of `AttentionMixer`."""

    rotary: bool = dataclasses.field(default=False, metadata=UNSEEN)
    """Rotate queries and keys by their place; 4 divides the channels of a head."""


def _check_heads(channels: int, num_heads: int) -> None:
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads {num_heads} does not divide the {channels} channels")


class AttentionMixer(Mixer):
    """Multi-head self-attention over all tokens, by `scaled_dot_product_attention`."""

    kind = "attention"
    needs_positions = True

    def __init__(self, channels: int, options: AttentionOptions) -> None:
        super().__init__()
        _check_heads(channels, options.num_heads)
        if options.rotary and channels // options.num_heads % 4:
            raise ValueError(f"rotary needs heads whose channels 4 divides, not {channels // options.num_heads}")
        self.num_heads, self.rotary = options.num_heads, options.rotary
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        projected = self.qkv(tokens.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, C/heads]
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [B, heads, N, C/heads]
        if self.rotary:
            query, key = (rotate(part.unflatten(2, tokens.shape[1:3])).flatten(2, 3) for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(tokens.shape))

    def multiply_adds(self, height: int, width: int) -> int:
        tokens = height * width
        return maps_multiply_adds(self, tokens) + attention_multiply_adds(tokens, self.proj.in_features)


class LinearAttentionMixer(Mixer):
    """ReLU linear attention with a depthwise convolution of the values beside it (LiT, arXiv 2501.12976; SANA,
    2410.10629): with φ = ReLU, token n becomes φ(q_n)ᵀ Σ_m φ(k_m) v_mᵀ / φ(q_n)ᵀ Σ_m φ(k_m), plus conv3×3(v)_n.
    """

    kind = "linear attention"

    def __init__(self, channels: int, options: HeadOptions) -> None:
        super().__init__()
        _check_heads(channels, options.num_heads)
        self.num_heads = options.num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.local_conv = DepthwiseConv(channels, 3, bias=True)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        values = self.qkv(tokens)
        heads = values.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, h, N, d]
        if autocast_dtype(tokens.device.type) is not None:
            heads = heads.float()  # sums over all tokens
        with without_autocast(tokens.device.type):
            query, key = F.relu(heads[0]), F.relu(heads[1])
            summed = key.transpose(-1, -2) @ F.pad(heads[2], (0, 1), value=1.0)  # [B, h, d, d+1]; Σφ(k) is the last
            mixed = query @ summed
            mixed = mixed[..., :-1] / (mixed[..., -1:] + 1e-6)
        mixed = mixed.transpose(1, 2).reshape(tokens.shape).to(values.dtype)
        return self.proj(mixed + self.local_conv(values[..., -tokens.shape[-1] :]))

    def multiply_adds(self, height: int, width: int) -> int:
        tokens, channels = height * width, self.proj.in_features
        products = 2 * tokens * channels * (channels // self.num_heads + 1)  # keys with values and ones, then queries
        return maps_multiply_adds(self, tokens) + products


@dataclass(frozen=True)
class NeighbourhoodOptions(HeadOptions):
    """Of `NeighbourhoodMixer`."""

    neighbourhood: int = dataclasses.field(default=7, metadata=UNSEEN)
    """Tokens on a side of the square that a token sees; odd."""


class NeighbourhoodMixer(Mixer):
    """Self-attention to the k×k tokens around each token; at borders to the k×k nearest ones inside (Neighbourhood
    Attention, arXiv 2204.07143).

    In PyTorch alone: a row of queries meets the k rows of keys around it, and a mask leaves k of their columns to each,
    so that it takes k·W products per token and k times the keys' memory where kernels made for it take k².
    """

    kind = "neighbourhood attention"
    needs_positions = True

    def __init__(self, channels: int, options: NeighbourhoodOptions) -> None:
        super().__init__()
        _check_heads(channels, options.num_heads)
        if options.neighbourhood < 1 or options.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood is {options.neighbourhood}, but must be an odd number of at least 1")
        self.num_heads, self.neighbourhood = options.num_heads, options.neighbourhood
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        _, height, width, _ = tokens.shape
        rows, columns = (neighbours(side, self.neighbourhood, tokens.device) for side in (height, width))  # [side, k]
        query, *others = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # [B, H, W, heads, C/heads]
        key, value = (part[:, rows].flatten(2, 3).transpose(2, 3) for part in others)  # [B, H, heads, k·W, C/heads]
        sees = torch.zeros(width, width, dtype=torch.bool, device=tokens.device).scatter(1, columns, True)
        mixed = F.scaled_dot_product_attention(query.transpose(2, 3), key, value, sees.repeat(1, rows.shape[1]))
        return self.proj(mixed.transpose(2, 3).reshape(tokens.shape))

    def multiply_adds(self, height: int, width: int) -> int:
        tokens, seen = height * width, min(self.neighbourhood, height) * min(self.neighbourhood, width)
        return maps_multiply_adds(self, tokens) + 2 * tokens * seen * self.proj.in_features


def neighbours(side: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return the indices of the nearest `count` places on a line of `side`, or of all if they are fewer: [side, k]."""
    count = min(count, side)
    first = (torch.arange(side, device=device) - count // 2).clamp(0, side - count)
    return first[:, None] + torch.arange(count, device=device)
