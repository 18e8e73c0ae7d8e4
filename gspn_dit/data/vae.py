"""diffusers' autoencoders: found by directory or hub name, told apart by the hash of their weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gspn_dit.data.autoencoders import AUTOENCODERS, adapt, kind_of
from gspn_dit.errors import UserError

TILE_PIXELS = 512
"""Larger images are decoded in overlapping tiles of this size, so that memory does not grow with the image."""
_NOT_OF_THE_NETWORK = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast")


def load_vae(name: str | os.PathLike[str]) -> Any:
    """Load an autoencoder in float32, frozen, on the CPU; nothing is unpickled.

    Args:
        name: a directory that `save_pretrained` wrote (or a pipeline's, with the autoencoder in `vae/`), or a name on
            the Hugging Face hub, of one of the classes of `gspn_dit.data.autoencoders`.

    Raises:
        UserError: there is none, it is damaged, or of another class or without safetensors.
    """
    from diffusers.utils import logging

    place = Path(name)
    if not place.exists() and (place.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1):
        raise UserError(f"the VAE {name} does not exist; give an AutoencoderKL's directory, or its hub name OWNER/NAME")
    if place.is_dir() and not (place / "config.json").exists() and (place / "vae" / "config.json").exists():
        place = place / "vae"
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the one line below says what matters
    try:
        vae = _load(str(place if place.exists() else name), str(name))
    finally:
        logging.set_verbosity(verbosity)
    try:
        adapt(vae)
    except UserError as error:
        raise UserError(f"the VAE {name} does not fit: {error}") from None
    return vae.float().eval().requires_grad_(False)


def _load(place: str, name: str) -> Any:
    import diffusers

    class_name = "AutoencoderKL"
    try:
        class_name = diffusers.AutoencoderKL.load_config(place).get("_class_name", class_name)
        vae, loading = getattr(diffusers, AUTOENCODERS[kind_of(class_name)].class_name).from_pretrained(
            place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise ValueError(f"it has no weights '{sorted(loading['missing_keys'])[0]}'")
    except UserError as error:
        raise UserError(f"the VAE {name} does not fit: {error}") from None
    except Exception as error:  # whatever the files lead diffusers to
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name} cannot be loaded as an {class_name} with safetensors: {reason}") from None
    return vae


def decode_in_tiles(vae: Any, factor: int) -> None:
    """Let an autoencoder decode images larger than TILE_PIXELS in tiles, where its class can."""
    if not hasattr(vae, "enable_tiling"):
        return
    size = max(TILE_PIXELS, factor)
    if hasattr(vae, "tile_latent_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // factor
    vae.enable_tiling()  # other classes have tiles of 512 pixels by default


def vae_hash(vae: Any) -> str:
    """Return the SHA-256 of the network: its architecture and its float32 weights by name, whatever file holds them."""
    digest = hashlib.sha256(json.dumps(_architecture(vae), sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _architecture(vae: Any) -> dict[str, Any]:
    config = json.loads(vae.to_json_string()) if hasattr(vae, "to_json_string") else dict(vae.config)
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_NETWORK}
