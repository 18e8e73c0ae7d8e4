"""Decode what an autoencoder makes of images, beside the images themselves, for rFID, PSNR and SSIM.

    python -m gspn_dit.prepare.reconstruct --vae VAE --source imagefolder:DIR --split validation --out DIR
    python -m fid --protocol reconstruction --samples DIR/decoded.npz --reference DIR/originals.npz --out report

Images are encoded to their latents (the means of their posteriors) and decoded in batches of a fixed size, which
decoded.json states with the source and the autoencoder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import cannot_hold, write_whole
from gspn_dit.paths import path_argument, source_argument

if TYPE_CHECKING:
    from gspn_dit.data.images import ImageSet
    from gspn_dit.data.latents import AutoencoderLatent

ORIGINALS, DECODED, SETTINGS = "originals.npz", "decoded.npz", "decoded.json"
FORMAT_VERSION = 1


def build_parser() -> ArgumentParser:
    """The arguments of `python -m gspn_dit.prepare.reconstruct`."""
    parser = ArgumentParser(prog="python -m gspn_dit.prepare.reconstruct", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--vae", type=path_argument, required=True, help="directory or hub name of an autoencoder of diffusers")
    add("--source", type=source_argument, required=True, metavar="KIND:PLACE", help="imagefolder:DIR, hf:NAME_OR_DIR")
    add("--split", choices=("validation", "train", "all"), default="validation", help="which images")
    add("--image-size", type=int, help="pixels; images are cropped and resized to it; default: their own")
    add("--images", type=int, help="so many of them, evenly spaced; default: all")
    add("--device", help="cpu, cuda, …; default: the accelerator if there is one, else cpu")
    add("--out", type=path_argument, required=True, metavar="DIR", help="new directory of both sets")
    return parser


def reconstruct(images: ImageSet, latent: AutoencoderLatent, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return some images, uint8 [n, H, W, C], and what the autoencoder makes of them, VAE_BATCH at a time."""
    from gspn_dit.data.latents import VAE_BATCH

    originals, decoded = [], []
    for start in range(0, len(rows), VAE_BATCH):
        originals.append(images.pixels(rows[start : start + VAE_BATCH]))
        latents = latent.draw(latent.moments(originals[-1]))
        decoded.append(latent.decode(latents.to(latent.vae.device)))
    return np.concatenate(originals), np.concatenate(decoded)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Reconstruct, write both sets, and return what decoded.json says; raises UserError."""
    from gspn_dit.data.autoencoders import adapt
    from gspn_dit.data.images import evenly_spaced, open_source
    from gspn_dit.data.latents import VAE_BATCH, AutoencoderLatent, where
    from gspn_dit.data.vae import load_vae
    from gspn_dit.environment import describe_run
    from gspn_dit.sampling_options import choose_device

    device, out = choose_device(options.device), Path(options.out)
    vae = load_vae(options.vae)
    split = None if options.split == "all" else options.split
    images = open_source(options.source, split, options.image_size, adapt(vae).image_channels)
    latent = AutoencoderLatent(vae, images.image_size, where(options.vae)).to(device)
    rows = evenly_spaced(len(images), options.images or len(images))
    originals, decoded = reconstruct(images, latent, rows)
    environment = describe_run()
    settings = {
        "format_version": FORMAT_VERSION,
        "autoencoder": {**latent.spec(), "class": latent.autoencoder.class_name},
        "source": options.source,
        "split": options.split,
        "num_images": len(rows),
        "image_size": images.image_size,
        "posterior": "mean" if latent.has_posterior else "none",
        "batch_size": VAE_BATCH,
        "uint8": "truncate",
        "class_names": images.class_names,
        "environment": {key: environment[key] for key in ("versions", "git_commit", "git_changes", "machine")},
    }
    try:
        out.mkdir(parents=True)
        for name, pixels in ((ORIGINALS, originals), (DECODED, decoded)):
            with open(out / name, "wb") as file:
                np.savez(file, arr_0=pixels, arr_1=images.labels[rows].astype(np.int64))
        write_whole(out / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, check, reconstruct."""
    options = build_parser().parse_args(arguments)
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out} exists already; give another directory")
    if problem := cannot_hold(out):
        raise UserError(f"--out {problem}")
    if options.images is not None and options.images < 1:
        raise UserError(f"--images is {options.images}, but must be at least 1")
    settings = run(options)
    print(
        f"{settings['num_images']:,} images in batches of {settings['batch_size']}: {out / ORIGINALS}, {out / DECODED}"
    )


if __name__ == "__main__":
    run_cli(main, "nothing was written")
