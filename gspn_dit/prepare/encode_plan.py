"""What an encoding is a function of: the images, and the plan that tells whether an unfinished one can go on."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.data.images import ImageSet, evenly_spaced
from gspn_dit.data.latent_shards import FORMAT_VERSION, PLAN
from gspn_dit.errors import UserError

if TYPE_CHECKING:
    from gspn_dit.data.captions import CaptionedImages
    from gspn_dit.data.latents import AutoencoderLatent

FINGERPRINT_IMAGES = 64
"""Evenly spaced images whose bytes enter the fingerprint of a source."""


def open_captioned(source: str, split: str, image_size: int, channels: int, column: str) -> CaptionedImages:
    """Open the images of a source with their captions, of which none is decoded yet; raises UserError."""
    from gspn_dit.config import DataConfig
    from gspn_dit.data.captions import load_captioned

    kind, _, place = source.partition(":")
    data = DataConfig(kind, place, image_size, validation_fraction=0, caption_column=column)
    found = load_captioned(data, split)
    return dataclasses.replace(found, images=dataclasses.replace(found.images, channels=channels))


def open_images(source: str, split: str, image_size: int, channels: int) -> ImageSet:
    """Open the images of a source, of which none is decoded yet; raises UserError."""
    from gspn_dit.data.images import open_source

    return open_source(source, split, image_size, channels, validation_fraction=0)


def source_fingerprint(images: ImageSet) -> str:
    """Return a hash of class names, labels, and the files of some of the images, as they lie in the source."""
    digest = hashlib.sha256(json.dumps([images.class_names, len(images)]).encode())
    digest.update(images.labels.astype("<i8").data)
    some = evenly_spaced(len(images), FINGERPRINT_IMAGES)
    for cell in images.cells(some):
        content = (cell or {}).get("bytes")
        path = (cell or {}).get("path")
        if content is None and path and Path(path).is_file():
            content = Path(path).read_bytes()
        digest.update(hashlib.sha256(content or b"").digest())
    return digest.hexdigest()


def make_plan(options: argparse.Namespace, images: ImageSet, latent: AutoencoderLatent) -> dict[str, Any]:
    """Return everything that the shards are a function of, as plain JSON values."""
    from gspn_dit.data.latents import where

    kind, _, place = options.source.partition(":")
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "name": f"{kind}:{where(place)}" if place else kind,
            "split": options.split,
            "images": len(images),
            "fingerprint": source_fingerprint(images),
        },
        "latent": latent.spec(),
        "vae_config": {key: value for key, value in dict(latent.vae.config).items() if not key.startswith("_")},
        "transform": {
            "crop": "ADM centre crop",
            "image_size": options.image_size,
            "flips": [False, True],
            "precision": options.precision,
            "batch_size": options.batch_size,
        },
        "shard_images": options.shard_images,
        "class_names": images.class_names,
    }


def check_same_plan(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raise UserError, by name, if an encoding cannot go on with other images, another autoencoder or other options."""
    from gspn_dit.config import flatten
    from gspn_dit.data.latents import refuse_other_vae

    now = json.loads(json.dumps(now))
    if {**(before.get("captions") or {}), "sha256": None} != {**(now.get("captions") or {}), "sha256": None}:
        raise UserError(f"--out {out} was begun with other captions; give what it was begun with, or another directory")
    try:
        if "latent" in now:
            refuse_other_vae(before.get("latent", {}), now["latent"])
    except UserError as error:
        raise UserError(f"--out {out} was begun with another VAE: {error}") from None
    places = ("source.name", "latent.vae", "features.encoder")
    old, new = dict(flatten(before)), dict(flatten(now))
    for key in new:
        if key not in places and old.get(key) != new[key]:
            raise UserError(
                f"--out {out} was begun with {key} = {old.get(key)}, now it is {new[key]}; "
                "give what it was begun with, or another directory"
            )


def read_plan(out: Path) -> dict[str, Any]:
    """Return what an unfinished encoding was begun with; raises UserError if it cannot be read."""
    try:
        return json.loads((out / PLAN).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{out / PLAN} cannot be read: {error}; encode into another directory") from None
