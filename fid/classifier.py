"""Small classifiers whose penultimate features a bundled score is computed on, and their file format.

A file is safetensors with one metadata entry, a JSON document; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.errors import UserError, nearest
from gspn_dit.files import write_whole

FORMAT_VERSION = 1
METADATA_KEY = "feature_net"
FEATURE_DIM = 64
LAST_GRID = 4  # convolutions halve the image until its side is at most this
LIMITS = {"image_size": 1024, "channels": 3, "feature_dim": 4096, "width": 1024}


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier is and where it comes from: the metadata of its file."""

    architecture: str
    """A key of `ARCHITECTURES`."""
    data_set: str
    """Name of the training data; scores are called FD-<data set>."""
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    seed: int
    width: int = 32
    """Channels of the first layer."""
    feature_dim: int = FEATURE_DIM
    validation_accuracy: float | None = None
    """Share of the held-out images it classifies correctly."""
    training_images: int = 0
    format_version: int = FORMAT_VERSION


class ResidualConv(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return images + self.layers(images)


def conv_body(info: ClassifierInfo) -> nn.Sequential:
    """Residual convolutions, halving the image down to at most 4×4, then one linear layer to the features."""
    width, size = info.width, info.image_size
    layers: list[nn.Module] = [nn.Conv2d(info.channels, width, 3, padding=1), ResidualConv(width)]
    while size > LAST_GRID:
        wider = min(2 * width, 2 * info.width)
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), ResidualConv(wider)]
        width, size = wider, (size + 1) // 2
    layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(width * size * size, info.feature_dim))


def plain_body(info: ClassifierInfo) -> nn.Sequential:
    """Pairs of convolutions with ReLU and max pooling, no skips, no normalisation: a second opinion on `conv_body`."""
    inputs, width, size = info.channels, info.width, info.image_size
    layers: list[nn.Module] = []
    while True:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        if size <= LAST_GRID:
            break
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        inputs, width, size = width, min(2 * width, 2 * info.width), (size + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(width * size * size, info.feature_dim))


ARCHITECTURES = {"conv": conv_body, "plain": plain_body}


class Classifier(nn.Module):
    """A classifier with standardised penultimate features.

    The features are the last linear layer's output before its nonlinearity, minus the training split's mean, divided
    by its standard deviation: without that a Fréchet distance is ruled by the few dimensions of large variance.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, info: ClassifierInfo) -> None:
        super().__init__()
        self.info = info
        self.body = ARCHITECTURES[info.architecture](info)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(info.feature_dim, len(info.class_names)))
        self.register_buffer("feature_mean", torch.zeros(info.feature_dim))
        self.register_buffer("feature_std", torch.ones(info.feature_dim))

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features as they are, [B, feature_dim]; images float [B, C, H, W] in 0…1."""
        return self.body(2.0 * images - 1.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features [B, feature_dim] and logits [B, classes] of images float [B, C, H, W] in 0…1."""
        features = self.embed(images)
        return (features - self.feature_mean) / self.feature_std, self.head(features)


def save_classifier(model: Classifier, info: ClassifierInfo, path: str | os.PathLike[str]) -> None:
    """Write weights and `info` as one safetensors file, through a temporary file beside it."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = save(tensors, metadata={METADATA_KEY: json.dumps(asdict(info), sort_keys=True)})
    write_whole(Path(path), content)


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """Read a classifier that `save_classifier` wrote, in evaluation mode on the CPU.

    Raises:
        UserError: the file is missing, or is something else, or does not fit together.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"no feature extractor at {path}: there is no such file")
    advice = "a feature extractor is a safetensors file that `python -m fid.train_features` wrote"
    try:
        with safe_open(str(path), framework="pt") as file:
            document = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors; {advice}") from error
    if document is None:
        raise UserError(f"{path} has no '{METADATA_KEY}' metadata; {advice}")
    info = _parse_info(document, path)
    model = Classifier(info)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise UserError(f"the tensors in {path} do not fit its metadata; {advice}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"the weights in {path} are not finite")
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def _parse_info(document: str, path: str | os.PathLike[str]) -> ClassifierInfo:
    try:
        fields: dict[str, Any] = dict(json.loads(document))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format_version {version}; this version reads {FORMAT_VERSION}")
        fields["class_names"] = tuple(str(name) for name in fields["class_names"])
        info = ClassifierInfo(**fields)
        sizes = {name: int(getattr(info, name)) for name in LIMITS}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the metadata of {path} is not that of a feature extractor") from error
    if info.architecture not in ARCHITECTURES:
        hint = nearest(str(info.architecture), ARCHITECTURES)
        raise UserError(
            f"{path}: unknown architecture '{info.architecture}'; allowed are {', '.join(ARCHITECTURES)}{hint}"
        )
    bad = [name for name, value in sizes.items() if not 1 <= value <= LIMITS[name]]
    if bad or not info.class_names or not re.fullmatch(r"[\w.-]{1,64}", str(info.data_set)):
        raise UserError(f"the metadata of {path} is out of range: {', '.join(bad) or 'class_names, data_set'}")
    return info
