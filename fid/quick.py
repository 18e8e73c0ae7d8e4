"""The Fréchet distance that training watches: a feature extractor and a distance, handed in by `train.py`.

Training knows neither nets nor metrics, and this module knows no models: it sees images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gspn_dit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fid.features import FeatureNet

INCEPTION = "inception"


@dataclass(frozen=True)
class QuickScorer:
    """Features of images and the distance between two sets of them."""

    net: FeatureNet

    @property
    def name(self) -> str:
        """What the score is called, "FD-digits" for one."""
        return self.net.names["fd"]

    @property
    def feature_dim(self) -> int:
        return self.net.feature_dim

    def features(self, pixels: np.ndarray, device: str) -> Tensor:
        """Return features, float32 [n, feature_dim] on the CPU, of uint8 images [n, H, W, C]."""
        from fid.extraction import extract

        if pixels.shape[3] < self.net.channels:
            pixels = pixels.repeat(self.net.channels, axis=3)
        return extract(self.net, pixels, device=device).features

    def distance(self, features: Tensor, reference: Tensor) -> float:
        """Return the Fréchet distance of Gaussian fits to features [n, d] and [m, d]; raises UserError."""
        from fid.metrics import frechet_distance

        return frechet_distance(features, reference)


def load_scorer(
    source: str | None, data_name: str, image_size: int, channels: int, key: str = "training.fd_features"
) -> QuickScorer:
    """Return the scorer for images of a size.

    Args:
        source: a bundled net ("digits"), a file that `python -m fid.train_features` wrote, a run of task
            classification, "inception" (weights at torch-fidelity's usual place) or a file of its weights (.pth); None
            for the one bundled for the data.
        data_name: the data set's name.
        image_size: height and width of the images in pixels.
        channels: 1 or 3.
        key: what `source` was given by.

    Raises:
        UserError: there is no such net, or it reads other images.
    """
    from fid.features import BUNDLED, load_feature_net, load_inception

    if source is None and data_name not in BUNDLED:
        asking = "training.fd_every" if key == "training.fd_features" else "this"
        raise UserError(
            f"{asking} needs a feature extractor, and none is bundled for the data set '{data_name}'; give {key}: a "
            "file that python -m fid.train_features wrote, or inception"
        )
    source = data_name if source is None else source
    if source == INCEPTION or source.endswith(".pth"):
        net = load_inception(None if source == INCEPTION else source)
    else:
        net = load_feature_net(source)
    fits = net.image_size is None or (net.image_size, net.channels) == (image_size, channels)
    if not fits:
        raise UserError(
            f"{key} {source} reads images of {net.image_size} pixels with {net.channels} channels, "
            f"these have {image_size} with {channels}; give another net"
        )
    return QuickScorer(net)
