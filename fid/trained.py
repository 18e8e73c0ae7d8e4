"""A run of task classification as a feature extractor: the one place where evaluation opens a model.

It sees a classifier as a function of images, `gspn_dit.classifier.ImageClassifier`, and knows no architecture.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from torch import Tensor
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fid.extractor import LayeredExtractor
from gspn_dit.classifier import ImageClassifier

LAYERS = ("features", "logits")
EXTRACTOR_NAME = "gspn-dit-trained"
WEIGHTS = "ema"


class TrainedExtractor(LayeredExtractor):
    """What a trained classifier's last map sees, "features", and its "logits", of uint8 [B, C, H, W]."""

    layers = LAYERS

    def __init__(self, name: str, features_list: list[str], classifier: ImageClassifier, **_: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = classifier
        self.model = classifier.model  # moves with the extractor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(LAYERS, self.classifier.features_and_logits(self.classifier.prepare(images)), strict=True))
        return tuple(found[layer] for layer in self.features_list)


def create_extractor(classifier: ImageClassifier) -> FeatureExtractorBase:
    """Return torch-fidelity's extractor of a classifier."""
    if EXTRACTOR_NAME not in registry.FEATURE_EXTRACTORS_REGISTRY:  # a second registration raises
        registry.register_feature_extractor(EXTRACTOR_NAME, TrainedExtractor)
    return create_feature_extractor(EXTRACTOR_NAME, list(LAYERS), cuda=False, verbose=False, classifier=classifier)


def facts_of_run(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of `fid.features.FeatureNet` for a run directory, or a checkpoint of it.

    Raises:
        UserError: there is no checkpoint, or it is not of task classification.
    """
    classifier = ImageClassifier.from_checkpoint(run, WEIGHTS)
    manifest = classifier.manifest
    weights = classifier.checkpoint / f"{WEIGHTS}.safetensors"
    return {
        "extractor": create_extractor(classifier),
        "score_suffix": re.sub(r"[^\w.-]", "-", manifest["data"]["name"])[:64],
        "source": str(run),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "image_size": classifier.stored_size,
        "channels": classifier.channels,
        "feature_dim": classifier.model.num_features,
        "class_names": tuple(classifier.class_names),
        "description": {
            "architecture": manifest["model"]["name"],
            "step": manifest["step"],
            "weights": WEIGHTS,
            "training_seed": classifier.config.seed,
            "training_images": manifest["data"]["images"],
        },
    }
