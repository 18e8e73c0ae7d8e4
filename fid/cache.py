"""Features and moments of real images, kept between evaluations under the hash of the images and of the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.distributed import World
from fid.extraction import Extraction, extract_all
from fid.features import FeatureNet
from fid.labelled import LabelledImages, image_digests
from fid.moments import Moments
from gspn_dit.errors import UserError
from gspn_dit.files import cannot_hold, write_whole

FORMAT_VERSION = 1


def default_directory() -> Path | None:
    """`gspn-dit/statistics` in the user's cache directory, or None where there is none that can be written."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home, and no entry in the list of users, as in a container with a user id of its own
        return None
    directory = caches / "gspn-dit" / "statistics"
    return None if cannot_hold(directory) else directory


def cache_key(images_sha256: str, net: FeatureNet) -> str:
    """The hash of everything that decides the features: the images, the weights, and how they are applied."""
    parts = [FORMAT_VERSION, images_sha256, net.sha256, net.layers, net.description, version("torch-fidelity")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def extract_cached(
    images: LabelledImages,
    nets: Sequence[FeatureNet],
    cache: Path | None,
    *,
    batch_size: int,
    world: World,
    **options: Any,
) -> tuple[list[Extraction], str]:
    """`extract_all`, answered from `cache` where it knows these images and nets, and remembered there."""
    if cache is None:
        return extract_all(images, nets, batch_size=batch_size, world=world, **options)
    sha256 = _content_hash(images, batch_size, world)
    files = [cache / f"{cache_key(sha256, net)}.safetensors" for net in nets]
    known = [read(file) for file in files] if world.is_main else []
    found = [extraction for extraction in known if extraction is not None]
    if world.agree(len(found) == len(nets)):
        return found, sha256
    extracted, sha256 = extract_all(images, nets, batch_size=batch_size, world=world, **options)
    if world.is_main:
        for file, extraction in zip(files, extracted, strict=True):
            write(extraction, file)
    return extracted, sha256


def _content_hash(images: LabelledImages, batch_size: int, world: World) -> str:
    digests = [np.zeros((0, 32), np.uint8)]
    digests += [image_digests(images.pixels[batch.start : batch.stop]) for batch in world.own(len(images), batch_size)]
    gathered = world.gather(torch.from_numpy(np.concatenate(digests)), len(images), batch_size)
    return images.hash_of(gathered.numpy()) if world.is_main else ""


def write(extraction: Extraction, path: Path) -> None:
    """Write an extraction as safetensors."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {"features": extraction.features.contiguous()}
    if extraction.logits is not None:
        tensors["logits"] = extraction.logits.contiguous()
    for layer, moments in extraction.moments.items():
        tensors[f"{layer}.count"] = torch.tensor([moments.count])
        tensors |= {f"{layer}.mean": moments.mean, f"{layer}.scatter": moments.scatter}
    try:
        write_whole(path, save(tensors, metadata={"key": path.stem}))
    except OSError as error:
        raise UserError(
            f"the statistics cannot be kept in {path.parent}: {error.strerror or error}; give --cache DIR or --no-cache"
        ) from error


def read(path: Path) -> Extraction | None:
    """What `write` wrote, or None where there is nothing or nothing whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("key") != path.stem:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return None
    layers = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
    moments = {
        layer: Moments(int(tensors[f"{layer}.count"][0]), tensors[f"{layer}.mean"], tensors[f"{layer}.scatter"])
        for layer in layers
    }
    return Extraction(tensors["features"], tensors.get("logits"), moments)
