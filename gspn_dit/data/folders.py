"""Folders of images as they lie on people's disks: one walk for data sets and samples, which tells what it left out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gspn_dit.errors import UserError
from gspn_dit.paths import require_utf8

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif"),
    *(".bmp", ".ppm", ".pgm", ".tif", ".tiff"),
)
SYSTEM_FOLDERS = {
    *("__macosx", "__pycache__", "@eadir", "@__thumb", "#recycle", "#snapshot", "$recycle.bin"),
    *("lost+found", "system volume information"),
}
"""Folders that systems and tools put among images, in lower case; all that begin with a dot are hidden anyway."""
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = (
    *("validation", "val", "valid", "dev", "eval", "evaluation"),
    *("test", "testing"),
)
"""Usual names of held-out splits; of those that are present the first one here is the validation split."""
_SUFFIXES = re.compile(r"(?<=[a-z])(set|data|split|images|imgs)$")
_SHOWN_NAMES = 4


# -- names -----------------------------------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is a system's or a tool's, and no one's data.

    >>> is_hidden(".ipynb_checkpoints"), is_hidden("@eaDir"), is_hidden("__unknown__")
    (True, True, False)
    """
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image that is read."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def split_word(name: str) -> str | None:
    """Return which of the usual names of splits a name stands for, in any case, or None.

    >>> split_word("Training"), split_word("VAL"), split_word("test_set"), split_word("trainer"), split_word("set")
    ('training', 'val', 'test', None, None)
    """
    word = _SUFFIXES.sub("", re.sub(r"[\W_]+", "", name).casefold())
    return word if word in (*TRAIN_NAMES, *HELD_OUT_NAMES) else None


def choose_splits(names: Iterable[str], place: str | os.PathLike[str]) -> list[str]:
    """Return the training split and the held-out ones, the best first, or nothing if not both kinds are there.

    Raises UserError if several of `names` stand for the training split.
    """
    words = {name: split_word(name) for name in names}
    train = [name for name, word in words.items() if word in TRAIN_NAMES]
    held_out = [name for wanted in HELD_OUT_NAMES for name, word in words.items() if word == wanted]
    if len(train) > 1:
        raise UserError(f"{place} has several training splits ({', '.join(train)}); keep one of them")
    return [*train, *held_out] if train and held_out else []


# -- the walk --------------------------------------------------------------------------------------------------------


@dataclass
class LeftOut:
    """What lies in a folder and is not read: counted by kind, with a few names of each."""

    expected: tuple[str, ...] = ()
    """Names of files that belong there and are no loss."""
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one, under a name that may stand for many."""
        self.counts[kind] += 1
        self.names.setdefault(kind, Counter())[name] += 1

    def __str__(self) -> str:
        """Such as `hidden or system folders: 2 (.cache, @eaDir), unread files: 3 (.txt 2, .db)`; empty for nothing."""
        parts = []
        for kind, count in self.counts.items():
            names = self.names[kind]
            shown = [name if times == 1 else f"{name} {times}" for name, times in names.most_common(_SHOWN_NAMES)]
            more = ", …" if len(names) > len(shown) else ""
            parts.append(f"{kind}: {count:,} ({', '.join(shown)}{more})")
        return ", ".join(parts)


@dataclass(frozen=True)
class Listing:
    """What a folder holds itself."""

    folders: dict[str, str]
    """Paths of its folders by name (Unicode NFC), in the order of the names."""
    images: list[str]
    """Paths of its images, in the order of their names."""


def list_folder(folder: str | os.PathLike[str], left_out: LeftOut) -> Listing:
    """List a folder, without what is hidden, a system's, or no image, which `left_out` counts.

    Names are compared in Unicode's composed form (NFC): file systems and archives store é in two ways.

    Raises:
        UserError: it cannot be read, or has a name that is not UTF-8 or that only looks different from another.
    """
    folders: dict[str, str] = {}
    images: list[str] = []
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        is_folder = _is_folder(entry)
        if is_hidden(entry.name):
            left_out.add("hidden or system folders" if is_folder else "hidden files", _printable(entry.name))
        elif is_folder:
            name = unicodedata.normalize("NFC", os.path.basename(require_utf8(entry.path)))
            if name in folders:
                raise UserError(f"{folder} has two folders named '{name}', spelt in two forms of Unicode; join them")
            folders[name] = entry.path
        elif is_image(entry.name):
            images.append(require_utf8(entry.path))
        elif entry.name not in left_out.expected:
            left_out.add("unread files", _printable(os.path.splitext(entry.name)[1].lower() or entry.name))
    return Listing(dict(sorted(folders.items())), images)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class Walk:
    """Finds the images in folders, each folder once whatever links lead to it.

    Args:
        roots: folders that a link from below must not lead into again.
        left_out: counts what is not read.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]], left_out: LeftOut) -> None:
        self.left_out = left_out
        self._seen: dict[tuple[int, int], str] = {}
        for root in roots:
            earlier = self._remember(root)
            if earlier is not None:
                raise UserError(f"the folders {earlier} and {root} are one and the same; remove the link")

    def _remember(self, folder: str | os.PathLike[str]) -> str | None:
        """Return the path by which a folder was reached earlier, or None for a new one."""
        status = os.stat(folder)
        path = os.fspath(folder)
        earlier = self._seen.setdefault((status.st_dev, status.st_ino), path)
        return earlier if earlier != path else None

    def images(self, root: str | os.PathLike[str], of_one_class: bool = True) -> list[str]:
        """Return the paths of all images below a folder, sorted.

        Raises UserError for folders in it that are splits, which would all be read as one class.
        """
        found: list[str] = []
        folders = [os.fspath(root)]
        while folders:
            folder = folders.pop()
            if self._remember(folder) is not None:
                self.left_out.add("links to folders already read", os.path.basename(folder))
                continue
            listing = list_folder(folder, self.left_out)
            if of_one_class and (splits := choose_splits(listing.folders, folder)):
                raise UserError(
                    f"{folder} holds splits ({', '.join(splits)}) where images of one class are looked for; "
                    "give a folder that holds the splits, and in each of them the classes"
                )
            found += listing.images
            folders += reversed(listing.folders.values())
        return sorted(found)
