"""Whether encoded images are as they were written, and decode to what they were: `--verify` of `prepare.encode`."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gspn_dit.data.images import evenly_spaced
from gspn_dit.data.latent_shards import find_damage, read_manifest
from gspn_dit.errors import UserError
from gspn_dit.prepare.encode_plan import open_captioned, open_images, source_fingerprint

VERIFIED_IMAGES = 8


def verify(options: argparse.Namespace) -> None:
    """Re-hash all shards, and draw a few decoded images below their originals in `verify.png`; raises UserError."""
    if int(os.environ.get("RANK", "0")):
        return
    out = Path(options.out)
    manifest = read_manifest(out)
    with ThreadPoolExecutor(options.workers) as pool:
        found = list(pool.map(lambda entry: find_damage(out, entry, thorough=True), manifest["shards"]))
    damages = [damage for damage in found if damage]
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise UserError(f"{damages[0]}{more}; delete it and encode it again with --resume")
    print(f"{out}: {len(manifest['shards'])} shards with {manifest['images']:,} images are as they were written")
    ratio = decode_a_few(out, manifest, options.source or manifest["source"]["name"], options.vae)
    print(f"{out / 'verify.png'}: {VERIFIED_IMAGES} images above what their latents decode to, PSNR {ratio:.2f} dB")


def decode_a_few(out: Path, manifest: dict[str, Any], source: str, vae: str | None) -> float:
    """Write `verify.png` and return the PSNR in decibels; raises UserError if the source or the VAE is another one."""
    import torch

    from gspn_dit.data.latent_shards import open_latents
    from gspn_dit.data.latents import AutoencoderLatent, latent_from_spec
    from gspn_dit.data.self_check import psnr
    from gspn_dit.grid import save_png, to_pil

    latents = open_latents(out, validation_fraction=0)
    latent = latent_from_spec(manifest["latent"], vae)
    assert isinstance(latent, AutoencoderLatent)
    wanted = source, manifest["source"]["split"], latent.image_size, latent.image_channels
    if "captions" in manifest:
        from gspn_dit.data.captions import captions_of

        captions_of(latents)  # their checksum
        images = open_captioned(*wanted, manifest["captions"]["column"]).images
    else:
        images = open_images(*wanted)
    if source_fingerprint(images) != manifest["source"]["fingerprint"]:
        raise UserError(f"--source {source} does not hold the images that {out} was encoded from")
    items = evenly_spaced(len(latents), VERIFIED_IMAGES)
    originals = images.pixels(np.concatenate([shard.indices for shard in latents.shards])[items])
    moments = latents.moments(items, np.zeros(len(items), dtype=bool))
    decoded = latent.decode(latent.draw(torch.from_numpy(moments)))
    rows = [np.concatenate(list(row), axis=1) for row in (originals, decoded)]
    picture = np.concatenate(rows, axis=0)
    save_png(to_pil(picture), out / "verify.png")
    return psnr(originals, decoded)
