"""Images with captions: folders with a `metadata.jsonl`, and Hugging Face data sets with a column of text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit import rng
from gspn_dit.config import DataConfig
from gspn_dit.data.folders import LeftOut, Walk, choose_splits, list_folder
from gspn_dit.data.image_sources import open_saved, require_directory, split_rows
from gspn_dit.data.images import ImageSet, read_headers, undecoded
from gspn_dit.data.latent_shards import CAPTIONS
from gspn_dit.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from gspn_dit.data.latent_shards import LatentSet

METADATA = "metadata.jsonl"
CLASS_NAMES = ["captioned"]
"""Of a captioned set, whose images an `ImageSet` takes for one class."""


@dataclass(frozen=True)
class CaptionedImages:
    """Images and what each shows, in words."""

    images: ImageSet
    captions: list[tuple[str, ...]]
    """At least one for each image; training takes one of them by sample number."""

    def texts(self) -> list[str]:
        """Return the distinct captions, sorted."""
        return sorted({text for variants in self.captions for text in variants})

    def fingerprint(self) -> str:
        """Return a hash of all captions."""
        return hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()[:16]


def caption_variants(seed: int, numbers: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Return which of its captions each sample is trained with, int64; `counts` says how many there are of each."""
    uniforms = rng.uniform(seed, rng.Stream.CAPTION, numbers).numpy()
    return (uniforms * np.asarray(counts)).astype(np.int64)


def captions_of(latents: LatentSet) -> list[tuple[str, ...]]:
    """Return the captions that were kept with encoded images; raises UserError where there are none, or other ones."""
    kept = latents.manifest.get("captions")
    place = latents.directory / CAPTIONS
    if kept is None:
        raise UserError(
            f"{latents.directory} has no captions; encode its images again with gspn_dit.prepare.encode --captions KEY"
        )
    try:
        content = place.read_bytes()
    except OSError as error:
        raise UserError(f"the captions {place} cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != kept["sha256"]:
        raise UserError(f"the captions {place} are damaged (checksum); continue with gspn_dit.prepare.encode --resume")
    captions = [tuple(json.loads(line)) for line in content.splitlines()]
    return [captions[row] for row in latents.rows]


def load_captioned(data: DataConfig, split: str = "train") -> CaptionedImages:
    """Open a split of a captioned set: "train", "validation", or another one that it has.

    An image folder has `metadata.jsonl` beside its images, or one in each of its splits; every line is an object with
    `file_name` and `data.caption_column`, a text or several. A set without a validation split holds out
    `data.validation_fraction` of its images.

    Raises:
        UserError: anything that cannot be used, in one line.
    """
    if data.name not in ("imagefolder", "hf"):
        raise UserError(f"data.name {data.name} has no captions; text-to-image needs imagefolder, hf or latents")
    place = require_directory(data.name, data.path)
    if data.name == "imagefolder":
        parts = _folder_parts(place, data.caption_column)
    else:
        parts = {name: _saved_part(part, place, data.caption_column) for name, part in open_saved(data.path).items()}
    split_name, rows, has_validation = _choose(parts, split, data.validation_fraction, place)
    dataset, captions = parts[split_name]
    remarks = []
    if data.name == "imagefolder":
        remarks = _left_out(place if split_name == "all" else place / split_name, dataset)
    if rows is not None:
        dataset, captions = dataset.select(rows), [captions[row] for row in rows]
    if not captions:
        raise UserError(f"the split '{split_name}' of {place} has no images")
    headers = read_headers({split_name: dataset})
    size = data.image_size or headers.common_size(place.name)
    crop, told = data.image_size is not None, tuple([*remarks, *headers.remarks()])
    images = ImageSet(dataset, place.name, size, headers.channels, crop, has_validation, told)
    return CaptionedImages(images, captions)


_Part = tuple[Any, list[tuple[str, ...]]]


def _choose(parts: dict[str, _Part], split: str, fraction: float, place: Path) -> tuple[str, np.ndarray | None, bool]:
    """Return the part that a split is in, its rows there (None: all), and whether the set has a validation split."""
    roles = dict(zip(("train", "validation"), choose_splits(parts, place)))
    if split in parts or split in roles:
        return roles.get(split, split), None, "validation" in roles
    if len(parts) > 1 or split not in ("train", "validation"):
        raise UserError(f"{place} has no split '{split}'; it has {', '.join(parts)}")
    name = next(iter(parts))
    labels = np.zeros(len(parts[name][1]), dtype=np.int64)
    return name, split_rows(labels, split, fraction, f"captioned set '{place.name}'"), False


def _folder_parts(place: Path, column: str) -> dict[str, _Part]:
    if (place / METADATA).is_file():
        return {"all": _folder_part(place, column)}
    folders = [Path(folder) for folder in list_folder(place, LeftOut()).folders.values()]
    splits = [folder for folder in folders if (folder / METADATA).is_file()]
    if not splits:
        example = json.dumps({"file_name": "cat.png", column: "a cat"})
        raise UserError(f"{place} has no {METADATA} with captions; write one with a line for each image: {example}")
    return {path.name: _folder_part(path, column) for path in splits}


def _folder_part(folder: Path, column: str) -> _Part:
    from datasets import ClassLabel, Dataset, Features, Image

    paths, captions = [], []
    try:
        lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
        rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / METADATA} cannot be read: {error}") from None
    for number, row in rows:
        where = f"line {number} of {folder / METADATA}"
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"{where} has no file_name; every line names an image and its caption")
        path = folder / row["file_name"]
        if not path.is_file():
            raise UserError(f"{where} names {row['file_name']}, which is not in {folder}")
        paths.append(str(path))
        captions.append(_captions(row, column, f"{where} ({row['file_name']})"))
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    return Dataset.from_dict({"image": paths, "label": [0] * len(paths)}, features=features), captions


