"""Sets of generated images on disk, made chunk by chunk, so that an interrupted run resumes where it stopped.

DIR/000123-207.png …       a folder: index and class id
DIR/generation.json        what the images are a function of, and whether the set is complete

FILE.npz                   arr_0 uint8 [n, H, W, C] and arr_1 int64 [n], as ADM's evaluation reads it
FILE.json                  its generation.json
FILE.npz.partial/          its chunks until all are there
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gspn_dit.errors import UserError
from gspn_dit.files import cannot_hold, is_npz, is_temporary, write_atomically
from gspn_dit.grid import save_png, to_pil
from gspn_dit.locks import is_filled

FORMAT_VERSION = 1
SETTINGS = "generation.json"
MAY_DIFFER = ("checkpoint", "guide_checkpoint", "vae", "complete", "environment", "resumed", "training_shift")
"""Settings that a resumed run may change: they name places and machines, not images (weights have hashes); and what
follows from others, which older sets do not have."""
_IMAGE = re.compile(r"\d{6,}-\d+\.png")


def draw_labels(rule: str, seed: int, count: int, classes: Sequence[int]) -> np.ndarray:
    """Return the class ids of images 0 … count-1, int64 [count]; label i depends on (seed, i) and the classes alone.

    "uniform" draws each label at random, "balanced" takes the classes in turn.
    """
    from gspn_dit import rng

    ids = np.asarray(classes, dtype=np.int64)
    if rule == "balanced":
        return ids[np.arange(count) % len(ids)]
    uniforms = rng.uniform(seed, rng.Stream.SAMPLE_LABEL, range(count)).numpy()
    return ids[np.floor(uniforms * len(ids)).astype(np.int64)]


class SampleSet(ABC):
    """A set of images in the making.

    Args:
        path: where it goes.
        labels: class ids, int64 [n].
        chunk_size: images per chunk; chunk k holds the images from k · chunk_size on.
    """

    settings_path: Path
    """Where the settings are kept while the set is made."""

    def __init__(self, path: Path, labels: np.ndarray, chunk_size: int) -> None:
        self.path, self.labels, self.chunk_size = path, labels, chunk_size

    @property
    def num_chunks(self) -> int:
        return -(-len(self.labels) // self.chunk_size)

    def indices(self, chunk: int) -> range:
        """Return the indices of a chunk's images."""
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, len(self.labels)))

    def is_complete(self) -> bool:
        """Tell whether all of the set is there."""
        return bool((read_settings(self.path) or {}).get("complete"))

    def begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make room for the set, or for the rest of it, and record the settings; raises OSError."""
        stored = None if overwrite else read_settings(self.path)
        if stored is None:
            self.clear()
        self.settings_path.parent.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(self.settings_path.parent):
            if is_temporary(entry.name):
                os.unlink(entry)
        self._write_settings(self.settings_path, _continued(stored, settings) if stored else settings, complete=False)

    def _write_settings(self, path: Path, settings: Mapping[str, Any], complete: bool) -> None:
        text = json.dumps({**settings, "complete": complete}, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(path, text.encode())

    def _settings(self) -> dict[str, Any]:
        return json.loads(self.settings_path.read_bytes())

    @abstractmethod
    def clear(self) -> None:
        """Delete an earlier set, and nothing else."""

    @abstractmethod
    def missing(self) -> list[int]:
        """Return the chunks that are not there yet."""

    @abstractmethod
    def write(self, chunk: int, images: np.ndarray) -> None:
        """Write the images of a chunk, uint8 [n, H, W, C]; raises OSError."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the set when every chunk is there; raises OSError."""


class PngFolder(SampleSet):
    """A folder of PNG files."""

    def __init__(self, path: Path, labels: np.ndarray, chunk_size: int) -> None:
        super().__init__(path, labels, chunk_size)
        self.settings_path = path / SETTINGS

    def _name(self, index: int) -> str:
        return f"{index:06d}-{self.labels[index]}.png"

    def is_complete(self) -> bool:
        return super().is_complete() and not self.missing()

    def clear(self) -> None:
        if not self.path.is_dir():
            return
        if self.settings_path.is_file():
            self._write_settings(self.settings_path, self._settings(), complete=False)
        for entry in [entry for entry in os.scandir(self.path) if _IMAGE.fullmatch(entry.name)]:
            os.unlink(entry)
        self.settings_path.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        present = {entry.name for entry in os.scandir(self.path)}
        strange = {name for name in present if _IMAGE.fullmatch(name)}
        strange -= {self._name(index) for index in range(len(self.labels))}
        if strange:
            raise UserError(f"{self.path} holds images of another set ({min(strange)}); give another --out")
        chunks = range(self.num_chunks)
        return [chunk for chunk in chunks if any(self._name(index) not in present for index in self.indices(chunk))]

    def write(self, chunk: int, images: np.ndarray) -> None:
        for index, pixels in zip(self.indices(chunk), images, strict=True):
            save_png(to_pil(pixels), self.path / self._name(index))

    def finish(self) -> None:
        self._write_settings(self.settings_path, self._settings(), complete=True)


