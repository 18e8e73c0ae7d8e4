"""Autoencoders: diffusers' `AutoencoderKL`, found by directory or hub name, told apart by the hash of their weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

TILE_PIXELS = 512
"""Larger images are decoded in overlapping tiles of this size, so that memory does not grow with the image."""
_NOT_OF_THE_NETWORK = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast")


def load_vae(name: str | os.PathLike[str]) -> AutoencoderKL:
    """Load an AutoencoderKL in float32, frozen, on the CPU; nothing is unpickled.

    Args:
        name: a directory that `save_pretrained` wrote (or a pipeline's, with the autoencoder in `vae/`), or a name on
            the Hugging Face hub.

    Raises:
        UserError: there is none, it is damaged, or it is no AutoencoderKL with safetensors.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.utils import logging

    place = Path(name)
    if not place.exists() and (place.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1):
        raise UserError(f"the VAE {name} does not exist; give an AutoencoderKL's directory, or its hub name OWNER/NAME")
    if place.is_dir() and not (place / "config.json").exists() and (place / "vae" / "config.json").exists():
        place = place / "vae"
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the one line below says what matters
    try:
        vae, loading = AutoencoderKL.from_pretrained(
            str(place if place.exists() else name),
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            raise ValueError(f"it has no weights '{sorted(loading['missing_keys'])[0]}'")
    except Exception as error:  # whatever the files lead diffusers to
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name} cannot be loaded as an AutoencoderKL with safetensors: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    if vae.config.in_channels not in (1, 3) or vae.config.in_channels != vae.config.out_channels:
        raise UserError(
            f"the VAE {name} maps {vae.config.in_channels} channels to {vae.config.out_channels}; needed are 1 or 3"
        )
    factor = vae_factor(vae)
    vae.tile_sample_min_size = max(TILE_PIXELS, factor)
    vae.tile_latent_min_size = vae.tile_sample_min_size // factor
    vae.enable_tiling()
    return vae.float().eval().requires_grad_(False)


def vae_factor(vae: AutoencoderKL) -> int:
    """Return how many pixels lie behind the side of a latent's cell."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def vae_hash(vae: AutoencoderKL) -> str:
    """Return the SHA-256 of the network: its architecture and its float32 weights by name, whatever file holds them."""
    digest = hashlib.sha256(json.dumps(_architecture(vae), sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _architecture(vae: AutoencoderKL) -> dict[str, Any]:
    config = json.loads(vae.to_json_string()) if hasattr(vae, "to_json_string") else dict(vae.config)
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_NETWORK}


def scale_and_shift(vae: AutoencoderKL) -> tuple[float | list[float], float | list[float]]:
    """Return what makes latents of unit variance, (latent - shift) · scale: numbers, or one per channel."""
    config = vae.config
    scale, mean, std = config["scaling_factor"], config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return float(scale), float(config.get("shift_factor") or 0.0)
    return [float(scale) / float(value) for value in std], [float(value) for value in mean]