def _left_out(folder: Path, dataset: Dataset) -> list[str]:
    """Return what a folder holds beside the images that its metadata names."""
    left_out = LeftOut(expected=(METADATA,))
    named = {os.path.normpath(cell["path"]) for cell in undecoded(dataset)["image"]}
    for path in Walk([folder], left_out).images(folder, of_one_class=False):
        if os.path.normpath(path) not in named:
            left_out.add("images without a caption", os.path.basename(path))
    return [f"left out: {left_out}"] if str(left_out) else []


def _saved_part(dataset: Dataset, place: Path, column: str) -> _Part:
    from datasets import ClassLabel, Image

    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if not images:
        raise UserError(f"{place} has no Image column (its columns: {', '.join(dataset.column_names)})")
    image = "image" if "image" in images else images[0]
    if column not in dataset.column_names:
        hint = nearest(column, dataset.column_names)
        raise UserError(
            f"{place} has no column '{column}' of captions (its columns: {', '.join(dataset.column_names)}{hint}); "
            "set data.caption_column"
        )
    texts = dataset.select_columns([column]).with_format(None)[:][column]
    captions = [_captions({column: text}, column, f"row {row} of {place}") for row, text in enumerate(texts)]
    only = dataset.with_format(None).select_columns([image])
    only = only.rename_column(image, "image") if image != "image" else only
    return only.add_column("label", [0] * len(only)).cast_column("label", ClassLabel(names=CLASS_NAMES)), captions


def _captions(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """Return the captions of a row; raises UserError if it has none, or none that says anything."""
    if column not in row:
        others = ", ".join(name for name in row if name != "file_name")
        raise UserError(f"{where} has no '{column}' (it has: {others}); set data.caption_column")
    given = row[column]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: '{column}' is {given!r}, but must be a text or a list of texts")
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{where} has an empty caption; give each image a text in '{column}', or leave it out")
    return tuple(text.strip() for text in texts)
