"""Encoded latents on disk: shards of moments that are memory-mapped, and a manifest that is written last.

    manifest.json             source, autoencoder, transform, class names; images, bytes and SHA-256 of each shard
    shard-00000.safetensors   moments float16 [n, 2, 2·C, h, w], labels int64 [n], indices int64 [n]

The moments of an image are mean and log-variance of its posterior, as it is and mirrored; of an autoencoder without
a posterior the latent alone, C channels. A shard is written beside its place, fsynced and renamed: it is complete or
absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gspn_dit.data.folders import LeftOut, choose_splits, list_folder
from gspn_dit.data.image_sources import require_directory, split_rows
from gspn_dit.errors import UserError
from gspn_dit.files import sha256_of

FORMAT_VERSION = 1
MANIFEST, PLAN = "manifest.json", "plan.json"
CAPTIONS = "captions.jsonl"
"""Where captions are kept: a list of texts a line, in the order of the shards' images."""
_FACTS = "gspn_dit"  # one key: safetensors does not keep the order of several
_DTYPES = {"F16": np.float16, "I64": np.int64}


def shard_name(number: int) -> str:
    """Return the file name of a shard.

    >>> shard_name(7)
    'shard-00007.safetensors'
    """
    return f"shard-{number:05d}.safetensors"


def to_json(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest: the same for the same values."""
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def shard_bytes(moments: np.ndarray, labels: np.ndarray, indices: np.ndarray, facts: Mapping[str, Any]) -> bytes:
    """Return the content of a shard.

    Args:
        moments: float16 [n, 2, 2·C, h, w].
        labels: class ids, int64 [n].
        indices: place of each image in the source, int64 [n].
        facts: plain JSON values about the images; the digest of the arrays is added.
    """
    from safetensors.numpy import save

    # safetensors writes memory as it lies, whatever the strides say.
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in (("moments", moments), ("labels", labels), ("indices", indices))
    }
    complete = {**facts, "sha256": _digest(arrays)}
    return save(arrays, metadata={_FACTS: json.dumps(complete, sort_keys=True)})


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("moments", "labels", "indices"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard whose arrays are mapped, not read. Raises UserError if it is missing or not a shard."""

    path: Path

    @cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= 1 << 20:
                    raise ValueError("no safetensors header")
                header = json.loads(file.read(length))
            size = self.path.stat().st_size
            if size != 8 + length + max(header[name]["data_offsets"][1] for name in ("moments", "labels", "indices")):
                raise ValueError(f"{size} bytes, cut short")
        except FileNotFoundError:
            raise UserError(f"the shard {self.path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the shard {self.path} is damaged: {error}") from None
        return header, 8 + length

    def _map(self, name: str) -> np.ndarray:
        header, start = self._header
        entry = header[name]
        if not all(entry["shape"]):
            return np.empty(entry["shape"], _DTYPES[entry["dtype"]])
        offset = start + entry["data_offsets"][0]
        return np.asarray(np.memmap(self.path, _DTYPES[entry["dtype"]], "r", offset, tuple(entry["shape"])))

    @property
    def facts(self) -> dict[str, Any]:
        """What was recorded of the images: `skipped` and `converted`."""
        return json.loads(self._header[0]["__metadata__"][_FACTS])

    @cached_property
    def moments(self) -> np.ndarray:
        """float16 [n, 2, 2·C, h, w]: image, mirrored, channel."""
        return self._map("moments")

    @cached_property
    def labels(self) -> np.ndarray:
        return np.array(self._map("labels"))

    @cached_property
    def indices(self) -> np.ndarray:
        """Place of each image in the source, int64 [n]."""
        return np.array(self._map("indices"))

    def is_intact(self) -> bool:
        """Tell whether the arrays are those that were written; reads all of them."""
        try:
            arrays = {name: self._map(name) for name in ("moments", "labels", "indices")}
            return _digest(arrays) == self.facts["sha256"]
        except (UserError, KeyError, ValueError):
            return False

    def entry(self) -> dict[str, Any]:
        """Return what the manifest says of the shard; reads all of it."""
        return {
            "file": self.path.name,
            "images": len(self.labels),
            "bytes": self.path.stat().st_size,
            "sha256": sha256_of(self.path),
        }


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of encoded latents; raises UserError if there is none, or it is of another version."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        version = manifest["format_version"]
    except FileNotFoundError:
        unfinished = (directory / PLAN).exists()
        remedy = "it is unfinished: continue with --resume" if unfinished else "write them with gspn_dit.prepare.encode"
        raise UserError(f"{directory} holds no encoded latents (no {MANIFEST}); {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / MANIFEST} cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{directory} has format_version {version}, this version reads {FORMAT_VERSION}")
    return manifest


def find_damage(directory: Path, entry: Mapping[str, Any], thorough: bool) -> str | None:
    """Return what is wrong with a shard of a manifest, or None.

    Args:
        thorough: hash the content; else only its size is compared.
    """
    path = directory / entry["file"]
    if not path.is_file():
        return f"the shard {path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"the shard {path} has {size} bytes instead of {entry['bytes']}"
    if thorough and sha256_of(path) != entry["sha256"]:
        return f"the shard {path} is damaged (checksum)"
    return None


@dataclass(frozen=True)
class LatentSet:
    """Encoded images; `moments` reads rows from the maps of the shards."""

    directory: Path
    manifest: dict[str, Any]
    shards: tuple[Shard, ...]
    rows: np.ndarray
    """Row of each item among those of all shards, int64 [n]."""
    has_validation: bool = False
    """Whether the source comes with a validation split of its own."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by class id."""
        return list(self.manifest["class_names"])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the set: what was left out when it was encoded."""
        skipped = self.manifest.get("skipped", [])
        return (f"left out when it was encoded: {len(skipped):,} unreadable images",) if skipped else ()

    @cached_property
    def labels(self) -> np.ndarray:
        """Class ids, [n] int64."""
        return _all_labels(self.shards)[self.rows]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(entry["images"] for entry in self.manifest["shards"])])

    @cached_property
    def _maps(self) -> list[memoryview]:
        return [shard.moments.reshape(-1).view(np.uint8).data for shard in self.shards]

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self.shards[0].moments.shape[2:]

    def moments(self, items: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Return mean and log-variance of items, float16 [n, 2·C, h, w].

        Args:
            items: numbers in this set, int64 [n].
            mirrored: whether to take those of the mirrored image, bool [n].
        """
        rows, maps = self.rows[items], self._maps
        out = np.empty((len(rows), *self._shape), dtype=np.float16)
        size = int(np.prod(self._shape)) * out.itemsize
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        offsets = (2 * (rows - self._starts[shards]) + mirrored) * size
        target = out.reshape(-1).view(np.uint8).data  # slices of it cost less than those of arrays
        for place, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist())):
            target[place * size : (place + 1) * size] = maps[shard][offset : offset + size]
        return out

    @property
    def fingerprint(self) -> str:
        """A hash by which other latents, or another split of them, are noticed."""
        digest = hashlib.sha256(to_json({**self.manifest, "latent": {**self.manifest["latent"], "vae": None}}))
        digest.update(self.rows.astype("<i8").data)
        return digest.hexdigest()[:16]


