"""Samples and reference images, read from NPZ files, PNG directories and data sets."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fid.captions import METADATA, captions_beside
from fid.labelled import LabelledImages, LazyPixels, Reference, decoded_if_small
from fid.npz import open_npz
from gspn_dit.data.folders import LeftOut, Walk, list_folder
from gspn_dit.data.image_sources import is_saved
from gspn_dit.data.sources import image_sources
from gspn_dit.errors import UserError, nearest
from gspn_dit.paths import require_utf8

if TYPE_CHECKING:
    from gspn_dit.data.images import Headers, ImageSet

SIDECAR = "generation.json"
REPORT = "report.json"
"""Marks the folder of a report, which may lie among the samples it is about."""
INDEX_AND_CLASS = re.compile(r"(\d+)-(\d+)\.png", re.IGNORECASE)
LARGEST_CLASS = 2**31 - 1


def require_samples(path: str | os.PathLike[str]) -> Path:
    """The path, if something is there."""
    if not Path(path).exists():
        raise UserError(f"no samples at {path}: there is no such file or directory")
    return Path(require_utf8(path))


def read_samples(path: str | os.PathLike[str]) -> LabelledImages:
    """Generated images: an NPZ (`arr_0` uint8 NHWC, `arr_1` class ids or none) or a directory of PNGs.

    A directory holds its PNGs itself, as `<index>-<class id>.png` or in name order and without labels, or in one
    sub-folder per class. `generation.json` in the directory, or FILE.json beside FILE.npz, says how they were made.

    Raises:
        UserError: what is wrong with them, in one line.
    """
    location = require_samples(path)
    generation = read_generation(location)
    images = _read_directory(location) if location.is_dir() else _read_npz(location).images
    return _described(images, generation)


def read_reference(reference: str | os.PathLike[str], image_size: int | None) -> Reference:
    """Real images: "digits", an image folder, a saved data set, a directory of PNGs, or an NPZ.

    An NPZ may bring ADM's statistics (mu, sigma, mu_s, sigma_s) of the real set beside images of it.

    The bundled set, and folders and saved sets with a validation split, give that split as held-out images. Images of
    a folder or saved set are centre-cropped and resized to `image_size` (the feature extractor's) as for training; PNGs
    of a flat directory and arrays are taken as they are.
    """
    name, location = require_utf8(str(reference)), Path(reference)
    bundled = [word for word, source in image_sources().items() if source.bundled]
    if name in bundled:
        return _read_image_set(name, None, None)
    if location.is_file():
        return _read_npz(location)
    if not location.is_dir():
        raise UserError(
            f"no reference '{name}': it is neither a file or directory nor a bundled data set "
            f"({', '.join(bundled)}){nearest(name, bundled)}"
        )
    if is_saved(location):
        return _read_image_set("hf", location, image_size)
    if list_folder(location, LeftOut()).images:
        return Reference(_read_directory(location))
    return _read_image_set("imagefolder", location, image_size)


def _read_image_set(name: str, path: Path | None, image_size: int | None) -> Reference:
    from gspn_dit.data.images import load_splits

    def read(images: ImageSet, part: str) -> LabelledImages:
        source = f"{path or name}, {part}" if images.has_validation else str(path or name)
        shape = (len(images), images.image_size, images.image_size, images.channels)
        pixels = decoded_if_small(LazyPixels(images.pixels, shape))
        captions, remarks = None, "; ".join(images.remarks)
        if name == "imagefolder" and path is not None:
            captions = captions_beside(path, lambda: _paths(images))
        names = tuple(images.class_names)
        return LabelledImages(pixels, source, images.labels, names, captions=captions, remarks=remarks)

    train, held_out = load_splits(name, path, image_size, validation_fraction=0)
    if held_out is None:
        return Reference(read(train, "all images"))
    return Reference(read(train, "training split"), read(held_out, "validation split"))


def _paths(images: ImageSet) -> list[Path]:
    return [Path((cell or {}).get("path") or "") for cell in images.cells(np.arange(len(images)))]


def _read_npz(path: Path) -> Reference:
    with open_npz(path) as archive:
        if "arr_0" not in archive:
            raise UserError(f"{path} has no arr_0 (it has: {', '.join(archive.names) or 'nothing'})")
        pixels = archive.array("arr_0")
        _check_pixels(pixels, path)
        labels = _check_labels(archive.array("arr_1"), len(pixels), path) if "arr_1" in archive else None
        return Reference(LabelledImages(pixels, str(path), labels), statistics=archive.statistics())


def _check_pixels(pixels: np.ndarray, path: Path) -> None:
    if np.issubdtype(pixels.dtype, np.floating):
        bad = sum(int((~np.isfinite(part)).sum()) for part in pixels)
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
    if (labels > LARGEST_CLASS).any():
        raise UserError(f"arr_1 of {path} has class ids beyond {LARGEST_CLASS:,} (largest: {labels.max()})")
    return labels.astype(np.int64)


def _png_files(folder: Path, files: Sequence[str]) -> list[Path]:
    """Return images as paths if all are PNGs; raises UserError if only some are."""
    kinds = Counter(Path(file).suffix.lower() for file in files)
    if len(kinds) > 1 and ".png" in kinds:
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        raise UserError(
            f"{folder} has images of several formats ({found}); samples must all be PNGs, as other formats lose what "
            "is to be measured: save them again, or remove them"
        )
    return [Path(file) for file in files] if ".png" in kinds else []


def _read_directory(folder: Path) -> LabelledImages:
    left_out = LeftOut(expected=(SIDECAR, METADATA))
    listing = list_folder(folder, left_out)
    flat = _png_files(folder, listing.images)
    walk = Walk([folder, *listing.folders.values()], left_out)
    by_class = {}
    for name, place in listing.folders.items():
        if (Path(place) / REPORT).is_file():
            left_out.add("folders of reports", name)
            continue
        by_class[name] = walk.images(place)
    pngs = _png_files(folder, [*listing.images, *(file for files in by_class.values() for file in files)])
    by_class = {name: files for name, files in by_class.items() if files}
    if not pngs:
        raise UserError(f"no PNG images in {folder} or its sub-folders (other formats lose what is to be measured)")
    if flat and by_class:
        raise UserError(f"{folder} has PNGs of its own and in sub-folders ({', '.join(by_class)}); keep one of them")
    files, labels, class_names = _flat_order(folder, flat) if flat else _class_order(by_class)
    pixels, remarks = _read_pngs(files)
    if str(left_out):
        remarks.append(f"left out: {left_out}")
    captions = captions_beside(folder, lambda: files)
    return LabelledImages(pixels, str(folder), labels, class_names, captions=captions, remarks="; ".join(remarks))


_Ordered = tuple[list[Path], np.ndarray | None, tuple[str, ...] | None]


def _flat_order(folder: Path, files: list[Path]) -> _Ordered:
    """Return images by index, with class ids, where all are so named; else in the order of their names and without."""
    numbered = [INDEX_AND_CLASS.fullmatch(file.name) for file in files]
    found = [(int(match[1]), int(match[2]), file) for match, file in zip(numbered, files) if match]
    if len(found) < len(files):
        return files, None, None
    found.sort()
    if len({index for index, _, _ in found}) < len(found):
        raise UserError(f"{folder} has two images of one index; the names must be <index>-<class id>.png")
    return [file for _, _, file in found], np.array([label for _, label, _ in found], dtype=np.int64), None


def _class_order(by_class: dict[str, list[str]]) -> _Ordered:
    """Return images class by class, with class ids and names."""
    labels = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class.values()])
    return [Path(file) for group in by_class.values() for file in group], labels.astype(np.int64), tuple(by_class)


def _read_pngs(files: list[Path]) -> tuple[np.ndarray | LazyPixels, list[str]]:
    """Return images, small sets decoded, and what a person should know of them."""
    from gspn_dit.data.decoding import as_pixels, decode_image

    headers = _common_headers(files)
    (width, height), channels = next(iter(headers.sizes)), headers.channels

    def read(rows: np.ndarray) -> np.ndarray:
        return np.stack([as_pixels(decode_image(files[row], str(files[row]), channels)) for row in rows])

    pixels = decoded_if_small(LazyPixels(read, (len(files), height, width, channels)))
    return pixels, headers.remarks()


def _common_headers(files: list[Path]) -> Headers:
    """Inspect images, which must have one size as they are decoded."""
    from gspn_dit.data.images import Headers

    headers = Headers()
    first: tuple[int, int] | None = None
    for file in files:
        headers.add({"path": str(file)}, str(file))
        first, size = first or next(iter(headers.sizes)), list(headers.sizes)[-1]
        if size != first:
            raise UserError(
                f"{file} is {size[0]}x{size[1]} pixels, {files[0].name} is {first[0]}x{first[1]}; "
                "all images must have one size"
            )
    return headers


def sidecar_path(samples: Path) -> Path:
    """Where a sample set says how it was generated: in a directory, or beside a file."""
    return samples / SIDECAR if samples.is_dir() else samples.with_suffix(".json")


def read_generation(samples: Path) -> dict[str, Any] | None:
    """The content of a sample set's sidecar, or None where there is none; an unfinished set is refused."""
    path = sidecar_path(samples)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; it must say how the samples were generated, or not be there")
    if found.get("complete") is False:
        raise UserError(f"the samples at {samples} are incomplete ({path.name} says so); run the generation again")
    return found


def _described(images: LabelledImages, generation: dict[str, Any] | None) -> LabelledImages:
    """The images with their sidecar, which names the classes where the images themselves do not."""
    names = (generation or {}).get("class_names")
    if images.class_names is None and isinstance(names, list) and images.labels is not None:
        if images.labels.max() >= len(names):
            raise UserError(
                f"{images.source} has the class id {images.labels.max()}; its generation names {len(names)} classes"
            )
        images = dataclasses.replace(images, class_names=tuple(map(str, names)))
    return dataclasses.replace(images, generation=generation)
