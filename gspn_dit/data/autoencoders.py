"""One interface to diffusers' autoencoders, whose classes differ in range, statistics, posterior and packing.

An adapter turns images in [-1, 1] into the latents that its class defines *before* any normalisation from outside, and
back; `scale` and `shift` say what brings them to unit variance, so that it is done exactly once, by
`gspn_dit.data.latents.AutoencoderLatent`. A class that normalises inside has scale 1 and shift 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gspn_dit.errors import UserError

PROBED_PIXELS = 256
"""Side of the imaginary image that tells how large a latent is."""
PER_CHANNEL = float | list[float]


class Autoencoder(ABC):
    """An autoencoder of diffusers behind one interface.

    Args:
        module: a model of the class `class_name`; what it computes with, frozen or not.
    """

    class_name: str
    """Of the diffusers class."""
    has_posterior = False
    """Whether an image is encoded to mean and log-variance."""
    image_size: int | None = None
    """The only height and width of images that it takes; None: any that its factor divides."""
    scale: PER_CHANNEL = 1.0
    shift: PER_CHANNEL = 0.0
    """(latent - shift) · scale has about unit variance: numbers, or one per channel."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.image_channels: int = self._image_channels(module.config)

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return latents [B, channels, h, w] of images [B, image_channels, H, W] in [-1, 1], and their log-variance.

        The latent of a class with a posterior is its mean; others have None in place of the log-variance.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, image_channels, H, W], about in [-1, 1], of latents [B, channels, h, w]."""

    def _image_channels(self, config: Any) -> int:
        inside, outside = config["in_channels"], config["out_channels"]
        if inside not in (1, 3) or inside != outside:
            raise UserError(f"it maps {inside} channels to {outside}; needed are 1 or 3")
        return inside

    @cached_property
    def _probe(self) -> tuple[int, int]:
        """Channels of a latent, and image pixels per latent cell: measured on an imaginary image, which costs nothing.

        `block_out_channels` tells neither of packed latents nor of an encoder that works on another size of images.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        size = self.image_size or PROBED_PIXELS
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            images = torch.zeros(1, self.image_channels, size, size, dtype=self.module.dtype, device=self.module.device)
            latent, _ = self.encode(images)
        return latent.shape[1], size // latent.shape[-1]

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self._probe[0]

    @property
    def factor(self) -> int:
        """Image pixels per latent cell, along each side."""
        return self._probe[1]


class KLAutoencoder(Autoencoder):
    """`AutoencoderKL`: a posterior; `scaling_factor` and `shift_factor`, or statistics by channel, in its config."""

    class_name = "AutoencoderKL"
    has_posterior = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.scale, self.shift = configured_scale(module.config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        posterior = self.module.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents).sample


class DeepCompressionAutoencoder(Autoencoder):
    """`AutoencoderDC` (DC-AE, arXiv 2410.10733): no posterior, factor 32 and more, `scaling_factor` in its config."""

    class_name = "AutoencoderDC"

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.scale, self.shift = configured_scale(module.config)

    def _image_channels(self, config: Any) -> int:
        if config["in_channels"] not in (1, 3):
            raise UserError(f"it takes images of {config['in_channels']} channels; needed are 1 or 3")
        return config["in_channels"]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.module.encode(images).latent, None

    def decode(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents).sample


class RepresentationAutoencoder(Autoencoder):
    """`AutoencoderRAE` (arXiv 2510.11690): images in [0, 1] of one size, resized and normalised inside."""

    class_name = "AutoencoderRAE"

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        if not module.reshape_to_2d:
            raise UserError("its latents are no planes (reshape_to_2d is false)")
        self.image_size = module.decoder_image_size

    def _image_channels(self, config: Any) -> int:
        if config["num_channels"] != 3:  # its statistics of colours are those of three channels
            raise UserError(f"it takes images of {config['num_channels']} channels; needed are 3")
        return 3

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.module.encode((images + 1) / 2).latent, None

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * self.module.decode(latents).sample - 1


class Flux2Autoencoder(Autoencoder):
    """`AutoencoderKLFlux2`: a posterior, whose cells are packed 2×2 into channels; a BatchNorm holds the statistics."""

    class_name = "AutoencoderKLFlux2"
    has_posterior = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        variance = module.bn.running_var.float() + module.config["batch_norm_eps"]
        self.scale, self.shift = variance.rsqrt().tolist(), module.bn.running_mean.float().tolist()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        posterior = self.module.encode(images).latent_dist
        side = self._side
        return pack(posterior.mean, side), pack(posterior.logvar, side)

    def decode(self, latents: Tensor) -> Tensor:
        return self.module.decode(unpack(latents, self._side)).sample

    @property
    def _side(self) -> int:
        sides = self.module.config["patch_size"]
        if sides[0] != sides[1]:
            raise UserError(f"it packs patches of {sides[0]}x{sides[1]} cells; needed are square ones")
        return sides[0]


def pack(latents: Tensor, side: int) -> Tensor:
    """Turn patches of side × side cells into channels: [B, C, h, w] to [B, C·side², h/side, w/side], channel outermost.

    >>> pack(torch.arange(8.0).reshape(1, 1, 2, 4), 2).tolist()
    [[[[0.0, 2.0]], [[1.0, 3.0]], [[4.0, 6.0]], [[5.0, 7.0]]]]
    """
    return torch.nn.functional.pixel_unshuffle(latents, side)


def unpack(latents: Tensor, side: int) -> Tensor:
    """Undo `pack`."""
    return torch.nn.functional.pixel_shuffle(latents, side)


def configured_scale(config: Any) -> tuple[PER_CHANNEL, PER_CHANNEL]:
    """Return scale and shift as a config has them, numbers or by channel: (latent - shift) · scale deviates by 1."""
    scale, mean, std = config["scaling_factor"], config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return float(scale), float(config.get("shift_factor") or 0.0)
    return [float(scale) / float(value) for value in std], [float(value) for value in mean]


AUTOENCODERS: dict[str, type[Autoencoder]] = {
    "kl": KLAutoencoder,
    "dc": DeepCompressionAutoencoder,
    "rae": RepresentationAutoencoder,
    "flux2": Flux2Autoencoder,
}
"""What `latent.name` may be, beside identity."""


def kind_of(class_name: str) -> str:
    """Return the name in `AUTOENCODERS` of a diffusers class; raises UserError for one that is not supported."""
    for kind, adapter in AUTOENCODERS.items():
        if adapter.class_name == class_name:
            return kind
    known = ", ".join(adapter.class_name for adapter in AUTOENCODERS.values())
    raise UserError(f"its class is {class_name}; supported are {known}")


def adapt(module: Any) -> Autoencoder:
    """Return the adapter of a diffusers autoencoder; raises UserError for a class that is not supported."""
    return AUTOENCODERS[kind_of(type(module).__name__)](module)
