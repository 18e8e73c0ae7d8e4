"""Train a small AutoencoderKL on the images of a data set, for studies whose images no published VAE fits.

    python -m gspn_dit.prepare.train_vae --source hf:fashion --image-size 32 --factor 4 --out vae

Squared error plus a little KL divergence, no adversary: enough for small images. `scaling_factor` and `shift_factor`
are set so that the latents of the training images have mean 0 and standard deviation 1.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.data.images import ImageSet, evenly_spaced
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.paths import path_argument, source_argument

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.modeling_utils import ModelMixin
    from torch import Tensor

    from gspn_dit.data.autoencoders import Autoencoder

STATISTICS_IMAGES = 4096
EVALUATED_IMAGES = 2048
BATCH = 128  # of images that are only looked at
REPORT = "training.json"


def create_vae(image_channels: int, image_size: int, factor: int, latent_channels: int, width: int) -> AutoencoderKL:
    """Build an AutoencoderKL without attention whose channels double from `width` with every halving."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = int(math.log2(factor)) + 1
    return AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(width * 2**level for level in range(levels)),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine to 0."""
    warm_up = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def training_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Mean squared error of images [B, C, H, W] decoded from posterior draws, plus KL to a unit Gaussian, per pixel."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    return (decoded - images).square().mean() + kl_weight * posterior.kl().mean() / images[0].numel()


def train(images: ImageSet, options: argparse.Namespace) -> AutoencoderKL:
    """Train for `options.steps` steps; the weights are a function of the seed (bit-exact on a CPU)."""
    import torch

    from gspn_dit import rng
    from gspn_dit.data.latents import to_signed

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vae = create_vae(images.channels, images.image_size, options.factor, options.latent_channels, options.width)
    vae = vae.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    side = images.image_size // options.factor
    began = time.perf_counter()
    for step in range(options.steps):
        numbers = range(step * options.batch_size, (step + 1) * options.batch_size)
        batch = to_signed(images.pixels(rng.data_indices(options.seed, numbers, len(images)))).to(device)
        noise = rng.normal(options.seed, rng.Stream.POSTERIOR, numbers, (options.latent_channels, side, side))
        loss = training_loss(vae, batch, noise.to(device), options.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.learning_rate, step, options.steps)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            rate = (step + 1) * options.batch_size / (time.perf_counter() - began)
            print(f"step {step + 1}/{options.steps}: loss {loss.item():.5f}, {rate:.0f} images/s", flush=True)
    return vae.eval().requires_grad_(False)


def set_scale(vae: AutoencoderKL, images: ImageSet) -> None:
    """Set `shift_factor` and `scaling_factor` to the mean and 1/std of posterior draws of some training images."""
    import torch

    from gspn_dit.data.latents import to_signed

    rows = evenly_spaced(len(images), STATISTICS_IMAGES)
    means, variances = [], []
    for start in range(0, len(rows), BATCH):
        batch = to_signed(images.pixels(rows[start : start + BATCH])).to(vae.device)
        posterior = vae.encode(batch).latent_dist
        means.append(posterior.mean.double().cpu())
        variances.append(posterior.var.double().cpu())
    mean = torch.cat(means)
    std = (mean.var(correction=0) + torch.cat(variances).mean()).sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / std, 6), shift_factor=round(mean.mean().item(), 6))


def reconstruction_psnr(autoencoder: Autoencoder, images: ImageSet) -> float:
    """Return the PSNR of some images, evenly spaced, decoded from their latents (posterior means) to 8 bits."""
    import numpy as np

    from gspn_dit.data.latents import to_signed, to_uint8
    from gspn_dit.data.self_check import psnr

    rows = evenly_spaced(len(images), EVALUATED_IMAGES)
    originals, decoded = [], []
    for start in range(0, len(rows), BATCH):
        originals.append(images.pixels(rows[start : start + BATCH]))
        batch = to_signed(originals[-1]).to(autoencoder.module.device)
        decoded.append(to_uint8(autoencoder.decode(autoencoder.encode(batch)[0])))
    return psnr(np.concatenate(originals), np.concatenate(decoded))


def save(vae: ModelMixin, out: Path, report: dict[str, Any]) -> None:
    """Write the autoencoder and what is known of its training; `out` is complete or absent."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        vae.save_pretrained(partial, safe_serialization=True)
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the VAE to {out}: {error}") from None


def parse_arguments() -> argparse.Namespace:
    """Parse and check what can be checked without the images; raises UserError."""
    parser = ArgumentParser(prog="gspn_dit.prepare.train_vae", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--source",
        type=source_argument,
        required=True,
        metavar="KIND:PLACE",
        help="imagefolder:DIR, hf:NAME_OR_DIR, digits",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where the autoencoder goes")
    parser.add_argument("--image-size", type=int, help="default: the images' own")
    parser.add_argument("--factor", type=int, default=4, help="pixels along the side of a latent's cell")
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--width", type=int, default=16, help="channels at full resolution, a multiple of 8")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("latent_channels", "width", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    if options.factor not in (2, 4, 8, 16):
        raise UserError(f"--factor is {options.factor}; allowed are 2, 4, 8 and 16")
    if options.width % 8:
        raise UserError(f"--width is {options.width}, but must be a multiple of 8")
    if Path(options.out).exists():
        raise UserError(f"--out {options.out} exists already; give another directory")
    return options


def main() -> None:
    """The command line."""
    options = parse_arguments()
    from gspn_dit.data.autoencoders import adapt
    from gspn_dit.data.images import open_source

    images = open_source(options.source, "train", options.image_size)
    print(images.describe())
    if images.image_size % options.factor:
        raise UserError(f"images of {images.image_size} pixels are not divisible by --factor {options.factor}")
    held_out = open_source(options.source, "validation", options.image_size)
    began = time.perf_counter()
    vae = train(images, options)
    seconds = time.perf_counter() - began
    set_scale(vae, images)
    report = {
        "psnr_db": round(reconstruction_psnr(adapt(vae), held_out), 3),
        "training_seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    save(vae, Path(options.out), report)
    print(f"{options.out}: {report['psnr_db']:.2f} dB on held-out images after {seconds:.0f} s")


if __name__ == "__main__":
    run_cli(main)
