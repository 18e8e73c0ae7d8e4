"""Feature nets: what a net expects and is called, its torch-fidelity extractor, and features of images."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fid.classifier import Classifier, load_classifier
from fid.extractor import LayeredExtractor
from fid.unverified import SHA256 as UNVERIFIED_SHA256
from fid.unverified import SUFFIX as UNVERIFIED
from gspn_dit.errors import UserError, nearest

BUNDLED = {"digits": Path(__file__).with_name("weights") / "digits.safetensors"}
LAYERS = ("features", "logits")
EXTRACTOR_NAME = "gspn-dit-classifier"


class ClassifierExtractor(LayeredExtractor):
    """A `Classifier` as a torch-fidelity extractor: standardised "features" and "logits" of uint8 [B, C, H, W]."""

    layers = LAYERS

    def __init__(self, name: str, features_list: list[str], classifier: Classifier, **_: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(LAYERS, self.classifier(images.float() / 255.0)))
        return tuple(found[layer] for layer in self.features_list)


@dataclass(frozen=True)
class FeatureNet:
    """A feature extractor with all that a report says about it; another protocol adds another loader of these."""

    extractor: FeatureExtractorBase
    """Maps uint8 [B, C, H, W] to layers: "features", mostly "logits", perhaps "spatial"."""
    score_suffix: str
    """The data set that the feature extractor knows; scores are named FD-<score_suffix>, and FID where it is empty."""
    source: str
    """The bundled net's name, or the file."""
    sha256: str
    """Of the weights file."""
    image_size: int | None
    """The one size that it reads; None: any."""
    channels: int
    """3 where greyscale images are repeated if `image_size` is None."""
    feature_dim: int
    class_names: tuple[str, ...]
    description: dict[str, Any]
    """Further facts for the report."""

    @property
    def layers(self) -> list[str]:
        """The layers that the extractor returns, in its order."""
        return list(self.extractor.get_requested_features_list())

    @property
    def names(self) -> dict[str, str]:
        """What the scores on this net are called: FID, sFID, IS and KID on the published Inception net alone."""
        inception = {"fd": "FID", "sfd": "sFID", "is": "IS", "kid": "KID"}
        if not self.score_suffix:
            return inception
        if self.score_suffix == UNVERIFIED:
            return {key: f"{name}-{UNVERIFIED}" for key, name in inception.items()}
        return {key: f"{key.upper().replace('SFD', 'sFD')}-{self.score_suffix}" for key in ("fd", "sfd", "is", "kid")}


def load_feature_net(source: str | os.PathLike[str] = "digits") -> FeatureNet:
    """The bundled net of that name, one from a file that `python -m fid.train_features` wrote, or a trained classifier.

    Args:
        source: a bundled name, a file, or a run directory or checkpoint of task classification.

    Raises:
        UserError: no such net, or the file or run is something else.
    """
    name = str(source)
    if name not in BUNDLED and Path(source).is_dir():
        from fid.trained import facts_of_run

        return FeatureNet(**facts_of_run(source))
    path = BUNDLED.get(name, Path(source))
    if not path.is_file():
        known = ", ".join(f"'{bundled}'" for bundled in BUNDLED)
        raise UserError(
            f"no feature extractor '{name}': it is neither a file, nor a run of task classification, nor a bundled net "
            f"({known}){nearest(name, BUNDLED)}"
        )
    classifier = load_classifier(path)
    info = classifier.info
    return FeatureNet(
        extractor=_create_extractor(classifier),
        score_suffix=info.data_set,
        source=name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        image_size=info.image_size,
        channels=info.channels,
        feature_dim=info.feature_dim,
        class_names=info.class_names,
        description={
            "architecture": info.architecture,
            "training_seed": info.seed,
            "training_images": info.training_images,
            "validation_accuracy": info.validation_accuracy,
        },
    )


def load_inception(
    weights: str | os.PathLike[str] | None = None, allow_unknown: bool = False, resize: str = "tensorflow"
) -> FeatureNet:
    """The Inception net from a file, or from torch-fidelity's usual place; see `fid.inception`, `Protocol.resize`.

    Raises:
        UserError: no file, not the published one without `allow_unknown`, or something else.
    """
    from fid.inception import FEATURE_DIM, RESIZES, WEIGHTS_SHA256, create_extractor, find_weights, read_weights

    path = find_weights(weights)
    state, sha256 = read_weights(path, allow_unknown)
    suffix = {WEIGHTS_SHA256: "", UNVERIFIED_SHA256: UNVERIFIED}.get(sha256, "unknown")
    return FeatureNet(
        extractor=create_extractor(state, path, resize, with_logits=suffix != UNVERIFIED),
        score_suffix=suffix,
        source="Inception 2015-12-05" if not suffix else path.name if suffix == UNVERIFIED else str(path),
        sha256=sha256,
        image_size=None,
        channels=3,
        feature_dim=FEATURE_DIM,
        class_names=(),
        description={"resize": RESIZES[resize], "logits": "without bias", "dtype": "float32"},
    )


def load_dinov2(directory: str | os.PathLike[str]) -> FeatureNet:
    """DINOv2 from a local directory; see `fid.dinov2`. Only ViT-L/14 gives what is published as FD-DINOv2."""
    from fid.dinov2 import LARGE, create_extractor, read_directory

    net, sha256 = read_directory(directory)
    config = net.config
    large = (config.hidden_size, config.num_hidden_layers, config.patch_size) == LARGE
    return FeatureNet(
        extractor=create_extractor(net),
        score_suffix="DINOv2" if large else f"DINOv2-{config.hidden_size}x{config.num_hidden_layers}",
        source=str(directory),
        sha256=sha256,
        image_size=None,
        channels=3,
        feature_dim=config.hidden_size,
        class_names=(),
        description={"resize": "bicubic with antialiasing, to 224", "dtype": "float32"},
    )


def _create_extractor(classifier: Classifier) -> FeatureExtractorBase:
    if EXTRACTOR_NAME not in registry.FEATURE_EXTRACTORS_REGISTRY:  # a second registration raises
        registry.register_feature_extractor(EXTRACTOR_NAME, ClassifierExtractor)
    return create_feature_extractor(EXTRACTOR_NAME, list(LAYERS), cuda=False, verbose=False, classifier=classifier)


def resolve_device(device: str) -> torch.device:
    """The torch device of that name, if this machine has it."""
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{device}' cannot be used here: {reason}") from error
    return resolved
