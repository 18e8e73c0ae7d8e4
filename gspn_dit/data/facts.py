"""What a dry run has to know of a config's data; of data that are not there, ImageNet's figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gspn_dit.config import Config
from gspn_dit.data.autoencoders import adapt
from gspn_dit.data.latents import IdentityLatent, Latent, shift_of_size
from gspn_dit.data.sources import find_source
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import UserError

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
PUBLISHED = {"kl": (4, 8, True), "dc": (32, 32, False), "rae": (768, 16, False), "flux2": (128, 16, True)}
"""Channels, pixels per cell and whether there is a posterior, of an autoencoder of each kind: those that DiT and GSPN
use, of DC-AE, of RAE on DINOv2-B and of FLUX.2."""
SIDES, FLOAT16_BYTES = 2, 2
"""Encoded latents are those of an image and of its mirror image."""
MUCH_BYTES = 250 * 10**9
"""Of encoded latents, above which encoding while training is advised."""


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
    cache_bytes: int | None = None
    """What the latents of an autoencoder take, or would take, on disk; None for pixels."""

    @property
    def natural_shift(self) -> float:
        """As `Latent.natural_shift`."""
        return 1.0 if self.cache_bytes is None else shift_of_size(self.channels * self.size**2)


def cache_bytes(images: int, channels: int, size: int, posterior: bool) -> int:
    """Return what `gspn_dit.prepare.encode` writes: latents, or mean and log-variance, of both sides in float16."""
    return images * SIDES * (2 if posterior else 1) * channels * size**2 * FLOAT16_BYTES


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
        return DataFacts(len(latents), latents.num_classes, *shape, size_bytes, str(data.path), size_bytes)
    from gspn_dit.data.build import build_data

    built = build_data(config)
    images, latent = built.training.images, built.latent
    size_bytes = len(images) * latent.image_size**2 * latent.image_channels
    where = data.path or f"the {data.name} that are bundled"
    return DataFacts(
        *(len(images), images.num_classes, latent.channels, latent.size, size_bytes, where),
        cache_bytes=cache_of(latent, len(images)),
    )


def cache_of(latent: Latent, images: int) -> int | None:
    """Return what the latents of so many images would take on disk; None for pixels."""
    if isinstance(latent, IdentityLatent):
        return None
    return cache_bytes(images, latent.channels, latent.size, latent.has_posterior)


def unseen_facts(config: Config, images: int, whose: str) -> DataFacts:
    """Return the figures of data that are not there: so many RGB images, `whose` figures they are.

    Raises UserError where the config does not tell the size of the images.
    """
    data, source = config.data, f"data.path {config.data.path} does not exist; these are {whose}"
    if data.image_size is None:
        raise UserError(f"data.path {data.path} is not there; a dry run without data needs data.image_size")
    if find_source(data.name).latents is None and config.latent.name == "identity":
        size_bytes = images * data.image_size**2 * 3
        return DataFacts(images, IMAGENET_CLASSES, 3, data.image_size, size_bytes, source)
    channels, factor, posterior = _autoencoder(config)
    if data.image_size % factor:
        raise UserError(f"data.image_size {data.image_size} is not divisible by {factor}, the autoencoder's factor")
    size = data.image_size // factor
    written = cache_bytes(images, channels, size, posterior)
    encoded = find_source(data.name).latents is not None
    size_bytes = written if encoded else images * data.image_size**2 * 3
    return DataFacts(images, IMAGENET_CLASSES, channels, size, size_bytes, source, written)


def _autoencoder(config: Config) -> tuple[int, int, bool]:
    """Return channels, factor and whether there is a posterior: of the config's autoencoder, or of a published one."""
    name, vae = config.latent.name, config.latent.vae
    if vae is None or not Path(vae).exists():
        return PUBLISHED["kl" if name == "identity" else name]
    adapter = adapt(load_vae(vae))
    return adapter.channels, adapter.factor, adapter.has_posterior
