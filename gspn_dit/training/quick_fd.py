"""A Fréchet distance to watch while training: few samples, so a trend within one run, never a figure to compare.

Samples are drawn from the EMA weights without guidance, always from the same noise. The reference is real images
as the task would draw them, through its autoencoder, so that the model is measured and not the autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gspn_dit.config import Config
from gspn_dit.data.images import evenly_spaced
from gspn_dit.diffusion import CHUNK
from gspn_dit.errors import UserError
from gspn_dit.tasks import GenerativeTask, Task

MAX_REFERENCE_IMAGES = 10_000
"""Real images, evenly spaced, whose features are compared with."""


class Scorer(Protocol):
    """Features of images and a distance between sets of them; evaluation knows how."""

    @property
    def name(self) -> str:
        """What the distance is called."""

    @property
    def feature_dim(self) -> int:
        """Values per image."""

    def features(self, pixels: np.ndarray, device: str) -> Tensor:
        """Return float32 [n, feature_dim] on the CPU of uint8 images [n, H, W, C]."""

    def distance(self, features: Tensor, reference: Tensor) -> float:
        """Return the distance between two sets of features."""


ScorerLoader = Callable[[str | None, str, int, int], Scorer]
"""(training.fd_features, name of the data set, image size, channels) → scorer; raises UserError."""


def create_quick_fd(
    config: Config, task: Task, accelerator: Accelerator, load_scorer: ScorerLoader | None
) -> QuickFD | None:
    """Return what `training.fd_every` asks for, None if it asks for nothing; raises UserError if it cannot be had."""
    if config.training.fd_every is None:
        return None
    if not isinstance(task, GenerativeTask):
        raise UserError(f"training.fd_every: task {config.task} draws no images to score; leave it out")
    if load_scorer is None:
        raise UserError("training.fd_every needs a feature extractor, which train.py hands in; start train.py")
    return QuickFD(config, task, accelerator, load_scorer)


class QuickFD:
    """Scores a model by few samples; all that is random is a function of the seed, so training is the same without it.

    Raises UserError if no net fits, or there are too few images for its features.
    """

    def __init__(
        self, config: Config, task: GenerativeTask, accelerator: Accelerator, load_scorer: ScorerLoader
    ) -> None:
        settings, data_name = config.training, task.describe()["data"]["name"]
        self.task, self.accelerator = task, accelerator
        self.count = settings.fd_samples
        self.reference_count = min(task.reference_count, MAX_REFERENCE_IMAGES)
        self.scorer = load_scorer(settings.fd_features, data_name, task.image_size, task.image_channels)
        needed = self.scorer.feature_dim + 1
        if self.count < needed:
            raise UserError(
                f"training.fd_samples is {self.count}, but {self.scorer.name} has {needed - 1} features and needs at "
                f"least {needed} samples"
            )
        if self.reference_count < needed:
            raise UserError(
                f"training.fd_every: {self.scorer.name} needs at least {needed} images, "
                f"'{data_name}' has {self.reference_count}; leave it out"
            )

    @property
    def name(self) -> str:
        """What the distance is called."""
        return self.scorer.name

    def __call__(self, model: nn.Module) -> float:
        """Return the distance of this model's samples, the same in every process; NaN if they give none."""

        def draw(indices: range) -> np.ndarray | None:
            try:
                return self.task.draw(model, indices)
            except UserError:  # samples that are not finite shall not end the run, nor one process alone
                return None

        features = self._features(self.count, draw)
        try:
            return self.scorer.distance(features, self._real)
        except UserError:
            return math.nan

    @cached_property
    def _real(self) -> Tensor:
        """Features of the reference, [m, d]."""
        chosen = evenly_spaced(self.task.reference_count, self.reference_count)

        def decode(indices: range) -> np.ndarray:
            return self.task.reference(chosen[indices.start : indices.stop].tolist())

        return self._features(self.reference_count, decode)

    def _features(self, count: int, images_of: Callable[[range], np.ndarray | None]) -> Tensor:
        """Return features of images 0 … count-1, float32 [count, d]; the processes share the work by chunks."""
        device = self.accelerator.device
        features = torch.zeros(count, self.scorer.feature_dim)
        for start in range(CHUNK * self.accelerator.process_index, count, CHUNK * self.accelerator.num_processes):
            indices = range(start, min(start + CHUNK, count))
            images = images_of(indices)
            part = math.nan if images is None else self.scorer.features(images, str(device))
            features[start : indices.stop] = part
        # Each row is not zero in one process alone, so the sum is exact in any order.
        return self.accelerator.reduce(features.to(device), reduction="sum").cpu()
