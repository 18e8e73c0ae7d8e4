"""From a config to its data: batches of latents, the latent behind them, and what a checkpoint says of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gspn_dit.config import Config
from gspn_dit.data.batches import Batches, LatentBatches
from gspn_dit.data.buckets import BucketBatches
from gspn_dit.data.images import ImageSet, evenly_spaced, load_splits
from gspn_dit.data.latent_shards import LatentSet
from gspn_dit.data.latents import AutoencoderLatent, Latent, create_latent, latent_from_spec
from gspn_dit.data.sources import SOURCES, find_source
from gspn_dit.errors import LocalUserError, UserError

FINGERPRINT_IMAGES = 64
"""Evenly spaced images whose pixels enter the fingerprint of a data set."""


class SampleSource(Protocol):
    """What every set of images, latents or stream can tell of itself."""

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> list[str]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the set before a run."""

    def __len__(self) -> int: ...


class TrainingBatches(Protocol):
    """Batches by sample number."""

    @property
    def images(self) -> SampleSource: ...
    def shuffled(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]: ...
    def at(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Data:
    """What the sections `data` and `latent` of a config stand for."""

    training: TrainingBatches
    validation: Batches | LatentBatches | BucketBatches | None
    """None if the source has no validation split and `data.validation_fraction` is 0."""
    latent: Latent
    fingerprint: str
    """By which other data are noticed when a run is resumed."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint records of the data."""
        images = self.training.images
        return {"name": images.name, "images": len(images), "fingerprint": self.fingerprint}


def build_data(config: Config) -> Data:
    """Open what a config names; raises UserError for whatever does not exist or does not fit."""
    data = config.data
    source = find_source(data.name)
    if data.buckets and (data.streaming or source.images is None):
        kind = "data.streaming" if data.streaming else f"data.name {data.name}"
        raise UserError(f"data.buckets does not go with {kind}: it needs images that can be asked for; leave it out")
    if data.streaming:
        if source.stream is None:
            able = ", ".join(name for name, source in SOURCES.items() if source.stream is not None)
            raise UserError(f"data.streaming is for data.name {able}, not {data.name}")
        return _build_stream(config, source.stream)
    return _build_latents(config, source.latents) if source.latents is not None else _build_images(config)


def _build_images(config: Config) -> Data:
    data = config.data
    as_stored, held_out = load_splits(data.name, data.path, data.image_size, data.validation_fraction)
    latent = create_latent(config.latent, as_stored.image_size, as_stored.channels)
    training = in_channels_of(latent, as_stored)
    held_out = None if held_out is None else in_channels_of(latent, held_out)
    batches: Batches | BucketBatches
    validation: Batches | BucketBatches | None
    if sizes := data.bucket_sizes():
        batches = BucketBatches(training, latent, config.seed, sizes, data.horizontal_flip)
        validation = None if held_out is None else BucketBatches(held_out, latent, config.seed, sizes)
    else:
        batches = Batches(training, latent, config.seed, data.horizontal_flip)
        validation = None if held_out is None else Batches(held_out, latent, config.seed)
    try:  # every process decodes the same images before anything is written, so one of them tells
        batches.decode_small_set()
        if validation is not None:
            validation.decode_small_set()
        return Data(batches, validation, latent, fingerprint(training))
    except LocalUserError as error:
        raise UserError(str(error)) from None


def _build_latents(config: Config, open_latents: Callable[[str | None, str, float], LatentSet]) -> Data:
    data = config.data
    training = open_latents(data.path, "train", data.validation_fraction)
    latent = latent_from_spec(training.manifest["latent"], config.latent.vae)
    assert isinstance(latent, AutoencoderLatent)
    if data.image_size not in (None, latent.image_size):
        raise UserError(
            f"data.image_size is {data.image_size}, but {data.path} was encoded from {latent.image_size} pixels"
        )
    validation = None
    if training.has_validation or data.validation_fraction > 0:
        held_out = open_latents(data.path, "validation", data.validation_fraction)
        validation = LatentBatches(held_out, latent, config.seed)
    batches = LatentBatches(training, latent, config.seed, data.horizontal_flip)
    return Data(batches, validation, latent, training.fingerprint)


def _build_stream(config: Config, read: Callable[[str | None], dict[str, Any]]) -> Data:
    from accelerate import PartialState

    from gspn_dit.data.streams import StreamBatches, open_stream

    data, state = config.data, PartialState()
    stream, held_out = open_stream(data.path, data.image_size, config.training.validation_images, read)
    latent = create_latent(config.latent, stream.image_size, stream.channels)
    stream = dataclasses.replace(stream, channels=latent.image_channels)
    validation = None if held_out is None else Batches(in_channels_of(latent, held_out), latent, config.seed)
    batches = StreamBatches(
        stream,
        latent,
        config.seed,
        data.horizontal_flip,
        data.streaming_shuffle_images,
        state.process_index,
        state.num_processes,
    )
    facts = [stream.class_names, stream.image_size, stream.channels, len(stream), stream.dataset.num_shards]
    return Data(batches, validation, latent, hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16])


def in_channels_of(latent: Latent, images: ImageSet) -> ImageSet:
    """Return images in the channels that a latent takes: an autoencoder of RGB encodes grey ones, too."""
    return dataclasses.replace(images, channels=latent.image_channels)


def fingerprint(images: ImageSet) -> str:
    """Return a hash of labels, class names, geometry and some of the pixels, by which another set is noticed."""
    facts = [images.class_names, images.image_size, images.channels, len(images)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(images.labels.astype("<i8").tobytes())
    some = evenly_spaced(len(images), FINGERPRINT_IMAGES)
    digest.update(images.pixels(some).tobytes())
    return digest.hexdigest()[:16]
