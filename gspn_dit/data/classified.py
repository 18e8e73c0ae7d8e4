"""Batches for a classifier: images as they are stored, augmented by sample number, and labels that may be mixtures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit import rng
from gspn_dit.config import Config
from gspn_dit.data.augment import Augmentation, central, normalise
from gspn_dit.data.batches import CACHE_BYTES
from gspn_dit.data.build import fingerprint
from gspn_dit.data.decoding import as_pixels, decode_image, place_of
from gspn_dit.data.images import ImageSet, load_splits
from gspn_dit.data.mixing import mix, partner, soft_labels
from gspn_dit.data.sources import find_source
from gspn_dit.errors import LocalUserError, UserError


@dataclass(frozen=True)
class ClassifiedBatches:
    """Inputs and labels of a classifier; a training batch is a function of (seed, sample numbers)."""

    images: ImageSet
    augmentation: Augmentation

    @cached_property
    def _cached(self) -> Tensor | None:
        """All images, uint8 [n, C, H, W], where they share their size and are few."""
        images = self.images
        if images.crop or len(images) * images.image_size**2 * images.channels > CACHE_BYTES:
            return None
        return torch.from_numpy(images.pixels()).permute(0, 3, 1, 2).contiguous()

    def decode_small_set(self) -> None:
        """Decode a set that is kept in memory now; raises LocalUserError for an image that cannot be read."""
        _ = self._cached

    def whole(self, rows: Sequence[int] | np.ndarray) -> list[Tensor]:
        """Return images as they are stored, uint8 [C, H, W], by row; nothing is cropped.

        Raises LocalUserError for one that cannot be read, or has another size where all share one.
        """
        images, cached = self.images, self._cached
        if cached is not None:
            return list(cached[torch.as_tensor(np.asarray(rows, dtype=np.int64))])
        if not images.crop:
            return list(torch.from_numpy(images.pixels(rows)).permute(0, 3, 1, 2))
        found = []
        for row, cell in zip(rows, images.cells(rows), strict=True):
            place = place_of(cell, int(row))
            source = (cell or {}).get("bytes") or (cell or {}).get("path")
            if not source:
                raise LocalUserError(f"cannot read the image {place}: the cell is empty")
            pixels = as_pixels(decode_image(source, place, images.channels))
            found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        return found

    def augmented(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return augmented images float32 [B, C, H, W] and labels int64 [B] of sample numbers, before any mixing."""
        rows = rng.data_indices(self.augmentation.seed, numbers, len(self.images))
        return self.augmentation(self.whole(rows), numbers), torch.from_numpy(self.images.labels[rows])

    def shuffled(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, C, H, W] and labels float32 [B, K], which sum to 1, of sample numbers."""
        settings, seed, classes = self.augmentation.settings, self.augmentation.seed, self.images.num_classes
        if not settings.mixes:
            images, labels = self.augmented(numbers)
            return images, F.one_hot(labels, classes).float()
        needed = sorted({*numbers, *(partner(number) for number in numbers)})
        place = {number: row for row, number in enumerate(needed)}
        images, labels = self.augmented(needed)
        own, others = ([place[number] for number in of] for of in (numbers, [partner(n) for n in numbers]))
        mixed, weight = mix(settings, seed, numbers, images[own], images[others])
        return mixed, soft_labels(labels[own], labels[others], weight, classes)

    def at(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, C, H, W] and labels int64 [B] by index, as they are evaluated."""
        chosen = np.asarray(indices, dtype=np.int64)
        return self.prepared(self.whole(chosen)), torch.from_numpy(self.images.labels[chosen])

    def prepared(self, images: Sequence[Tensor]) -> Tensor:
        """Return uint8 images [C, H, W] as inputs float32 [B, C, H, W]: centred squares, normalised."""
        settings, size = self.augmentation.settings, self.augmentation.size
        return normalise(torch.stack([central(image, size, settings) for image in images]), settings)

    def shown(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the centred squares as a person sees them, uint8 [B, H, W, C]."""
        settings, size = self.augmentation.settings, self.augmentation.size
        squares = torch.stack([central(image, size, settings) for image in self.whole(indices)])
        return squares.permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class ClassifiedData:
    """What the sections `data` and `classification` of a config stand for."""

    training: ClassifiedBatches
    validation: ClassifiedBatches | None
    """None if the source has no validation split and `data.validation_fraction` is 0."""
    fingerprint: str


def build_classified(config: Config) -> ClassifiedData:
    """Open what a config names; raises UserError for whatever does not exist or does not fit."""
    data, settings = config.data, config.classification
    check_stored(config)
    training, held_out = load_splits(data.name, data.path, data.image_size, data.validation_fraction)
    for name in ("mean", "std"):
        given = getattr(settings, name)
        if len(given) not in (1, training.channels):
            raise UserError(
                f"classification.{name} has {len(given)} numbers, but the images of '{training.name}' have "
                f"{training.channels} channel; give one number"
            )
    augmentation = Augmentation(settings, training.image_size, config.seed, data.horizontal_flip)
    batches = ClassifiedBatches(training, augmentation)
    validation = None
    if held_out is not None:
        held_out = dataclasses.replace(held_out, channels=training.channels)
        validation = ClassifiedBatches(held_out, augmentation)
    try:  # every process decodes the same images before anything is written, so one of them tells
        for part in filter(None, (batches, validation)):
            part.decode_small_set()
        return ClassifiedData(batches, validation, fingerprint(training))
    except LocalUserError as error:
        raise UserError(str(error)) from None


def check_stored(config: Config) -> None:
    """Raise UserError for data that task classification cannot read."""
    data = config.data
    if find_source(data.name).images is None:
        raise UserError(f"data.name {data.name} holds no images, which task classification reads; give the images")
    if data.streaming:
        raise UserError("data.streaming does not go with task classification; leave it out")
    if config.latent.name != "identity":
        raise UserError(f"latent.name {config.latent.name} does not go with task classification; leave it out")
