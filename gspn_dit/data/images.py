"""Labelled image sets: real images from a bundled set, a folder or a saved data set, decoded to uint8 arrays."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.data.decoding import BACKGROUND, GREY_MODES, decode_cell, read_cell_header
from gspn_dit.data.image_sources import split_rows
from gspn_dit.data.sources import image_sources
from gspn_dit.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation")
MAX_HEADERS = 20_000  # images whose headers are all read when a set is opened
SAMPLED_HEADERS = 1_000  # of a larger set this many, evenly spaced
DECODE_CHUNK = 256


def evenly_spaced(total: int, most: int) -> np.ndarray:
    """Return at most `most` of the rows 0 … total-1, evenly spaced and ascending, int64."""
    return np.linspace(0, total - 1, min(total, most)).astype(np.int64)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size; rows are decoded when `pixels` asks for them."""

    dataset: Dataset
    """Columns `image` (Image) and `label` (ClassLabel)."""
    name: str
    """The data set's name: "digits", or the name of its directory."""
    image_size: int
    """Height and width of the images in pixels, after cropping where `crop` is set."""
    channels: int
    """1 when every inspected image is greyscale, else 3 (RGB)."""
    crop: bool = False
    """Whether images of another size are centre-cropped and resized to `image_size`; else they are an error."""
    has_validation: bool = False
    """Whether the source comes with a validation split of its own."""
    remarks: tuple[str, ...] = ()
    """What a person should know of the set: what its place holds besides, and what is done to its images."""

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by class id."""
        return list(self.dataset.features["label"].names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class ids, [n] int64; no image is decoded."""
        return _labels(self.dataset)

    @cached_property
    def _undecoded(self) -> Dataset:
        return undecoded(self.dataset)

    def describe(self) -> str:
        """Return a line about the set, and one for each remark."""
        size = f"{self.image_size}x{self.image_size} {'grey' if self.channels == 1 else 'RGB'}"
        line = f"{self.name}: {len(self):,} images of {self.num_classes:,} classes, {size}"
        return "\n".join([line, *self.remarks])

    def pixels(
        self,
        indices: Sequence[int] | np.ndarray | None = None,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> np.ndarray:
        """Decode the rows `indices` (default: all).

        Args:
            indices: row numbers, [n].
            image_size: centre-crop and resize to this size, or height and width, instead of the set's own.
            channels: 1 (greyscale) or 3 (RGB) instead of the set's own.

        Returns:
            uint8 array [n, H, W, channels].

        Raises:
            LocalUserError: an image that cannot be read, or has another size than the set; names its file.
        """
        rows = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64).reshape(-1)
        size = image_size or self.image_size
        channels = channels or self.channels
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {channels}")
        crop = self.crop or image_size is not None
        height, width = (size, size) if isinstance(size, int) else size
        out = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        for start in range(0, len(rows), DECODE_CHUNK):
            chunk = rows[start : start + DECODE_CHUNK]
            for offset, cell in enumerate(self.cells(chunk)):
                out[start + offset], _ = decode_cell(cell, int(chunk[offset]), size, channels, crop)
        return out

    def cells(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any] | None]:
        """Return the undecoded images of rows, for `decode_cell`: {"bytes": …, "path": …}."""
        return self._undecoded[rows]["image"]


