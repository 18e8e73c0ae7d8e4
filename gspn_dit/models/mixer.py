"""What every token mixer is: a module over tokens that says what it costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

UNSEEN = {"unseen": True}
"""Metadata of an option that weights of the same shapes depend on, so that fine-tuning must compare it."""


class Mixer(nn.Module):
    """Mixes tokens [B, H, W, C] to [B, H, W, C]."""

    kind = "mixers"
    """What messages call those of this class."""
    needs_positions = False
    """Whether a model adds positions to the tokens unless it is told otherwise."""

    def multiply_adds(self, height: int, width: int) -> int:
        """Return the multiply-adds of an image of height × width tokens, linear maps and convolutions included."""
        raise NotImplementedError

    def working_elements(self, height: int, width: int) -> int:
        """Return how many elements the backward pass recomputes for an image; they come and go with each mixer."""
        return 0

    def initialise(self) -> None:
        """Draw what shall not start by Xavier's rule, which the model applies to all linear maps before."""


class ChannelGate(nn.Linear):
    """Scales each channel of tokens [B, H, W, C] by the sigmoid of a linear map of the channels' means over the image
    (compact channel attention of DiCo, arXiv 2505.11196).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale tokens [B, H, W, C]."""
        return tokens * torch.sigmoid(super().forward(tokens.mean((1, 2), keepdim=True)))


def maps_multiply_adds(module: nn.Module, tokens: int) -> int:
    """Return the multiply-adds of a mixer's own linear maps and convolutions, not of modules within its modules."""
    maps = [part for part in module.children() if isinstance(part, (nn.Linear, nn.Conv2d))]
    # a gate's map is of the image's means, not of every token
    return sum((1 if isinstance(part, ChannelGate) else tokens) * part.weight.numel() for part in maps)
