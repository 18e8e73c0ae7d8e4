"""Labelled image sets: real images from a bundled set, a folder or a saved data set, decoded to uint8 arrays."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.data.image_sources import (
    HELD_OUT,
    read_digits,
    read_image_folder,
    read_saved_dataset,
    stratified_split,
)
from gspn_dit.errors import LocalUserError, UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

READERS: dict[str, Callable[[str | os.PathLike[str] | None], dict[str, Dataset]]] = {
    "digits": read_digits,
    "imagefolder": read_image_folder,
    "hf": read_saved_dataset,
}
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
        return _undecoded(self.dataset)

    def pixels(
        self,
        indices: Sequence[int] | np.ndarray | None = None,
        image_size: int | None = None,
        channels: int | None = None,
    ) -> np.ndarray:
        """Decode the rows `indices` (default: all).

        Args:
            indices: row numbers, [n].
            image_size: centre-crop and resize to this size instead of the set's own.
            channels: 1 (greyscale) or 3 (RGB) instead of the set's own.

        Returns:
            uint8 array [n, image_size, image_size, channels].

        Raises:
            LocalUserError: an image that cannot be read, or has another size than the set; names its file.
        """
        rows = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64).reshape(-1)
        size = image_size or self.image_size
        channels = channels or self.channels
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {channels}")
        crop = self.crop or image_size is not None
        out = np.empty((len(rows), size, size, channels), dtype=np.uint8)
        for start in range(0, len(rows), DECODE_CHUNK):
            chunk = rows[start : start + DECODE_CHUNK]
            for offset, cell in enumerate(self.cells(chunk)):
                out[start + offset], _ = decode_cell(cell, int(chunk[offset]), size, channels, crop)
        return out

    def cells(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any] | None]:
        """Return the undecoded images of rows, for `decode_cell`: {"bytes": …, "path": …}."""
        return self._undecoded[rows]["image"]


def decode_cell(cell: dict[str, Any] | None, row: int, size: int, channels: int, crop: bool) -> tuple[np.ndarray, str]:
    """Decode an undecoded image to uint8 [size, size, channels]; return it and the mode it had, such as "L" or "CMYK".

    Raises:
        LocalUserError: it cannot be read, or has another size and shall not be cropped; names its file or row.
    """
    place = _place(cell, row)
    image, mode = _decode(_content(cell, place), place, channels)
    if image.size != (size, size):
        if not crop:
            raise LocalUserError(
                f"image {place} is {image.size[0]}x{image.size[1]}, the others {size}x{size}; "
                "set data.image_size and every image is centre-cropped and resized to it"
            )
        image = center_crop(image, size)
    return np.asarray(image).reshape(size, size, channels), mode


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
    if name not in READERS:
        allowed = ", ".join(f"'{known}'" for known in READERS)
        raise UserError(f"no image set named '{name}'; allowed are {allowed}{nearest(name, READERS)}")
    if split is not None and split not in SPLITS:
        raise UserError(f"no split named '{split}'; allowed are 'train', 'validation' and None (all)")
    if not 0 <= validation_fraction <= 0.5:
        raise UserError(f"validation_fraction must lie between 0 and 0.5, not {validation_fraction}")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1, not {image_size}")
    parts = READERS[name](path)
    if split is not None and "all" not in parts:  # a further part, such as a test set without labels, is not looked at
        parts = {part: parts[part] for part in ("train", next(part for part in HELD_OUT if part in parts))}
    label = name if not path else (Path(path).resolve().name or name)
    _check_labels(parts)
    crop = image_size is not None
    if image_size is None or channels is None:
        sizes, modes = _inspect(parts)
        image_size = image_size or _common_size(sizes, label)
        channels = channels or (1 if all(mode in ("1", "L") for mode in modes) else 3)
    return ImageSet(
        dataset=_choose(parts, split, validation_fraction, label),
        name=label,
        image_size=image_size,
        channels=channels,
        crop=crop,
        has_validation="all" not in parts,
    )


def open_source(
    source: str,
    split: str | None = "train",
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.1,
) -> ImageSet:
    """Open what a command line names: "imagefolder:DIR", "hf:NAME_OR_DIR" or "digits"; see `load_images`."""
    kind, colon, place = source.partition(":")
    if kind not in READERS or (colon and not place):
        raise UserError(f"--source {source} is unknown; give imagefolder:DIR, hf:NAME_OR_DIR or digits")
    return load_images(kind, place or None, split, image_size, validation_fraction, channels)


def decode_image(source: bytes | str | os.PathLike[str], place: str, channels: int | None = None) -> Image:
    """Decode one image to 8 bits: mode "L" for 1 channel, "RGB" for 3; None takes what the image has.

    Args:
        source: encoded bytes or a file path.
        place: how an error message names the image.
    """
    return _decode(source, place, channels)[0]


def _decode(source: bytes | str | os.PathLike[str], place: str, channels: int | None) -> tuple[Image, str]:
    """Return an image in 8 bits, and the mode it had."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    try:
        with PILImage.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            _require_eight_bits(opened, place)
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if channels is None:
                channels = 1 if opened.mode in ("1", "L") else 3
            return image.convert("L" if channels == 1 else "RGB"), opened.mode
    except UserError:
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise LocalUserError(f"cannot read the image {place}: {_reason(error)}") from error