def load_images(
    name: str,
    path: str | os.PathLike[str] | None = None,
    split: str | None = "train",
    image_size: int | None = None,
    validation_fraction: float = 0.1,
    channels: int | None = None,
) -> ImageSet:
    """Open a labelled image set.

    Sets of at most 20,000 images are inspected completely (headers only); of a larger one 1,000 evenly spaced images
    decide size and channels, and an image of another size is found when it is decoded.

    Args:
        name: "digits" (bundled), "imagefolder" (`path/class/image`, or `path/train/class/image` with a held-out
            folder beside), or "hf" (a directory written by `save_to_disk`, or a name on the Hugging Face hub, the
            only one that is downloaded).
        path: the directory; not for "digits".
        split: "train", "validation", or None for all images.
        image_size: centre-crop and resize every image to this many pixels. None: all images must share one square
            size.
        validation_fraction: in (0, 0.5]; the share of images held out where the source has no split of its own
            (deterministic, stratified). 0: do not split, the training set is everything.
        channels: turn every image into 1 (greyscale) or 3 (RGB). None: by the images. With `image_size` and
            `channels` given nothing is left to find out, and no image is inspected.

    Raises:
        UserError: anything about the source that cannot be used, in one line.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"no split named '{split}'; allowed are 'train', 'validation' and None (all)")
    return _Opened.open(name, path, image_size, channels, every_part=split is None).choose(split, validation_fraction)


def load_splits(
    name: str, path: str | os.PathLike[str] | None, image_size: int | None, validation_fraction: float
) -> tuple[ImageSet, ImageSet | None]:
    """Open the training and the validation images of a set at once; see `load_images`.

    The latter are None where the source has no split of its own and `validation_fraction` is 0.
    """
    opened = _Opened.open(name, path, image_size, None, every_part=False)
    training = opened.choose("train", validation_fraction)
    held_out = training.has_validation or validation_fraction > 0
    return training, opened.choose("validation", validation_fraction) if held_out else None


@dataclass(frozen=True)
class _Opened:
    """A set whose parts were found, checked and inspected."""

    parts: dict[str, Dataset]
    whole: ImageSet
    """All of it."""

    @classmethod
    def open(
        cls,
        name: str,
        path: str | os.PathLike[str] | None,
        image_size: int | None,
        channels: int | None,
        every_part: bool,
    ) -> _Opened:
        known = image_sources()
        if name not in known:
            allowed = ", ".join(f"'{word}'" for word in known)
            raise UserError(f"no image set named '{name}'; allowed are {allowed}{nearest(name, known)}")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size must be at least 1, not {image_size}")
        read = known[name].images
        assert read is not None
        found = read(path)
        # A further part, such as a test set without labels, is not looked at.
        parts = dict(list(found.datasets.items())[: None if every_part else 2])
        label = name if not path else (Path(path).resolve().name or name)
        remarks = [f"left out: {found.left_out}"] if found.left_out else []
        check_parts(parts)
        crop = image_size is not None
        if image_size is None or channels is None:
            headers = read_headers(parts)
            image_size, channels = image_size or headers.common_size(label), channels or headers.channels
            remarks += headers.remarks()
        everything = next(iter(parts.values()))
        return cls(parts, ImageSet(everything, label, image_size, channels, crop, "all" not in parts, tuple(remarks)))

    def choose(self, split: str | None, fraction: float) -> ImageSet:
        """Return a split, or all for None; raises UserError if there is none, or the set is too small for it."""
        from datasets import concatenate_datasets

        if not 0 <= fraction <= 0.5:
            raise UserError(f"validation_fraction must lie between 0 and 0.5, not {fraction}")
        datasets = list(self.parts.values())
        if split is None:
            chosen = concatenate_datasets(datasets) if len(datasets) > 1 else datasets[0]
        elif self.whole.has_validation:
            chosen = datasets[SPLITS.index(split)]
        elif fraction == 0 and split == "train":
            chosen = datasets[0]
        else:
            chosen = datasets[0].select(
                split_rows(self.whole.labels, split, fraction, f"image set '{self.whole.name}'")
            )
        return dataclasses.replace(self.whole, dataset=chosen)


def open_source(
    source: str,
    split: str | None = "train",
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.1,
) -> ImageSet:
    """Open what a command line names: "imagefolder:DIR", "hf:NAME_OR_DIR" or "digits"; see `load_images`."""
    kind, colon, place = source.partition(":")
    if kind not in image_sources() or (colon and not place):
        raise UserError(f"--source {source} is unknown; give imagefolder:DIR, hf:NAME_OR_DIR or digits")
    return load_images(kind, place or None, split, image_size, validation_fraction, channels)


def _labels(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.select_columns("label").with_format(None)[:]["label"], dtype=np.int64)


def undecoded(dataset: Dataset) -> Dataset:
    """Return the images of a set alone, whose cells become {"bytes": …, "path": …}."""
    from datasets import Image as ImageFeature

    return dataset.with_format(None).select_columns("image").cast_column("image", ImageFeature(decode=False))


def check_labels(labels: Iterable[int | None], num_classes: int, part: str, error: type[UserError] = UserError) -> None:
    """Raise UserError (or a kind of it) if an image of a part has no class, or one that does not exist."""
    for label in labels:
        if label is None or label < 0:
            raise error(f"the image set has images without a class label in its part '{part}'")
        if label >= num_classes:
            raise error(f"the image set has the class id {label} in its part '{part}', but {num_classes} classes")


def check_parts(parts: Mapping[str, Dataset]) -> None:
    """Raise UserError for a part that is empty, or has images without a class."""
    for part, dataset in parts.items():
        if not len(dataset):
            raise UserError(f"the image set has no images in its part '{part}'")
        labels = dataset.select_columns("label").with_format(None)[:]["label"]
        check_labels(labels, len(dataset.features["label"].names), part)


@dataclass
class Headers:
    """Sizes and modes of images, counted."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """By (width, height)."""
    modes: Counter[str] = field(default_factory=Counter)

    def add(self, cell: dict[str, Any] | None, row: int | str) -> None:
        """Count an undecoded image; raises UserError if its header cannot be read."""
        size, mode = read_cell_header(cell, row)
        self.sizes[size] += 1
        self.modes[mode] += 1

    @property
    def channels(self) -> int:
        """1 when all are greyscale, else 3."""
        return 1 if set(self.modes) <= set(GREY_MODES) else 3

    def common_size(self, name: str) -> int:
        """Return height and width of all images; raises UserError if they differ."""
        remedy = "set data.image_size and every image is centre-cropped and resized to it"
        if len(self.sizes) > 1:
            listed = [f"{width}x{height} ({count} images)" for (width, height), count in self.sizes.most_common(3)]
            more = f" and {len(self.sizes) - 3} more" if len(self.sizes) > 3 else ""
            raise UserError(f"the images of '{name}' have mixed sizes: {', '.join(listed)}{more}; {remedy}")
        width, height = next(iter(self.sizes))
        if width != height:
            raise UserError(f"the images of '{name}' are {width}x{height} pixels, not square; {remedy}")
        return width

    def remarks(self) -> list[str]:
        """Return what a person should know of these images."""
        transparent = sum(count for mode, count in self.modes.items() if mode.upper().endswith("A"))
        total = sum(self.modes.values())
        told = f"{transparent:,} of {total:,} inspected images have an alpha channel, and are laid on {BACKGROUND}"
        return [told] if transparent else []


def read_headers(parts: Mapping[str, Dataset]) -> Headers:
    """Inspect all images of small sets, of larger ones some that are evenly spaced."""
    headers = Headers()
    total = sum(len(dataset) for dataset in parts.values())
    for dataset in parts.values():
        rows = np.arange(len(dataset))
        if total > MAX_HEADERS:
            rows = evenly_spaced(len(dataset), SAMPLED_HEADERS)
        cells = undecoded(dataset)
        for start in range(0, len(rows), DECODE_CHUNK):
            chunk = rows[start : start + DECODE_CHUNK]
            for row, cell in zip(chunk, cells[chunk]["image"]):
                headers.add(cell, int(row))
    return headers