class NpzFile(SampleSet):
    """An .npz file of images and labels, put together chunk by chunk, never whole in memory."""

    def __init__(self, path: Path, labels: np.ndarray, chunk_size: int) -> None:
        super().__init__(path, labels, chunk_size)
        self.parts = _parts_directory(path)
        self.settings_path = self.parts / SETTINGS

    def _part(self, chunk: int) -> Path:
        return self.parts / f"{chunk:06d}.npy"

    def clear(self) -> None:
        """Delete the chunks of an earlier run; the file itself stays until the new one takes its place."""
        if self.parts.is_dir():
            shutil.rmtree(self.parts)

    def begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        super().begin(settings, overwrite)
        for target in (self.path, self.path.with_suffix(".json")):  # as large as the whole set, if killed at the end
            for left in self.path.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
                if is_temporary(left.name):
                    left.unlink()

    def missing(self) -> list[int]:
        return [chunk for chunk in range(self.num_chunks) if not self._part(chunk).is_file()]

    def write(self, chunk: int, images: np.ndarray) -> None:
        write_atomically(self._part(chunk), lambda file: np.save(file, images, allow_pickle=False))

    def finish(self) -> None:
        sidecar = self.path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # an earlier set's would tell lies about this one
        write_atomically(self.path, self._assemble)
        self._write_settings(sidecar, self._settings(), complete=True)
        shutil.rmtree(self.parts)

    def _read(self, chunk: int) -> np.ndarray:
        try:
            images = np.load(self._part(chunk), allow_pickle=False)
            if images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(self.indices(chunk)):
                return images
        except (ValueError, EOFError):
            pass
        raise UserError(f"{self._part(chunk)} is damaged; delete it and give --resume to make it again")

    def _assemble(self, file: BinaryIO) -> None:
        shape = self._read(0).shape[1:]
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with _open_member(archive, "arr_0", (len(self.labels), *shape), np.dtype(np.uint8)) as member:
                for chunk in range(self.num_chunks):
                    member.write(self._read(chunk).data)
            with _open_member(archive, "arr_1", self.labels.shape, self.labels.dtype) as member:
                member.write(self.labels.data)


def _open_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """Open an array of an .npz for writing, its header already written."""
    # A fixed date, so that equal sets are equal files.
    member = archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member


def open_set(path: str | os.PathLike[str], labels: np.ndarray, chunk_size: int) -> SampleSet:
    """Return the set that goes to a path: an .npz file or a folder."""
    path = Path(path)
    return (NpzFile if is_npz(path) else PngFolder)(path, labels, chunk_size)


def _parts_directory(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the settings of a set that is at a path, complete or not; None if there is none that says where from."""
    path = Path(path)
    candidates = [path / SETTINGS]
    if is_npz(path):
        candidates = [_parts_directory(path) / SETTINGS, *([path.with_suffix(".json")] if path.is_file() else [])]
    return next(filter(None, map(_read_settings, candidates)), None)


def _read_settings(file: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "format_version" in settings else None


def check_place(path: str | os.PathLike[str], resume: bool, overwrite: bool) -> None:
    """Raise UserError if a set cannot go to a path: something else is there, or a set without word what to do."""
    path = Path(path)
    if is_npz(path):
        if path.is_dir():
            raise UserError(f"--out {path} is a directory; give a file, or a name without .npz for a folder")
        filled = path.exists() or _parts_directory(path).exists()
        sidecar = path.with_suffix(".json")
        if not overwrite and sidecar.exists() and "image_format" not in (_read_settings(sidecar) or {}):
            raise UserError(
                f"--out {path}: {sidecar}, in which the set would be described, is there already and not of a set; "
                "give another --out, or --overwrite to replace it"
            )
    else:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; give a directory, or a name that ends in .npz")
        filled = is_filled(path)
    if problem := cannot_hold(path):
        raise UserError(f"--out {problem}")
    if not filled:
        return
    known = read_settings(path) is not None
    if not known and (resume or not is_npz(path)):
        raise UserError(f"--out {path} is not empty and holds no set with a {SETTINGS}; give another --out")
    if not (resume or overwrite):
        raise UserError(f"--out {path} exists; give --resume to continue it, --overwrite to replace it, or another")


def check_same_settings(path: str | os.PathLike[str], stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UserError naming the first setting that a resumed run may not change."""
    plain = json.loads(json.dumps(settings))
    for key in [*plain, *(key for key in stored if key not in plain)]:
        if key not in MAY_DIFFER and stored.get(key) != plain.get(key):
            raise UserError(
                f"--out {path} was begun with {key} = {json.dumps(stored.get(key))}, this run has "
                f"{json.dumps(plain.get(key))}; restore it, give --overwrite to start afresh, or another --out"
            )


def _continued(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored settings, with the environment in which the set is continued if it is another one."""
    environments = [stored.get("environment"), *stored.get("resumed", [])]
    now = json.loads(json.dumps(settings.get("environment")))
    if now in environments:
        return dict(stored)
    return {**stored, "resumed": [*stored.get("resumed", []), now]}
