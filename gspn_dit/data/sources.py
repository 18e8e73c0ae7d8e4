"""The kinds of labelled data, by the name that `data.name` and the command lines give them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gspn_dit.data.image_sources import Parts, read_digits, read_image_folder, read_saved_dataset, stream_saved
from gspn_dit.data.latent_shards import LatentSet, open_latents
from gspn_dit.errors import UserError, nearest


@dataclass(frozen=True)
class Source:
    """What a kind of data can give of a path; None where it cannot.

    Each function raises UserError, in one line, for a path it cannot use.
    """

    images: Callable[[str | os.PathLike[str] | None], Parts] | None = None
    """Stored images, looked up by row: what training, evaluation, encoding and autoencoders read."""
    stream: Callable[[str | None], dict[str, Any]] | None = None
    """Images read in order (`data.streaming`): `datasets.IterableDataset`s by split, or "all" alone."""
    latents: Callable[[str | os.PathLike[str] | None, str, float], LatentSet] | None = None
    """Encoded images, by path, split ("train" or "validation") and the share that is held out."""
    bundled: bool = False
    """Whether it is always there, and takes no path."""


SOURCES: dict[str, Source] = {
    "digits": Source(images=read_digits, bundled=True),
    "imagefolder": Source(images=read_image_folder),
    "hf": Source(images=read_saved_dataset, stream=stream_saved),
    "latents": Source(latents=open_latents),
}


def find_source(name: str) -> Source:
    """Return a kind of data; raises UserError for an unknown name."""
    if name not in SOURCES:
        raise UserError(f"unknown data.name '{name}'; allowed are {', '.join(SOURCES)}{nearest(name, SOURCES)}")
    return SOURCES[name]


def image_sources() -> dict[str, Source]:
    """Return the kinds that hold images, whole and undecoded."""
    return {name: source for name, source in SOURCES.items() if source.images is not None}
