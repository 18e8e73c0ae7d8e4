"""Representation alignment (REPA, arXiv 2410.06940): hidden tokens learn to predict features of the clean image.

The features are computed beforehand by a model of one's choice; the projector is small and belongs to training alone,
so that a model trained with it is saved and sampled like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.config import Config
from gspn_dit.data.batches import draw_flips
from gspn_dit.data.features import Features, open_features
from gspn_dit.diffusion import create_objective
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel

WIDTH = 2048
"""Hidden width of the projector."""


class ConvProjector(nn.Conv2d):
    """A 3×3 convolution from planes of tokens to features (iREPA, arXiv 2512.10794)."""

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__(channels, dimensions, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, h, w, C] to [B, h·w, dimensions]."""
        return super().forward(tokens.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


class MLPProjector(nn.Sequential):
    """Three linear maps (arXiv 2410.06940)."""

    def __init__(self, channels: int, dimensions: int) -> None:
        width = min(WIDTH, 4 * channels)
        last = nn.Linear(width, dimensions)
        super().__init__(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, h, w, C] to [B, h·w, dimensions]."""
        return super().forward(tokens.flatten(1, -2))


PROJECTORS: dict[str, type[nn.Module]] = {"mlp": MLPProjector, "conv": ConvProjector}


def spatially_normalised(features: Tensor) -> Tensor:
    """Return features [B, N, D] less their mean over an image's N tokens, over their deviation (arXiv 2512.10794).

    What all tokens of an image share says what it shows; what is left says where things are.
    """
    centred = features - features.mean(dim=1, keepdim=True)
    return centred / (centred.std(dim=1, keepdim=True) + 1e-6)


class Alignment:
    """Projects the tokens of a block and compares them with the features of their images.

    Args:
        config: of the run; the keys `training.repa_*` are used.
        model: whose block's output is read.
        features: of the training images.
    """

    def __init__(self, config: Config, model: DiffusionModel, features: Features) -> None:
        settings = config.training
        self.features, self.flip = features, config.data.horizontal_flip
        self.seed, self.weight, self.depth = config.seed, settings.repa_weight, settings.repa_depth
        self.normalise = settings.repa_normalise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            projector = PROJECTORS[settings.repa_projector](model.patch_embed.out_features, features.dimensions)
            self.projector = projector.to(model.patch_embed.weight.dtype)
        self.tokens: Tensor | None = None

    @contextmanager
    def reading(self, model: DiffusionModel) -> Iterator[None]:
        """Remember the tokens of the forward pass made inside, for `loss`."""
        aligned = model.blocks[self.depth - 1]

        def remember(block: nn.Module, output: Tensor) -> None:
            if block is aligned:
                self.tokens = output

        model.on_block = remember
        try:
            yield
        finally:
            model.on_block = None

    def loss(self, numbers: Sequence[int], indices: np.ndarray) -> Tensor:
        """Return weight · (1 - mean cosine) of the tokens that were read, of these sample numbers and images."""
        assert self.tokens is not None
        tokens, self.tokens = self.tokens, None
        found = self.features.rows(indices, draw_flips(self.seed, numbers, self.flip))
        target = torch.from_numpy(found).to(tokens.device)
        if self.normalise:
            target = spatially_normalised(target)
        return self.weight * (1 - F.cosine_similarity(self.projector(tokens).float(), target, dim=-1).mean())


def create_alignment(config: Config, model: DiffusionModel, labels: np.ndarray, latent_size: int) -> Alignment | None:
    """Return what `training.repa_features` asks for, None if it asks for nothing.

    Args:
        config: of the run.
        model: on any device.
        labels: class ids of the training images, int64 [n].
        latent_size: height and width of a latent.

    Raises:
        UserError: it cannot be had.
    """
    settings = config.training
    if settings.repa_features is None:
        return None
    for key, excluded in (
        ("data.streaming", config.data.streaming),
        ("data.buckets", bool(config.data.buckets)),
        # Several passes a step, of which one alone could be read.
        (f"objective.name {config.objective.name}", create_objective(config.objective).second_time),
    ):
        if excluded:
            raise UserError(f"training.repa_features does not go with {key}; leave one of them out")
    if settings.repa_depth > len(model.blocks):
        raise UserError(f"training.repa_depth is {settings.repa_depth}, but the model has {len(model.blocks)} blocks")
    grid = latent_size // model.patch_size
    features = open_features(settings.repa_features, grid, labels, config.data.validation_fraction)
    if config.data.horizontal_flip and not features.mirrored:
        raise UserError(
            f"training.repa_features {settings.repa_features} has no features of mirrored images, as "
            "data.horizontal_flip needs; extract them with gspn_dit.prepare.features, or leave one of them out"
        )
    return Alignment(config, model, features)
