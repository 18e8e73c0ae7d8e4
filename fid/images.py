"""Samples and reference images as uint8 arrays, read from NPZ files, PNG directories and data sets."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gspn_dit.errors import UserError, nearest

BUNDLED = ("digits",)
SAVED_DATASET_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")


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


@dataclass(frozen=True)
class LabelledImages:
    """A set of images of one size, with class ids where they are known."""

    pixels: np.ndarray
    """uint8 [n, H, W, C], C = 1 or 3."""
    source: str
    """Where the images come from, for the report."""
    labels: np.ndarray | None = None
    """Class ids, int64 [n]."""
    class_names: tuple[str, ...] | None = None
    """Names by class id, where the source names its classes."""

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def sha256(self) -> str:
        """Hash of shape, pixels and labels, whatever file they came in."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """Real images: those to compare with, and those that no one trained on."""

    images: LabelledImages
    held_out: LabelledImages | None = None


def require_samples(path: str | os.PathLike[str]) -> Path:
    """The path, if something is there."""
    if not Path(path).exists():
        raise UserError(f"no samples at {path}: there is no such file or directory")
    return Path(path)


def read_samples(path: str | os.PathLike[str]) -> LabelledImages:
    """Generated images: an NPZ (`arr_0` uint8 NHWC, `arr_1` class ids or none) or a directory of PNGs.

    A directory holds its PNGs itself, in name order and without labels, or in one sub-folder per class.

    Raises:
        UserError: what is wrong with them, in one line.
    """
    location = require_samples(path)
    return _read_directory(location) if location.is_dir() else _read_npz(location)


def read_reference(reference: str | os.PathLike[str], image_size: int) -> Reference:
    """Real images: "digits", an image folder, a saved data set, a directory of PNGs, or an NPZ.

    The bundled set, and folders and saved sets with a validation split, give that split as held-out images. Images of
    a folder or saved set are centre-cropped and resized to `image_size` (the feature net's) as for training; PNGs of
    a flat directory and arrays are taken as they are.
    """
    name, location = str(reference), Path(reference)
    if name in BUNDLED:
        return _read_image_set(name, None, None)
    if location.is_file():
        return Reference(_read_npz(location))
    if not location.is_dir():
        raise UserError(
            f"no reference '{name}': it is neither a file or directory nor a bundled data set "
            f"({', '.join(BUNDLED)}){nearest(name, BUNDLED)}"
        )
    if any((location / mark).is_file() for mark in SAVED_DATASET_MARKS):
        return _read_image_set("hf", location, image_size)
    if _pngs(location):
        return Reference(_read_directory(location))
    return _read_image_set("imagefolder", location, image_size)


def _read_image_set(name: str, path: Path | None, image_size: int | None) -> Reference:
    from gspn_dit.data.images import ImageSet, load_images

    def read(images: ImageSet, part: str) -> LabelledImages:
        source = f"{path or name}, {part}" if images.has_validation else str(path or name)
        return LabelledImages(images.pixels(), source, images.labels, tuple(images.class_names))

    train = load_images(name, path, "train", image_size, validation_fraction=0)
    if not train.has_validation:
        return Reference(read(train, "all images"))
    held_out = load_images(name, path, "validation", image_size, validation_fraction=0)
    return Reference(read(train, "training split"), read(held_out, "validation split"))


def _read_npz(path: Path) -> LabelledImages:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array; an NPZ with arr_0 is needed (numpy.savez)")
        with archive:
            names = archive.files
            if "arr_0" not in names:
                raise UserError(f"{path} has no arr_0 (it has: {', '.join(names) or 'nothing'})")
            pixels = archive["arr_0"]
            labels = archive["arr_1"] if "arr_1" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            raise UserError(f"{path} holds pickled objects, which are never loaded; save plain arrays") from error
        raise UserError(f"{path} cannot be read as NPZ: {error}") from error
    _check_pixels(pixels, path)
    return LabelledImages(pixels, str(path), None if labels is None else _check_labels(labels, len(pixels), path))


def _check_pixels(pixels: np.ndarray, path: Path) -> None:
    if np.issubdtype(pixels.dtype, np.floating):
        bad = int((~np.isfinite(pixels)).sum())
        found = f"{bad} NaN or infinite values" if bad else "floating-point values"
        raise UserError(f"arr_0 of {path} has {found} ({pixels.dtype}); images must be uint8 in 0…255")
    if pixels.dtype != np.uint8:
        raise UserError(f"arr_0 of {path} is {pixels.dtype}; images must be uint8 in 0…255")
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or 0 in pixels.shape[1:]:
        raise UserError(f"arr_0 of {path} has the shape {pixels.shape}; needed is [n, height, width, 1 or 3]")
    if not len(pixels):
        raise UserError(f"arr_0 of {path} holds no images")


def _check_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"arr_1 of {path} is {labels.dtype}; class ids must be integers")
    if labels.shape != (count,):
        raise UserError(f"arr_1 of {path} has the shape {labels.shape} for {count} images; needed is ({count},)")
    if (labels < 0).any():
        raise UserError(f"arr_1 of {path} has negative class ids (smallest: {labels.min()})")
    return labels.astype(np.int64)


def _pngs(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith("."))


def _read_directory(folder: Path) -> LabelledImages:
    flat = _pngs(folder)
    by_class = {entry.name: _pngs(entry) for entry in sorted(folder.iterdir()) if entry.is_dir()}
    by_class = {name: files for name, files in by_class.items() if files}
    if flat and by_class:
        raise UserError(f"{folder} has PNGs of its own and in sub-folders ({', '.join(by_class)}); keep one of them")
    if not flat and not by_class:
        raise UserError(f"no PNG images in {folder} or its sub-folders (other formats lose what is to be measured)")
    if flat:
        return LabelledImages(_read_pngs(flat), str(folder))
    labels = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class.values()])
    files = [file for group in by_class.values() for file in group]
    return LabelledImages(_read_pngs(files), str(folder), labels.astype(np.int64), tuple(by_class))


def _read_pngs(files: list[Path]) -> np.ndarray:
    from gspn_dit.data.images import decode_image

    images = [decode_image(file, str(file)) for file in files]
    first = images[0].size
    for file, image in zip(files, images):
        if image.size != first:
            raise UserError(
                f"{file} is {image.size[0]}x{image.size[1]} pixels, {files[0].name} is {first[0]}x{first[1]}; "
                "all images must have one size"
            )
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    return pixels[..., None] if mode == "L" else pixels
