"""What a dry run has to know of a config's data; of data that are not there, ImageNet's figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gspn_dit.config import Config
from gspn_dit.data.latents import shift_of_size
from gspn_dit.data.sources import find_source
from gspn_dit.errors import UserError

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
KL_CHANNELS, KL_FACTOR = 4, 8
"""Of the autoencoder that DiT and GSPN use."""


@dataclass(frozen=True)
class DataFacts:
    """What training needs to know of its data."""

    images: int
    num_classes: int
    channels: int
    """Of the latent."""
    size: int
    """Height and width of the latent."""
    bytes: int
    """On disk for latents, decoded for images."""
    source: str
    """Where these figures come from."""
    encoded: bool = False
    """Whether the model learns an autoencoder's latents, on disk or not."""

    @property
    def natural_shift(self) -> float:
        """As `Latent.natural_shift`."""
        return shift_of_size(self.channels * self.size**2) if self.encoded else 1.0


def data_facts(config: Config) -> DataFacts:
    """Look at the data of a config, or, where they are not there, take ImageNet's figures.

    Raises UserError for data that are damaged, or where neither the data nor the config tell the size of the images.
    """
    data = config.data
    source = find_source(data.name)
    if not source.bundled and not (data.path and Path(data.path).exists()):
        return unseen_facts(config, IMAGENET_IMAGES, "ImageNet's figures")
    if source.latents is not None:  # opened without the autoencoder, which may have to be downloaded
        latents = source.latents(data.path, "train", data.validation_fraction)
        spec, size_bytes = latents.manifest["latent"], sum(shard["bytes"] for shard in latents.manifest["shards"])
        shape = spec["channels"], spec["size"]
        return DataFacts(len(latents), latents.num_classes, *shape, size_bytes, str(data.path), encoded=True)
    from gspn_dit.data.build import build_data

    built = build_data(config)
    images, latent = built.training.images, built.latent
    size_bytes = len(images) * latent.image_size**2 * latent.image_channels
    where = data.path or f"the {data.name} that are bundled"
    encoded = config.latent.name != "identity"
    return DataFacts(len(images), images.num_classes, latent.channels, latent.size, size_bytes, where, encoded)


def unseen_facts(config: Config, images: int, whose: str) -> DataFacts:
    """Return the figures of data that are not there: so many RGB images, `whose` figures they are.

    Raises UserError where the config does not tell the size of the images.
    """
    data, source = config.data, f"{whose}: data.path {config.data.path} is not there"
    if data.image_size is None:
        raise UserError(f"data.path {data.path} is not there; a dry run without data needs data.image_size")
    if find_source(data.name).latents is None and config.latent.name == "identity":
        size_bytes = images * data.image_size**2 * 3
        return DataFacts(images, IMAGENET_CLASSES, 3, data.image_size, size_bytes, source)
    if data.image_size % KL_FACTOR:
        raise UserError(f"data.image_size {data.image_size} is not divisible by {KL_FACTOR}, the autoencoder's factor")
    size = data.image_size // KL_FACTOR
    # Mean and log-variance of each image and its mirror image, float16.
    size_bytes = images * 2 * 2 * KL_CHANNELS * size**2 * 2
    return DataFacts(images, IMAGENET_CLASSES, KL_CHANNELS, size, size_bytes, source, encoded=True)