def center_crop(image: Image, size: int) -> Image:
    """The largest centred square of an image, resized to `size`, as ADM (arXiv 2105.05233) prepares ImageNet.

    Halves with a box filter while the short side is at least 2·size, then bicubic to a short side of `size`.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Resampling.BOX)
    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = round(width * scale), round(height * scale)
        image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _labels(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.select_columns("label").with_format(None)[:]["label"], dtype=np.int64)


def _undecoded(dataset: Dataset) -> Dataset:
    from datasets import Image as ImageFeature

    return dataset.with_format(None).select_columns("image").cast_column("image", ImageFeature(decode=False))


def _place(cell: dict[str, Any] | None, row: int) -> str:
    path = (cell or {}).get("path")
    return str(path) if path else f"in row {row}"


def _content(cell: dict[str, Any] | None, place: str) -> bytes | str:
    content = (cell or {}).get("bytes") or (cell or {}).get("path")
    if not content:
        raise LocalUserError(f"cannot read the image {place}: the cell is empty")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow knows, or damaged"
    return str(error) or type(error).__name__


def _require_eight_bits(image: Image, place: str) -> None:
    if image.mode.startswith(("I", "F")):
        raise LocalUserError(
            f"the image {place} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits"
        )


def _check_labels(parts: dict[str, Dataset]) -> None:
    for part, dataset in parts.items():
        if not len(dataset):
            raise UserError(f"the image set has no images in its part '{part}'")
        labels = dataset.select_columns("label").with_format(None)[:]["label"]
        if any(label is None or label < 0 for label in labels):
            raise UserError(f"the image set has images without a class label in its part '{part}'")


def _inspect(parts: dict[str, Dataset]) -> tuple[Counter[tuple[int, int]], Counter[str]]:
    """(width, height) and mode of the images, counted, from their headers."""
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    total = sum(len(dataset) for dataset in parts.values())
    for dataset in parts.values():
        rows = np.arange(len(dataset))
        if total > MAX_HEADERS:
            rows = evenly_spaced(len(dataset), SAMPLED_HEADERS)
        undecoded = _undecoded(dataset)
        for start in range(0, len(rows), DECODE_CHUNK):
            chunk = rows[start : start + DECODE_CHUNK]
            for row, cell in zip(chunk, undecoded[chunk]["image"]):
                size, mode = read_header(cell, _place(cell, int(row)))
                sizes[size] += 1
                modes[mode] += 1
    return sizes, modes


def read_header(cell: dict[str, Any] | None, place: str) -> tuple[tuple[int, int], str]:
    """Return (width, height) and mode of an undecoded image; raises UserError if that cannot be read."""
    from PIL import Image as PILImage

    try:
        content = _content(cell, place)
        with PILImage.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            _require_eight_bits(opened, place)
            return opened.size, opened.mode
    except LocalUserError as error:  # every process reads the same headers: rank 0 alone reports
        raise UserError(str(error)) from error
    except Exception as error:
        raise UserError(f"cannot read the image {place}: {_reason(error)}") from error


def _common_size(sizes: Counter[tuple[int, int]], name: str) -> int:
    remedy = "set data.image_size and every image is centre-cropped and resized to it"
    if len(sizes) > 1:
        listed = [f"{width}x{height} ({count} images)" for (width, height), count in sizes.most_common(3)]
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        raise UserError(f"the images of '{name}' have mixed sizes: {', '.join(listed)}{more}; {remedy}")
    width, height = next(iter(sizes))
    if width != height:
        raise UserError(f"the images of '{name}' are {width}x{height} pixels, not square; {remedy}")
    return width


def _choose(parts: dict[str, Dataset], split: str | None, fraction: float, name: str) -> Dataset:
    from datasets import concatenate_datasets

    if split is None:
        return concatenate_datasets(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
    if "all" not in parts:
        return next(dataset for part, dataset in parts.items() if (part == "train") == (split == "train"))
    everything = parts["all"]
    if fraction == 0:
        if split == "train":
            return everything
        raise UserError(f"the image set '{name}' has no validation split and validation_fraction is 0")
    train, validation = stratified_split(_labels(everything), fraction)
    indices = np.sort(train if split == "train" else validation)
    if not len(indices):
        raise UserError(f"the image set '{name}' is too small to be split: {len(everything)} images")
    return everything.select(indices)
