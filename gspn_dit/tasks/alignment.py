"""Representation alignment (REPA, arXiv 2410.06940): hidden tokens learn to predict features of the clean image.

The features are computed beforehand by a model of one's choice; the projector is small and belongs to training alone,
so that a model trained with it is saved and sampled like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit import rng
from gspn_dit.config import Config
from gspn_dit.diffusion import create_objective
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel

WIDTH = 2048
"""Hidden width of the projector."""


def load_features(path: str, tokens: int, images: int | None = None) -> np.ndarray:
    """Map a .npy of features [images, tokens, dimensions], tokens row by row; raises UserError if it does not fit."""
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"training.repa_features {path} cannot be read: {error}") from None
    if not isinstance(features, np.ndarray) or features.dtype.kind != "f":
        raise UserError(f"training.repa_features {path} holds no floating-point array; save one with numpy.save")
    images = features.shape[0] if images is None and features.ndim else images
    if features.ndim != 3 or features.shape[:2] != (images, tokens):
        raise UserError(
            f"training.repa_features {path} has shape {list(features.shape)}, but {images} training images of {tokens} "
            f"tokens need [{images}, {tokens}, dimensions]"
        )
    return features


class Alignment:
    """Projects the tokens of a block and compares them with the features of their images.

    Args:
        config: of the run; `training.repa_features`, `repa_weight` and `repa_depth` are used.
        model: whose block's output is read.
        latent_size: of an image.
    """

    def __init__(self, config: Config, model: DiffusionModel, latent_size: int) -> None:
        settings = config.training
        assert settings.repa_features is not None
        self.features = load_features(settings.repa_features, image_tokens(model, latent_size))
        self.seed, self.weight, self.depth = config.seed, settings.repa_weight, settings.repa_depth
        hidden, width = model.patch_embed.out_features, min(WIDTH, 4 * model.patch_embed.out_features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.projector = nn.Sequential(
                nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, self.features.shape[2]),
            ).to(model.patch_embed.weight.dtype)  # fmt: skip
        self.tokens: Tensor | None = None

    @contextmanager
    def reading(self, model: DiffusionModel) -> Iterator[None]:
        """Remember the tokens of the forward pass made inside, for `loss`."""

        def remember(block: nn.Module, arguments: Any, output: Tensor) -> None:
            self.tokens = output

        hook = model.blocks[self.depth - 1].register_forward_hook(remember)
        try:
            yield
        finally:
            hook.remove()

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """Return weight · (1 - mean cosine) of the tokens that were read, whose sample numbers these are."""
        assert self.tokens is not None
        tokens, self.tokens = self.tokens, None
        chosen = self.features[rng.data_indices(self.seed, numbers, len(self.features))]
        target = torch.from_numpy(chosen.astype(np.float32)).to(tokens.device)
        projected = self.projector(tokens.flatten(1, -2))
        return self.weight * (1 - F.cosine_similarity(projected.float(), target, dim=-1).mean())


def image_tokens(model: DiffusionModel, latent_size: int) -> int:
    """Return the tokens of an image."""
    return (latent_size // model.patch_size) ** 2


def check_alignment(config: Config, model: DiffusionModel, images: int, latent_size: int) -> None:
    """Raise UserError where a config asks for an alignment that cannot be, before anything is written."""
    settings = config.training
    if settings.repa_features is None:
        return
    for key, excluded in (
        ("training.compile", settings.compile),
        ("data.horizontal_flip", config.data.horizontal_flip),  # the features are of images as they are
        ("data.streaming", config.data.streaming),
        ("data.buckets", bool(config.data.buckets)),
        # Several passes a step, of which one alone could be read.
        (f"objective.name {config.objective.name}", create_objective(config.objective).second_time),
    ):
        if excluded:
            raise UserError(f"training.repa_features does not go with {key}; leave one of them out")
    if settings.repa_depth > len(model.blocks):
        raise UserError(f"training.repa_depth is {settings.repa_depth}, but the model has {len(model.blocks)} blocks")
    load_features(settings.repa_features, image_tokens(model, latent_size), images)
