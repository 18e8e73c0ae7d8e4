"""Where labelled images come from: bundled digits, image folders, Hugging Face data sets; and how they are split."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gspn_dit.data.folders import (
    EXTENSIONS,
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    LeftOut,
    Walk,
    choose_splits,
    list_folder,
    split_word,
)
from gspn_dit.errors import UserError
from gspn_dit.paths import require_utf8

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    _Data = TypeVar("_Data", Dataset, IterableDataset)

DIGITS_VALIDATION_FRACTION = Fraction(1, 5)


@dataclass(frozen=True)
class Parts:
    """What a source holds."""

    datasets: dict[str, Dataset]
    """By split: the training split, then held-out ones, the validation split first; or "all" alone, where the source is
    one set. Each has the columns `image` (undecoded) and `label` (ClassLabel)."""
    left_out: str = ""
    """What the place holds besides, and is not read, in words."""


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


def split_rows(labels: np.ndarray, split: str, fraction: float, what: str) -> np.ndarray:
    """Return the rows of the training or validation split, ascending, of a set that comes as one.

    Args:
        labels: class ids, int64 [n].
        split: "train" or "validation".
        fraction: in [0, 0.5]; the share that is held out (`stratified_split`).
        what: how an error message names the set.

    Raises:
        UserError: nothing shall be held out, or nothing is left for one of the splits.
    """
    if fraction == 0:
        if split == "train":
            return np.arange(len(labels))
        raise UserError(f"the {what} has no validation split and validation_fraction is 0")
    train, validation = stratified_split(labels, fraction)
    rows = np.sort(train if split == "train" else validation)
    if not len(rows):
        raise UserError(
            f"the {what} is too small to be split: {len(labels)} images, and a class of one image stays in training; "
            "give more images, or set data.validation_fraction to 0"
        )
    return rows


def require_directory(name: str, path: str | os.PathLike[str] | None) -> Path:
    """Return the directory of a data set; raises UserError if there is none."""
    if not path:
        raise UserError(f"the data set '{name}' needs a directory: set data.path")
    folder = Path(require_utf8(path))
    if not folder.exists():
        raise UserError(f"the data path {folder} does not exist")
    if not folder.is_dir():
        raise UserError(f"the data path {folder} is not a directory")
    return folder


def read_digits(path: str | os.PathLike[str] | None) -> Parts:
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
    return Parts(parts)


def _class_part(folder: str | Path, class_names: list[str] | None, left_out: LeftOut) -> Dataset:
    """One part of an image folder; the cells hold paths, no image is opened or copied.

    `class_names` are those of the training part, or None for that part itself.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    listing = list_folder(folder, left_out)
    looked_for = f"looked for {', '.join(EXTENSIONS)}"
    if not listing.folders:
        if listing.images:
            raise UserError(f"the images in {folder} must lie in one sub-folder per class, {folder}/CLASS/IMAGE")
        raise UserError(f"no images in {folder} ({looked_for} in its class sub-folders)")
    for image in listing.images:
        left_out.add("images beside the class folders", os.path.basename(image))
    class_names = class_names or list(listing.folders)
    walk = Walk([folder, *listing.folders.values()], left_out)
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for name, place in listing.folders.items():
        if name not in class_names:
            raise UserError(f"the class folder {place} has no counterpart among the training classes")
        files = walk.images(place)
        paths += files
        labels += [class_names.index(name)] * len(files)
        empty += [] if files else [place]
    if not paths:
        raise UserError(f"no images in {folder} ({looked_for} in its class sub-folders)")
    if empty:
        raise UserError(f"the class folder {empty[0]} has no images ({looked_for})")
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _has_classes(folder: str) -> bool:
    return bool(list_folder(folder, LeftOut()).folders)


def _folder_splits(folder: Path, folders: dict[str, str], left_out: LeftOut) -> list[str]:
    """Return which folders are splits, training first, or nothing if all are classes; raises UserError if in doubt."""
    alike = [name for name in folders if split_word(name)]
    others = [name for name in folders if name not in alike]
    if not alike or (others and len(alike) == 1 and not _has_classes(folders[alike[0]])):
        return []  # a class may be called `train`
    splits = choose_splits(alike, folder) or [name for name in alike if split_word(name) in TRAIN_NAMES]
    if not splits:
        raise UserError(
            f"{folder} has no folder of training images, only {', '.join(alike)}; call it train, "
            "or give other names to classes that are called as splits are"
        )
    if others and (len(splits) == 1 or not _has_classes(folders[splits[0]])):
        raise UserError(
            f"{folder} has folders that are called as splits are ({', '.join(alike)}) beside others "
            f"({', '.join(others[:3])}); keep splits, each with its classes, or classes with other names"
        )
    for name in others:
        left_out.add("folders beside the splits", name)
    return splits


