"""Where labelled images come from: bundled digits, image folders, saved Hugging Face data sets, and how they are split.

A reader returns `{part: dataset}`: the key "all" alone when the source is one set, else "train" and one or more of
`HELD_OUT`. Every dataset has the columns `image` (undecoded) and `label` (ClassLabel).
"""

from __future__ import annotations

import math
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gspn_dit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    _Data = TypeVar("_Data", Dataset, IterableDataset)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
HELD_OUT = ("validation", "val", "valid", "dev", "test")  # the first one present is the validation split
DIGITS_VALIDATION_FRACTION = Fraction(1, 5)


def fixed_permutation(count: int) -> np.ndarray:
    """A permutation of range(count) that no library version changes: indices ordered by their SplitMix64 hash.

    >>> fixed_permutation(5).tolist()
    [2, 4, 1, 0, 3]
    """
    with np.errstate(over="ignore"):
        mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return np.argsort(mixed, kind="stable")


def stratified_split(labels: np.ndarray, fraction: float | Fraction) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a training and a validation part, both in the order of `fixed_permutation`.

    The images are listed class by class, inside a class by `fixed_permutation`, and at a fraction 1/k every k-th of
    that list is validation. So the parts have the exact size and every class is within one image of its share.
    A class of one image stays in training.
    """
    share = Fraction(fraction).limit_denominator(10_000)
    order = fixed_permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    position = range(len(by_class) + 1)
    marks = np.array([math.ceil(p * share) for p in position])
    chosen = by_class[np.diff(marks) > 0]
    sizes = np.bincount(labels, minlength=1)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[chosen[sizes[labels[chosen]] > 1]] = True
    return order[~held_out[order]], order[held_out[order]]


def _require_directory(name: str, path: str | os.PathLike[str] | None) -> Path:
    if not path:
        raise UserError(f"the data set '{name}' needs a directory: set data.path")
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"the data path {folder} does not exist")
    if not folder.is_dir():
        raise UserError(f"the data path {folder} is not a directory")
    return folder


def read_digits(path: str | os.PathLike[str] | None) -> dict[str, Dataset]:
    """scikit-learn's handwritten digits: 1,797 greyscale images of 8×8 pixels, intensity v in 0…16 as round(255·v/16).

    1,437 for training, 360 for validation (`stratified_split` at 1/5), each part in a fixed shuffled order: the
    source lists its writers one after the other.
    """
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits

    if path:
        raise UserError(f"the data set 'digits' is bundled and takes no data.path (given: {path})")
    source = load_digits()
    values = np.floor(source.images * 255.0 / 16.0 + 0.5).astype(np.uint8)  # [1797, 8, 8]
    labels = source.target.astype(np.int64)
    names = [str(digit) for digit in range(10)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    parts = {}
    for part, indices in zip(("train", "validation"), stratified_split(labels, DIGITS_VALIDATION_FRACTION)):
        columns = {
            "image": [PILImage.fromarray(values[index]) for index in indices],
            "label": labels[indices].tolist(),
        }
        parts[part] = Dataset.from_dict(columns, features=features)
    return parts


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _image_files(folder: Path) -> list[str]:
    found = []
    for directory, _, files in os.walk(folder, followlinks=True):
        found += [os.path.join(directory, file) for file in files if _is_image(file)]
    return sorted(found)


def _is_image(file: str) -> bool:
    return file.lower().endswith(EXTENSIONS) and not file.startswith(".")


def _folder_part(folder: Path, class_names: list[str]) -> Dataset:
    """One part of an image folder; the cells hold paths, no image is opened or copied."""
    from datasets import ClassLabel, Dataset, Features, Image

    paths: list[str] = []
    labels: list[int] = []
    for entry in _subfolders(folder):
        if entry.name not in class_names:
            raise UserError(f"the class folder {entry} has no counterpart among the training classes")
        files = _image_files(entry)
        if not files:
            raise UserError(f"the class folder {entry} has no images (looked for {', '.join(EXTENSIONS)})")
        paths += files
        labels += [class_names.index(entry.name)] * len(files)
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)


def read_image_folder(path: str | os.PathLike[str] | None) -> dict[str, Dataset]:
    """An image folder: `path/class/…` or `path/train/class/…` with `path/{validation,val,valid,dev,test}/class/…`.

    Class ids follow the sorted folder names; folders inside a class folder are searched too.
    """
    folder = _require_directory("imagefolder", path)
    subfolders = _subfolders(folder)
    names = [entry.name for entry in subfolders]
    extensions = ", ".join(EXTENSIONS)
    if not names:
        if any(_is_image(entry.name) for entry in folder.iterdir()):
            raise UserError(f"the images in {folder} must lie in one sub-folder per class, {folder}/CLASS/IMAGE")
        raise UserError(f"no images in {folder} (looked for {extensions} in its class sub-folders)")
    if not any(_image_files(entry) for entry in subfolders):
        raise UserError(f"no images in {folder} (looked for {extensions} in its class sub-folders)")
    parted = "train" in names and (
        any(name in names for name in HELD_OUT) or (names == ["train"] and bool(_subfolders(folder / "train")))
    )
    if not parted:
        return {"all": _folder_part(folder, names)}
    class_names = [entry.name for entry in _subfolders(folder / "train")]
    parts = [name for name in ("train", *HELD_OUT) if name in names]
    found = {part: _folder_part(folder / part, class_names) for part in parts}
    for part, dataset in found.items():
        if not len(dataset):
            raise UserError(f"no images in {folder / part} (looked for {extensions} in its class sub-folders)")
    return found if len(found) > 1 else {"all": found["train"]}


def _find_column(dataset: Dataset, kind: type, preferred: str, path: Path) -> str:
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if preferred in columns:
        return preferred
    if len(columns) == 1:
        return columns[0]
    if columns:
        raise UserError(
            f"{path} has several {kind.__name__} columns ({', '.join(columns)}); name the one to use '{preferred}'"
        )
    raise UserError(
        f"{path} has no {kind.__name__} column (its columns: {', '.join(dataset.column_names)}); "
        "an Image and a ClassLabel column are needed"
    )


def standard_columns(dataset: _Data, path: Path, decode: bool = True) -> _Data:
    """The image and class columns alone, found by feature type and named `image` and `label`; undecoded if asked."""
    from datasets import ClassLabel, Image

    found = {
        _find_column(dataset, Image, "image", path): "image",
        _find_column(dataset, ClassLabel, "label", path): "label",
    }
    dataset = dataset.with_format(None).select_columns(list(found))
    if not decode:  # before anything looks at the rows
        dataset = dataset.cast_column(next(iter(found)), Image(decode=False))
    renamed = {old: new for old, new in found.items() if old != new}
    return dataset.rename_columns(renamed) if renamed else dataset


def is_hub_name(path: str | os.PathLike[str] | None) -> bool:
    """Tell whether a path is OWNER/DATA_SET on the Hugging Face hub rather than a place here."""
    return bool(path) and not Path(str(path)).exists() and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)))


def read_saved_dataset(path: str | os.PathLike[str] | None) -> dict[str, Dataset]:
    """A Dataset, or a DatasetDict with `train` and a held-out part, that `save_to_disk` wrote or the hub holds."""
    from datasets import Dataset, load_dataset, load_from_disk

    hub = is_hub_name(path)
    folder = Path(str(path)) if hub else _require_directory("hf", path)
    try:
        stored = load_dataset(str(path)) if hub else load_from_disk(str(folder))
    except Exception as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        what = "neither a directory nor a data set of the hub" if hub else "not a data set that save_to_disk wrote"
        raise UserError(f"{folder} is {what}: {reason}") from error
    parts = {"all": stored} if isinstance(stored, Dataset) else dict(stored)
    if len(parts) == 1:
        return {"all": standard_columns(next(iter(parts.values())), folder)}
    if "train" not in parts or not any(name in parts for name in HELD_OUT):
        raise UserError(
            f"{folder} has the splits {', '.join(parts)}; needed are 'train' and one of {', '.join(HELD_OUT)}"
        )
    found = {name: standard_columns(parts[name], folder) for name in ("train", *HELD_OUT) if name in parts}
    names = found["train"].features["label"].names
    for part, dataset in found.items():
        if dataset.features["label"].names != names:
            raise UserError(f"{folder}: the class names of the split '{part}' differ from those of 'train'")
    return found
