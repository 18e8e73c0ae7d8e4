"""The `Latent` interface: what lies between 8-bit images and the model's input."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.config import LatentConfig
from gspn_dit.data.autoencoders import AUTOENCODERS, PER_CHANNEL, adapt, kind_of
from gspn_dit.data.vae import decode_in_tiles, load_vae, vae_hash
from gspn_dit.errors import UserError

SAVED_VAE = "vae"
"""Folder of an autoencoder beside the weights that go with it."""
UNSHIFTED_VALUES = 4096
"""Of a latent, such as [4, 32, 32], whose times are as they are drawn; those of larger ones are shifted to noise."""
VAE_BATCH = 8
"""Latents decoded, or images encoded, at a time: what lies between them is large."""


class Latent(ABC):
    """Encodes images to latents and decodes them; `spec` says which latent it is and travels with checkpoints."""

    channels: int
    """Channels of a latent."""
    size: int
    """Height and width of a latent."""
    image_size: int
    """Height and width of an image."""
    factor: int = 1
    """Image pixels per latent pixel, along each side."""
    image_channels: int
    """Channels of an image."""
    has_posterior: bool = False
    """Whether an image is encoded to a distribution, of which `encode` draws one latent."""

    @property
    def takes_one_size(self) -> bool:
        """Whether images of `image_size` alone can be encoded and decoded, and no other size or aspect."""
        return False

    @property
    def natural_shift(self) -> float:
        """Shift of times that suits the latents' size, where a config leaves it open; 1 for pixels."""
        return 1.0

    @abstractmethod
    def encode(self, images: np.ndarray, noise: Tensor | None = None) -> Tensor:
        """Return latents, float32 [B, channels, size, size], of uint8 images [B, H, W, C].

        Args:
            images: the images.
            noise: standard normal, [B, channels, size, size], where the latent has a posterior: mean + std · noise is
                drawn. None: its mean.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Return uint8 images [B, H, W, C] of latents; raises UserError if any is not finite."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return plain JSON values from which `latent_from_spec` builds an equal latent."""

    def to(self, device: torch.device | str) -> Latent:
        """Move what the latent computes with to a device."""
        return self

    def with_vae(self, vae: Any) -> Latent:
        """Return a copy that decodes with another autoencoder; raises ValueError where there is none to replace."""
        raise ValueError("latents that are pixels have no autoencoder to replace")

    def save(self, directory: Path) -> dict[str, Any]:
        """Write into a directory what decoding needs beside the spec; return the spec, its paths relative to it."""
        return self.spec()


