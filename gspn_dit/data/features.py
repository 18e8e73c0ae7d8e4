"""Features of training images for alignment: a .npy of one's own, or shards of `gspn_dit.prepare.features`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from gspn_dit.data.image_sources import split_rows
from gspn_dit.data.latent_shards import LatentSet, open_shards
from gspn_dit.errors import UserError

KEY = "training.repa_features"


class Features(ABC):
    """A feature vector for each token of each training image."""

    dimensions: int
    mirrored: bool
    """Whether those of the mirrored images are there, too."""

    @abstractmethod
    def rows(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Return features float32 [n, tokens, dimensions], tokens row by row, of training images by index.

        flips, bool [n], tells whose mirrored image is meant.
        """


class ArrayFeatures(Features):
    """Of a .npy file [images, tokens, dimensions], mapped and not read."""

    mirrored = False

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dimensions = array, array.shape[2]

    def rows(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        assert not flips.any()
        return self.array[indices].astype(np.float32)


class ShardFeatures(Features):
    """Of a directory that `gspn_dit.prepare.features` wrote; `items` are the training images' places in it."""

    mirrored = True

    def __init__(self, shards: LatentSet, items: np.ndarray, dimensions: int) -> None:
        self.shards, self.items, self.dimensions = shards, items, dimensions

    def rows(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        planes = self.shards.moments(self.items[indices], flips)  # [n, D, h, w]
        return planes.reshape(*planes.shape[:2], -1).transpose(0, 2, 1).astype(np.float32)


def open_features(path: str, grid: int, labels: np.ndarray, validation_fraction: float) -> Features:
    """Open features of training images.

    Args:
        path: a .npy file or a directory.
        grid: rows and columns of tokens of an image.
        labels: class ids of the training images in their order, int64 [n], by which other images are noticed.
        validation_fraction: `data.validation_fraction`: where the features are of a whole set, which is split then.

    Raises:
        UserError: there are none, or they do not fit.
    """
    if Path(path).is_dir():
        return _of_shards(Path(path), grid, labels, validation_fraction)
    return ArrayFeatures(load_array(path, grid**2, len(labels)))


def load_array(path: str, tokens: int, images: int) -> np.ndarray:
    """Map a .npy of features [images, tokens, dimensions]; raises UserError if it does not fit."""
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY} {path} cannot be read: {error}") from None
    if not isinstance(features, np.ndarray) or features.dtype.kind != "f":
        raise UserError(f"{KEY} {path} holds no floating-point array; save one with numpy.save")
    if features.ndim != 3 or features.shape[:2] != (images, tokens):
        raise UserError(
            f"{KEY} {path} has shape {list(features.shape)}, but {images} training images of {tokens} "
            f"tokens need [{images}, {tokens}, dimensions]"
        )
    return features


def _of_shards(directory: Path, grid: int, labels: np.ndarray, fraction: float) -> Features:
    shards = open_shards(directory)
    if "features" not in shards.manifest:
        raise UserError(f"{KEY} {directory} holds latents, not features; write them with gspn_dit.prepare.features")
    spec = shards.manifest["features"]
    if spec["grid"] != grid:
        raise UserError(
            f"{KEY} {directory} has {spec['grid']}x{spec['grid']} features an image, but the model {grid}x{grid} "
            f"tokens; extract them with --grid {grid}"
        )
    items = np.arange(len(shards))
    if len(items) != len(labels) and fraction > 0:
        items = split_rows(shards.labels, "train", fraction, f"set of features {directory}")
    if not np.array_equal(shards.labels[items], labels):
        raise UserError(
            f"{KEY} {directory} is of {len(shards):,} other images than the {len(labels):,} of this training; extract "
            "features of its --source, of --split train"
        )
    return ShardFeatures(shards, items, spec["dimensions"])
