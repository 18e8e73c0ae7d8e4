"""A trained classifier: images in, classes or features out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gspn_dit.checkpoint import load_weights, read_manifest, resolve_checkpoint
from gspn_dit.config import Config, config_from_dict
from gspn_dit.data.augment import Augmentation, central, normalise
from gspn_dit.data.classified import ClassifiedBatches
from gspn_dit.data.images import ImageSet, load_splits
from gspn_dit.errors import UserError
from gspn_dit.models.classifiers import penultimate
from gspn_dit.tasks.classification import build_model

WEIGHTS = ("ema", "model")
"""Averaged weights, and those of the last step."""


@dataclass(frozen=True)
class ImageClassifier:
    """A model of task classification, in evaluation mode, with what its checkpoint says."""

    model: nn.Module
    checkpoint: Path
    manifest: dict[str, Any]
    weights: str
    """Of `WEIGHTS`."""

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], weights: str = "ema") -> ImageClassifier:
        """Load a run directory's newest checkpoint, or one that is named, on the CPU.

        Raises UserError where there is none, or it is not of task classification.
        """
        place = resolve_checkpoint(path)
        manifest = read_manifest(place)
        if manifest.get("config", {}).get("task") != "classification":
            raise UserError(f"{place} is not of task classification: {manifest.get('config', {}).get('task', 'none')}")
        model = build_model(manifest["model"])
        load_weights(model, place, weights)
        return cls(model.eval().requires_grad_(False), place, manifest, weights)

    @property
    def config(self) -> Config:
        """Of the run."""
        return config_from_dict(self.manifest["config"])

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by class id."""
        return self.manifest["class_names"]

    @property
    def image_size(self) -> int:
        """Height and width of what the model was trained on."""
        return self.manifest["image_size"]

    @property
    def stored_size(self) -> int:
        """Height and width of images whose centre is `image_size`; see `classification.evaluation_crop`."""
        return round(self.image_size / self.config.classification.evaluation_crop)

    @property
    def channels(self) -> int:
        """1 for greyscale, 3 for RGB."""
        return self.manifest["model"]["in_channels"]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def batches(self, images: ImageSet) -> ClassifiedBatches:
        """Return images of a set as this model reads them."""
        config = self.config
        return ClassifiedBatches(images, Augmentation(config.classification, self.image_size, config.seed))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return logits, float32 [B, K], of normalised inputs [B, C, H, W]; see `ClassifiedBatches.prepared`."""
        return self._in_batch(self.model, inputs)

    def features(self, inputs: Tensor) -> Tensor:
        """Return what the last linear map sees, float32 [B, num_features], of normalised inputs [B, C, H, W]."""
        return self._in_batch(lambda images: penultimate(self.model, images), inputs)

    def features_and_logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last linear map sees and what it answers, of normalised inputs, in one pass."""
        features = self.features(inputs)
        return features, self.model.get_classifier()(features)  # type: ignore[operator]

    def prepare(self, images: Tensor) -> Tensor:
        """Return uint8 images [B, C, H, W] as inputs: the centred square of each, resized and normalised."""
        settings = self.config.classification
        return normalise(central(images, self.image_size, settings), settings)

    @torch.no_grad()
    def _in_batch(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return run(inputs.to(self.device)).float()

    def own_data(self) -> tuple[ImageSet, ImageSet | None]:
        """Open the training and validation images of the run; raises UserError if they are no longer there."""
        data = self.config.data
        return load_splits(data.name, data.path, data.image_size, data.validation_fraction)

    def check_classes(self, images: ImageSet) -> np.ndarray:
        """Return the model's class id of each class of a set, by name; raises UserError for an unknown one."""
        ids = {name: number for number, name in enumerate(self.class_names)}
        unknown = [name for name in images.class_names if name not in ids]
        if unknown:
            raise UserError(
                f"'{images.name}' has the class '{unknown[0]}', which {self.checkpoint} does not know; it knows "
                f"{', '.join(self.class_names[:10])}{', …' if len(self.class_names) > 10 else ''}"
            )
        return np.array([ids[name] for name in images.class_names])
