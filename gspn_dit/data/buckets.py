"""Images of several sizes in one training: each belongs to the bucket whose aspect is nearest to its own.

An epoch's order is a function of (seed, epoch) and of the images' buckets alone, so batches, processes and restarts
change nothing, and every image is seen once. Images of a bucket follow each other in runs, so that a batch is few
passes of one size each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.data.batches import CACHE_BYTES, draw_flips, draw_posterior, mirror
from gspn_dit.data.decoding import read_cell_header
from gspn_dit.data.images import DECODE_CHUNK, ImageSet
from gspn_dit.data.latents import Latent
from gspn_dit.errors import UserError

RUN = 32
"""Images of one bucket that follow each other."""

Size = tuple[int, int]
"""Height and width in pixels."""


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Return the bucket of each image, int64 [n]: the one of the nearest ratio of width to height.

    Where buckets of one aspect are as near, images are theirs in turn: so a training has several sizes of squares.

    Args:
        sizes: width and height of the images, [n, 2].
        buckets: height and width of each.
    """
    aspects = np.log(sizes[:, 0] / sizes[:, 1])
    of_buckets = np.log([width / height for height, width in buckets])
    nearest = np.abs(aspects[:, None] - of_buckets).argmin(axis=1)
    alike = [np.flatnonzero(np.isclose(of_buckets, aspect)) for aspect in of_buckets]
    return np.array([alike[bucket][number % len(alike[bucket])] for number, bucket in enumerate(nearest)], np.int64)


def in_runs(order: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Return an order of images in which those of a bucket are drawn together to runs of RUN; int64 [n].

    A run stands where its first image stood, so runs of all buckets are shuffled as the images were.
    """
    of_order, starts = buckets[order], np.empty_like(order)
    for bucket in np.unique(of_order):
        places = np.flatnonzero(of_order == bucket)
        starts[places] = places[np.arange(len(places)) // RUN * RUN]
    return order[np.argsort(starts, kind="stable")]


class BucketBatches:
    """Latents and labels of images of several sizes, by sample number; a call is for numbers of one size, see `parts`.

    Args:
        images: the set, whose own size is that of squares.
        latent: of the images.
        seed: of the run.
        sizes: height and width of each bucket in pixels.
        horizontal_flip: mirror half of the training images.

    Raises:
        UserError: the latent does not go with one of the sizes, or an image's header cannot be read.
    """

    def __init__(
        self, images: ImageSet, latent: Latent, seed: int, sizes: Sequence[Size], horizontal_flip: bool = False
    ) -> None:
        _check_latent(latent, sizes)
        self.images, self.latent, self.seed, self.horizontal_flip = images, latent, seed, horizontal_flip
        self.sizes = tuple(sizes)
        self.buckets = nearest_buckets(_read_sizes(images), self.sizes)
        """Of each image, int64 [n]."""
        self._order = functools.lru_cache(maxsize=2)(self._order_of)  # a batch can span two epochs

    def _order_of(self, epoch: int) -> np.ndarray:
        return in_runs(rng.permutation(self.seed, epoch, len(self.images)), self.buckets)

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """Return the image of each sample number, int64: each image once in an epoch."""
        return rng.data_indices(self.seed, numbers, len(self.images), self._order)

    def parts(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers of a batch by size, each as an argument of `shuffled`."""
        return self._by_bucket(numbers, self.rows(numbers))

    def parts_at(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the indices of images by size, each as an argument of `at`."""
        return self._by_bucket(indices, np.asarray(indices))

    def _by_bucket(self, numbers: Sequence[int], rows: np.ndarray) -> list[list[int]]:
        found, given = self.buckets[rows], np.asarray(numbers)
        return [given[found == bucket].tolist() for bucket in np.unique(found)]

    def shuffled(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents float32 [B, C, H, W] and labels int64 [B] for sample numbers whose images share a size."""
        flips = draw_flips(self.seed, numbers, self.horizontal_flip)
        return self._encode(self.rows(numbers), flips, rng.Stream.POSTERIOR, numbers)

    def at(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents and labels of images of one size by index, without augmentation."""
        flips = np.zeros(len(indices), dtype=bool)
        return self._encode(np.asarray(indices), flips, rng.Stream.VALIDATION_POSTERIOR, indices)

    def _encode(
        self, rows: np.ndarray, flips: np.ndarray, stream: rng.Stream, numbers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        (bucket,) = np.unique(self.buckets[rows])
        height, width = (side // self.latent.factor for side in self.sizes[bucket])
        noise = draw_posterior(self.latent, self.seed, stream, numbers, (height, width))
        pixels, labels = self.load(rows)
        return self.latent.encode(mirror(pixels, flips), noise), labels

    # -- pixels --------------------------------------------------------------------------------------------------

    def load(self, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return pixels uint8 [B, H, W, C] and labels int64 [B] of images of one size by index."""
        (bucket,) = np.unique(self.buckets[rows])
        cached = self._cached_pixels
        pixels = self.images.pixels(rows, self.sizes[bucket]) if cached is None else cached[bucket][self._places[rows]]
        return pixels, torch.from_numpy(self.images.labels[rows])

    @functools.cached_property
    def _cached_pixels(self) -> list[np.ndarray] | None:
        """The decoded images of each bucket, where all of them fit the cache."""
        counts = np.bincount(self.buckets, minlength=len(self.sizes))
        pixels = sum(int(count) * height * width for count, (height, width) in zip(counts, self.sizes, strict=True))
        if pixels * self.images.channels > CACHE_BYTES:
            return None
        return [self.images.pixels(np.flatnonzero(self.buckets == b), size) for b, size in enumerate(self.sizes)]

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """The place of each image among those of its bucket, int64 [n]."""
        places = np.empty(len(self.buckets), dtype=np.int64)
        for bucket in range(len(self.sizes)):
            own = np.flatnonzero(self.buckets == bucket)
            places[own] = np.arange(len(own))
        return places

    def decode_small_set(self) -> None:
        """Decode a set that fits the cache now; raises LocalUserError for an image that cannot be read."""
        _ = self._cached_pixels

    def describe(self) -> str:
        """Return how many images each size has, in words."""
        counts = np.bincount(self.buckets, minlength=len(self.sizes))
        return ", ".join(f"{height}x{width} ({count:,})" for (height, width), count in zip(self.sizes, counts))


def _check_latent(latent: Latent, sizes: Sequence[Size]) -> None:
    if latent.takes_one_size:
        place = latent.spec()["vae"]
        raise UserError(f"data.buckets: {place} takes images of {latent.image_size} pixels alone; leave them out")
    for height, width in sizes:
        if height % latent.factor or width % latent.factor:
            raise UserError(f"data.buckets: {height}x{width} is not divisible by the autoencoder's {latent.factor}")


def _read_sizes(images: ImageSet) -> np.ndarray:
    """Return width and height of every image, [n, 2], from their headers."""
    sizes = np.empty((len(images), 2))
    for start in range(0, len(images), DECODE_CHUNK):
        rows = np.arange(start, min(start + DECODE_CHUNK, len(images)))
        for row, cell in zip(rows, images.cells(rows), strict=True):
            sizes[row], _ = read_cell_header(cell, int(row))
    return sizes
