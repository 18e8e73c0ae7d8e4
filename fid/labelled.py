"""A set of images with what is known of each; a large one is never in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fid.npz import IN_MEMORY_BYTES

HASH_CHUNK = 1024


def interleave(labels: np.ndarray | None, count: int) -> np.ndarray:
    """The order first of every class, second of every class, …, or 0…count-1 without labels.

    Samples are often stored class by class. The Inception score is averaged over consecutive splits, and a split that
    holds one class alone scores 1 whatever the images look like; the first n of a class-ordered set are no sample of
    its distribution either. In the interleaved order every consecutive run is as balanced as the set.

    >>> interleave(np.array([5, 5, 5, 2, 2]), 5).tolist()
    [3, 0, 4, 1, 2]
    """
    if labels is None:
        return np.arange(count)
    rank = np.empty(count, dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))


class LazyPixels:
    """Images uint8 [n, H, W, C] that are decoded when a slice or an array of row numbers asks for them."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int, int]) -> None:
        self.read, self.shape = read, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.read(np.arange(len(self))[rows])


def decoded_if_small(pixels: LazyPixels) -> np.ndarray | LazyPixels:
    """Small sets are decoded once and kept; larger ones are decoded on demand."""
    return pixels[:] if np.prod(pixels.shape, dtype=np.int64) <= IN_MEMORY_BYTES else pixels


def image_digests(pixels: np.ndarray) -> np.ndarray:
    """The SHA-256 of every image, uint8 [n, 32]."""
    digests = b"".join(hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in pixels)
    return np.frombuffer(digests, np.uint8).reshape(len(pixels), 32)


@dataclass(frozen=True)
class LabelledImages:
    """A set of images of one size, with class ids where they are known."""

    pixels: np.ndarray | LazyPixels
    """uint8 [n, H, W, C], C = 1 or 3."""
    source: str
    """Where the images come from, for the report."""
    labels: np.ndarray | None = None
    """Class ids, int64 [n]."""
    class_names: tuple[str, ...] | None = None
    """Names by class id, where the source names its classes."""
    generation: dict[str, Any] | None = None
    """How the images were generated: the content of `generation.json`, where there is one."""
    captions: tuple[str, ...] | None = None
    """What each image was drawn for or shows, where `metadata.jsonl` says so."""
    remarks: str = ""
    """What a person should know of them: what their place holds besides."""

    def __len__(self) -> int:
        return len(self.pixels)

    def describe(self) -> str:
        """Return in one line what they are, and what lies beside them."""
        _, height, width, channels = self.pixels.shape
        classes = "without labels" if self.labels is None else f"of {len(np.unique(self.labels)):,} classes"
        text = f"{self.source}: {len(self):,} images {classes}, {width}x{height} {'grey' if channels == 1 else 'RGB'}"
        return f"{text}; {self.remarks}" if self.remarks else text

    @cached_property
    def sha256(self) -> str:
        """Hash of shape, pixels and labels, whatever file they came in."""
        starts = range(0, len(self), HASH_CHUNK)
        parts = [image_digests(self.pixels[start : start + HASH_CHUNK]) for start in starts]
        return self.hash_of(np.concatenate(parts))

    def hash_of(self, digests: np.ndarray) -> str:
        """`sha256` from the images' own digests, [n, 32], which several processes may have computed."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(np.ascontiguousarray(digests).data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """Real images: those to compare with, and those that no one trained on."""

    images: LabelledImages
    held_out: LabelledImages | None = None
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Mean and covariance by layer ("features", "spatial") of the whole real set, where the file has them: those of
    the published Inception net, of more images than the file itself holds."""
