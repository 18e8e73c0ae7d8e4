"""Whether images show their captions: which caption of a set a linear map of an image's features comes nearest to.

The map is a ridge regression from features of real images to vectors of their captions. Both may come from any
encoders; the score depends on them, on the real images and on the captions to choose among. It is no CLIP score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1.0


@dataclass(frozen=True)
class CaptionMap:
    """A ridge regression from the directions of centred features to vectors of captions."""

    mean: Tensor
    """Of the features it was fitted on, float [d]."""
    weights: Tensor
    """float [d + 1, width]; the last row is the constant."""

    @classmethod
    def fit(cls, features: Tensor, vectors: Tensor, ridge: float = RIDGE) -> CaptionMap:
        """Fit to real images.

        Args:
            features: of the images, [n, d].
            vectors: of their captions, [n, width].
            ridge: weight of the squared coefficients, > 0, beside the sum of squared errors.
        """
        mean = features.mean(dim=0)
        inputs = _inputs(features, mean)
        gram = inputs.T @ inputs + ridge * torch.eye(inputs.shape[1], dtype=inputs.dtype)
        return cls(mean, torch.linalg.solve(gram, inputs.T @ vectors))

    def __call__(self, features: Tensor) -> Tensor:
        """Return the predicted vectors, of length 1, [n, width]."""
        return F.normalize(_inputs(features, self.mean) @ self.weights, dim=-1)


def _inputs(features: Tensor, mean: Tensor) -> Tensor:
    return F.pad(F.normalize(features - mean, dim=-1), (0, 1), value=1.0)


def retrieved(predicted: Tensor, vectors: Tensor, captions: Sequence[str], among: int = 1) -> np.ndarray:
    """Return whether an image's own caption is among so many that are nearest to it, bool [n]; the mean is R@among.

    Args:
        predicted: vectors of the images, [n, width].
        vectors: of the captions, in the same order, [n, width]; captions that occur twice are one to choose.
        captions: what each image was drawn for.
        among: 1 for the nearest alone; at most the number of distinct captions.
    """
    distinct = {caption: place for place, caption in enumerate(captions)}
    similar = predicted @ F.normalize(vectors[list(distinct.values())], dim=-1).T
    columns = {caption: column for column, caption in enumerate(distinct)}
    own = torch.tensor([columns[caption] for caption in captions])
    return (similar.topk(among, dim=1).indices == own[:, None]).any(dim=1).numpy()
