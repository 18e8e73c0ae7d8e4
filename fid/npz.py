"""Arrays of NPZ files: small ones read, large ones mapped so that they never lie in memory; nothing is unpickled."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from gspn_dit.errors import UserError

IN_MEMORY_BYTES = 2**28
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names, by layer


class Archive:
    """An open NPZ file."""

    def __init__(self, path: Path, content: np.lib.npyio.NpzFile) -> None:
        self.path = path
        self.content = content
        self.names: list[str] = content.files

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def array(self, name: str) -> np.ndarray:
        """An array, mapped from the file (or from a temporary one if it is compressed) where it is large."""
        assert self.content.zip is not None
        member = next(entry for entry in (f"{name}.npy", name) if entry in self.content.zip.namelist())
        info = self.content.zip.getinfo(member)
        if info.file_size <= IN_MEMORY_BYTES:
            return self.content[name]
        with self.content.zip.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            if dtype.hasobject:
                raise ValueError("object arrays need pickle")
            offset, source = stream.tell(), self._stored_at(info)
            if source is not None:
                return np.memmap(self.path, dtype, "r", source + offset, shape, "F" if fortran else "C")
            with tempfile.TemporaryFile() as copy:  # the mapping keeps it alive
                shutil.copyfileobj(stream, copy, 2**24)
                copy.flush()
                return np.memmap(copy, dtype, "r", 0, shape, "F" if fortran else "C")

    def _stored_at(self, info: zipfile.ZipInfo) -> int | None:
        """Where an uncompressed member's bytes begin; None for a compressed one."""
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with open(self.path, "rb") as file:
            return info.header_offset + _local_header_length(file, info.header_offset)

    def statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and covariance in float64 by layer, as far as the file has them (ADM's mu, sigma, mu_s, sigma_s)."""
        found = {}
        for layer, (mean, covariance) in STATISTICS.items():
            if mean in self and covariance in self:
                found[layer] = _checked(self.array(mean), self.array(covariance), f"{mean}, {covariance}", self.path)
        if "spatial" in found and "features" not in found:
            raise UserError(f"{self.path} has mu_s and sigma_s, but neither mu nor sigma")
        return found


def _local_header_length(file: IO[bytes], offset: int) -> int:
    """Length of a ZIP member's local header, whose name and extra field may differ from the directory's."""
    file.seek(offset + 26)
    lengths = file.read(4)
    return 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _checked(mean: np.ndarray, covariance: np.ndarray, names: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{names} of {path} have the shapes {mean.shape}, {covariance.shape}; needed are [d], [d, d]")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"{names} of {path} are {mean.dtype}, {covariance.dtype}; floating-point numbers are needed")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise UserError(f"{names} of {path} hold NaN or infinite values")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(np.abs(covariance).max(initial=0))):
        raise UserError(f"{names} of {path}: the covariance is not symmetric")
    return mean, covariance


@contextmanager
def open_npz(path: Path) -> Iterator[Archive]:
    """Open an NPZ file; whatever is wrong with it, also while it is being read, is a UserError in one line."""
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array; an NPZ with arr_0 is needed (numpy.savez)")
        with content:
            yield Archive(path, content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if not path.is_dir() and not zipfile.is_zipfile(path):  # numpy takes whatever it does not know for a pickle
            raise UserError(f"{path} is no NPZ file (numpy.savez writes them), or a part of one") from error
        if "pickle" in str(error):
            raise UserError(f"{path} holds pickled objects, which are never loaded; save plain arrays") from error
        raise UserError(f"{path} cannot be read as NPZ: {error}") from error
