"""Files that are complete whenever they exist."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def write_atomically(path: str | os.PathLike[str], write: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, fsync it and rename it, so that a kill or a crash leaves all of it or nothing.

    `write` is the content, or is called with the open file. Raises OSError; the temporary file is gone then.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(write, bytes):
                file.write(write)
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` as `write_atomically` does, making the directory of `path` where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def cannot_hold(path: str | os.PathLike[str]) -> str | None:
    """Say why nothing can be written at a path that may not exist yet, or return None."""
    place = Path(path).absolute()
    parent = place if place.is_dir() else next(folder for folder in place.parents if folder.exists())
    if parent.is_dir() and os.access(parent, os.W_OK):
        return None
    return f"{path} cannot be created: {parent} is not a directory that can be written"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, which is read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def is_npz(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is meant as an NPZ file; anything else is a folder.

    >>> is_npz("sets/G.NPZ"), is_npz("sets/npz")
    (True, False)
    """
    return Path(path).suffix.lower() == ".npz"


def is_temporary(name: str) -> bool:
    """Tell whether a file's name is that of what a killed `write_atomically` leaves behind.

    >>> is_temporary(".000001-3.png.4711.tmp"), is_temporary("000001-3.png")
    (True, False)
    """
    return bool(_TEMPORARY.fullmatch(name))