class IdentityLatent(Latent):
    """Pixels scaled to [-1, 1]."""

    def __init__(self, image_size: int, image_channels: int) -> None:
        self.size = self.image_size = image_size
        self.channels = self.image_channels = image_channels

    def encode(self, images: np.ndarray, noise: Tensor | None = None) -> Tensor:
        return to_signed(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_uint8(latents)

    def spec(self) -> dict[str, Any]:
        return {"name": "identity", "image_size": self.size, "image_channels": self.channels}


class AutoencoderLatent(Latent):
    """Latents of an autoencoder of diffusers, (z - shift) · scale, z drawn from the posterior where there is one.

    Args:
        vae: the autoencoder, frozen, of a class in `gspn_dit.data.autoencoders`.
        image_size: height and width of the images in pixels.
        place: directory or hub name it was loaded from.
        scale, shift: those of a checkpoint or of encoded latents; None: the autoencoder's own.

    Raises:
        UserError: the autoencoder does not take images of that size.
    """

    def __init__(
        self,
        vae: Any,
        image_size: int,
        place: str,
        scale: PER_CHANNEL | None = None,
        shift: PER_CHANNEL | None = None,
    ) -> None:
        self.autoencoder = adapter = adapt(vae)
        if adapter.image_size not in (None, image_size):
            raise UserError(f"the VAE {place} takes images of {adapter.image_size} pixels, not of {image_size}")
        if image_size % adapter.factor:
            raise UserError(
                f"images of {image_size} pixels are not divisible by the factor {adapter.factor} of the VAE {place}"
            )
        if adapter.image_size is None:
            decode_in_tiles(vae, adapter.factor)
        self.place, self.hash = place, vae_hash(vae)
        self.factor, self.channels, self.image_channels = adapter.factor, adapter.channels, adapter.image_channels
        self.image_size, self.size = image_size, image_size // adapter.factor
        self.has_posterior = adapter.has_posterior
        self.scale = adapter.scale if scale is None else scale
        self.shift = adapter.shift if shift is None else shift

    @property
    def takes_one_size(self) -> bool:
        return self.autoencoder.image_size is not None

    @property
    def natural_shift(self) -> float:
        return shift_of_size(self.channels * self.size**2)

    @property
    def vae(self) -> Any:
        """The autoencoder itself, a model of diffusers."""
        return self.autoencoder.module

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is."""
        return self.vae.device

    @property
    def moment_channels(self) -> int:
        """Channels of `moments`: mean and log-variance, or the latent alone."""
        return self.channels * (2 if self.has_posterior else 1)

    @torch.no_grad()
    def moments(self, images: np.ndarray, batch_size: int = VAE_BATCH) -> Tensor:
        """Return what encoding uint8 images gives, before it is drawn from and normalised, float32.

        Mean and log-variance of the posteriors [B, 2 · channels, size, size], or the latents [B, channels, size, size].
        """
        pixels = to_signed(images).to(self.vae.device, self.vae.dtype)
        parts = [self.autoencoder.encode(part) for part in pixels.split(batch_size)]
        return torch.cat([torch.cat([p for p in part if p is not None], dim=1) for part in parts]).float().cpu()

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the latents that noise draws from `moments`; None: the means. float32 [B, channels, size, size]."""
        drawn, *log_variance = moments.float().split(self.channels, dim=1)
        if noise is not None and log_variance:
            drawn = drawn + torch.exp(0.5 * log_variance[0]) * noise
        return (drawn - _per_channel(self.shift, drawn)) * _per_channel(self.scale, drawn)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return what the autoencoder itself calls a latent, float32 [B, channels, size, size]: z / scale + shift."""
        return latents.float() / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)

    def encode(self, images: np.ndarray, noise: Tensor | None = None) -> Tensor:
        return self.draw(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        self.to(latents.device)
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.float()  # its activations overflow in float16
        parts = self.denormalise(latents).to(self.vae.dtype).split(VAE_BATCH)
        return np.concatenate([to_uint8(self.autoencoder.decode(part).float()) for part in parts])

    def spec(self) -> dict[str, Any]:
        return {
            "name": kind_of(self.autoencoder.class_name),
            "vae": self.place,
            "vae_hash": self.hash,
            "scale": self.scale,
            "shift": self.shift,
            "image_size": self.image_size,
            "image_channels": self.image_channels,
        }

    def save(self, directory: Path) -> dict[str, Any]:
        self.vae.register_to_config(_name_or_path=SAVED_VAE)  # not the place it was loaded from
        self.vae.save_pretrained(directory / SAVED_VAE, safe_serialization=True)
        return {**self.spec(), "vae": SAVED_VAE, "vae_hash": vae_hash(self.vae)}  # of what is saved, in its dtype

    def with_vae(self, vae: Any) -> Latent:
        other = copy.copy(self)
        other.autoencoder, other.hash = adapt(vae), vae_hash(vae)
        return other

    def to(self, device: torch.device | str) -> AutoencoderLatent:
        self.vae.to(device)
        return self


def shift_of_size(values: int) -> float:
    """Return √(values / 4096), at least 1: more values say more of an image at the same noise (arXiv 2510.11690)."""
    return max(1.0, (values / UNSHIFTED_VALUES) ** 0.5)


def _per_channel(value: PER_CHANNEL, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device).reshape(-1, 1, 1)


def to_signed(images: np.ndarray) -> Tensor:
    """Turn uint8 images [B, H, W, C] into float32 [B, C, H, W] in [-1, 1]: v / 127.5 - 1."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images [B, C, H, W] in [-1, 1] into uint8 [B, H, W, C]: 127.5·x + 128, clamped and truncated as in ADM."""
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise UserError(
            f"{bad} of {len(images)} samples hold NaN or infinite values: the weights have diverged; "
            "use an earlier checkpoint"
        )
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def create_latent(config: LatentConfig, image_size: int, image_channels: int) -> Latent:
    """Build the latent a config names for images of a size and a number of channels."""
    if config.name == "identity":
        return IdentityLatent(image_size, image_channels)
    assert config.vae is not None
    latent = AutoencoderLatent(load_vae(config.vae), image_size, where(config.vae))
    if latent.spec()["name"] != config.name:
        class_name = latent.autoencoder.class_name
        raise UserError(
            f"latent.name is {config.name}, but {config.vae} is an {class_name}; set latent.name {kind_of(class_name)}"
        )
    return latent


def where(place: str) -> str:
    """Return the absolute path of a directory, so that it is found from elsewhere, or the name of a VAE on the hub."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def latent_from_spec(spec: Mapping[str, Any], vae: str | None = None, directory: Path | None = None) -> Latent:
    """Build the latent that `Latent.spec` described.

    Args:
        spec: of a checkpoint, or of encoded latents.
        vae: where the autoencoder lies now; None: where it was.
        directory: of the checkpoint, in which it may lie.

    Raises:
        UserError: a latent this version does not know; an autoencoder that is missing, or is not the one of `spec`.
    """
    name = spec.get("name")
    if name == "identity":
        if vae is not None:
            raise UserError(f"the checkpoint generates pixels and takes no VAE (given: {vae})")
        return IdentityLatent(int(spec["image_size"]), int(spec["image_channels"]))
    if name not in AUTOENCODERS:
        raise UserError(f"the checkpoint's latent '{name}' is not known to this version")
    place = vae or spec["vae"]
    if vae is None and place == SAVED_VAE and directory is not None:
        place = str(directory / SAVED_VAE)
    try:
        loaded = load_vae(place)
    except UserError as error:
        if vae is not None:
            raise
        raise UserError(f"{error} (recorded with the latents; say where it lies now: --vae or latent.vae)") from None
    latent = AutoencoderLatent(loaded, int(spec["image_size"]), where(place), spec.get("scale"), spec.get("shift"))
    refuse_other_vae(spec, latent.spec())  # of converted weights the spec may know less
    return latent


def refuse_other_vae(expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise UserError, naming both, if two specs are not of one latent; where the autoencoder lies does not matter."""
    if any(given.get(key) != value for key, value in expected.items() if key != "vae"):
        raise UserError(f"the latents are those of {_describe(expected)}, but given is {_describe(given)}")


def _describe(spec: Mapping[str, Any]) -> str:
    size = f"images of {spec.get('image_size')} pixels"
    if spec.get("name") not in AUTOENCODERS:
        return f"latent '{spec.get('name')}', {size}"
    known = {"hash": str(spec.get("vae_hash"))[:12], "scale": spec.get("scale"), "shift": spec.get("shift")}
    return f"the VAE {spec['vae']} ({', '.join(f'{key} {value}' for key, value in known.items())}), {size}"


def latent_shape(latent: Latent, multiple: int, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Return channels, height and width of the latents of images of a size in pixels, None for that of training.

    Raises ValueError for a side whose latent is no positive multiple of `multiple`, as the model needs, and for another
    size than that of training where the autoencoder draws no other.
    """
    sides, trained = [], latent.size * latent.factor
    for name, pixels in (("height", height), ("width", width)):
        pixels = trained if pixels is None else pixels
        if pixels != trained and latent.takes_one_size:
            raise ValueError(f"{name} is {pixels} pixels, but the autoencoder draws {trained}x{trained} alone")
        if pixels < 1 or pixels % (latent.factor * multiple):
            raise ValueError(
                f"{name} is {pixels} pixels, but must be a positive multiple of {latent.factor * multiple}"
            )
        sides.append(pixels // latent.factor)
    return latent.channels, sides[0], sides[1]