def read_image_folder(path: str | os.PathLike[str] | None) -> Parts:
    """An image folder: `path/class/…`, or `path/train/class/…` with `path/validation/class/…` beside.

    Splits may have any of their usual names (`TRAIN_NAMES`, `HELD_OUT_NAMES`), in any case. Class ids follow the sorted
    folder names; folders inside a class folder are searched too.
    """
    folder = require_directory("imagefolder", path)
    left_out = LeftOut()
    listing = list_folder(folder, left_out)
    splits = _folder_splits(folder, listing.folders, left_out)
    if not splits:
        left_out = LeftOut()  # the folder is listed again
        return Parts({"all": _class_part(folder, None, left_out)}, str(left_out))
    for image in listing.images:
        left_out.add("images beside the class folders", os.path.basename(image))
    train = _class_part(listing.folders[splits[0]], None, left_out)
    found = {splits[0]: train}
    for number, name in enumerate(splits[1:]):
        place = listing.folders[name]
        if number and not _has_classes(place):  # such as a test set without labels
            left_out.add("splits without class folders", name)
        else:
            found[name] = _class_part(place, train.features["label"].names, left_out)
    return Parts(found if len(found) > 1 else {"all": train}, str(left_out))


def _find_column(dataset: Dataset | IterableDataset, kind: type, preferred: str, path: Path) -> str:
    if dataset.features is None:
        raise UserError(f"the data set {path} does not declare its columns; needed are an Image and a ClassLabel")
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


def is_saved(folder: Path) -> bool:
    """Tell whether a directory is one that `save_to_disk` wrote."""
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json", "state.json"))


def open_saved(path: str | os.PathLike[str] | None, streaming: bool = False) -> dict[str, Any]:
    """Open a data set of `datasets`: what `save_to_disk` wrote, or the hub holds; when streaming, also a directory of
    Parquet or other files.

    Returns:
        A `Dataset` of each split, or an `IterableDataset` of what is streamed from files or the hub; "all" alone for a
        set without splits.

    Raises:
        UserError: there is none, in one line.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    hub = is_hub_name(path)
    if streaming and path and not hub and not Path(path).is_dir():
        raise UserError(f"the data path {path} is neither a directory nor OWNER/NAME of a data set of the hub")
    folder = Path(str(path)) if hub else require_directory("hf", path)
    saved = is_saved(folder)
    try:
        if saved or not (hub or streaming):
            stored = load_from_disk(str(folder))
        else:
            stored = load_dataset(str(path), streaming=streaming)
    except Exception as error:  # whatever the files lead datasets to
        reason = (str(error) or type(error).__name__).split("\n")[0]
        if streaming and not saved:
            raise UserError(f"{path} cannot be streamed: {reason}") from error
        what = "neither a directory nor a data set of the hub" if hub else "not a data set that save_to_disk wrote"
        raise UserError(f"{folder} is {what}: {reason}") from error
    return {"all": stored} if isinstance(stored, Dataset) else {str(name): part for name, part in stored.items()}


def stream_saved(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """`open_saved` for reading in order."""
    return open_saved(path, streaming=True)


def labelled_parts(parts: Mapping[str, _Data], place: Path, decode: bool = True) -> dict[str, _Data]:
    """Return the standard columns of the splits of a set, training first; "all" alone where it is one set.

    Raises UserError if it has other splits than training and held-out ones, lacks classes, or names them differently.
    """
    if len(parts) == 1:
        return {"all": standard_columns(next(iter(parts.values())), place, decode)}
    splits = choose_splits(parts, place)
    if not splits:
        raise UserError(
            f"{place} has the splits {', '.join(parts)}; needed are 'train' and one of {', '.join(HELD_OUT_NAMES)}"
        )
    found = {name: standard_columns(parts[name], place, decode) for name in splits}
    names = found[splits[0]].features["label"].names
    for part, dataset in found.items():
        if dataset.features["label"].names != names:
            raise UserError(f"{place}: the class names of the split '{part}' differ from those of '{splits[0]}'")
    return found


def read_saved_dataset(path: str | os.PathLike[str] | None) -> Parts:
    """A Dataset, or a DatasetDict with training and held-out splits, that `save_to_disk` wrote or the hub holds."""
    opened: dict[str, Dataset] = open_saved(path)
    found = labelled_parts(opened, Path(str(path)))
    left_out = LeftOut()
    for name in opened:
        if len(opened) > 1 and name not in found:
            left_out.add("other splits", name)
    return Parts(found, str(left_out))