def _all_labels(shards: Sequence[Shard]) -> np.ndarray:
    return np.concatenate([shard.labels for shard in shards])


def open_latents(
    path: str | os.PathLike[str] | None, split: str = "train", validation_fraction: float = 0.1
) -> LatentSet:
    """Open what `gspn_dit.prepare.encode` wrote; sizes are checked, checksums only by its --verify.

    Args:
        path: a directory of latents, or one that holds two of them: `train` and `validation` (or `val`, `test`).
        split: "train" or "validation".
        validation_fraction: in [0, 0.5]; the share held out where there is one directory (deterministic, stratified).

    Raises:
        UserError: there are none, a shard is missing, damaged or of another size, or two directories do not match.
    """
    directory = require_directory("latents", path)
    if not (directory / MANIFEST).exists():
        folders = [name for name in list_folder(directory, LeftOut()).folders if (directory / name / MANIFEST).exists()]
        if splits := choose_splits(folders, directory):
            train, validation = (read_manifest(directory / name) for name in splits[:2])
            for key in ("class_names", "latent"):
                if train[key] != validation[key]:
                    raise UserError(f"{directory}: '{key}' of {splits[0]} and {splits[1]} differ; encode both alike")
            return open_shards(directory / splits[0 if split == "train" else 1], has_validation=True)
    everything = open_shards(directory)
    if "latent" not in everything.manifest:
        raise UserError(f"{directory} holds features, not latents; they are for training.repa_features")
    if validation_fraction == 0 and split == "train":
        return everything
    rows = split_rows(everything.labels, split, validation_fraction, f"set of latents {directory}")
    return LatentSet(directory, everything.manifest, everything.shards, rows)


def open_shards(directory: Path, has_validation: bool = False) -> LatentSet:
    """Open one directory of shards, all of it; raises UserError as `open_latents` does."""
    manifest = read_manifest(directory)
    for entry in manifest["shards"]:
        if damage := find_damage(directory, entry, thorough=False):
            raise UserError(f"{damage}; encode it again with gspn_dit.prepare.encode")
    shards = tuple(Shard(directory / entry["file"]) for entry in manifest["shards"])
    count = sum(entry["images"] for entry in manifest["shards"])
    if not count:
        raise UserError(f"the latents {directory} hold no image")
    return LatentSet(directory, manifest, shards, np.arange(count), has_validation)
