"""Train a small AutoencoderRAE (representation autoencoder, arXiv 2510.11690) on the images of a labelled data set.

    python -m gspn_dit.prepare.train_rae --source imagefolder:DIR --image-size 32 --patch-size 4 --out rae

The published ones take an encoder that was trained on millions of images. Where none fits, this first trains a small
ViT to tell the classes and to draw the patches of images of which half is hidden; then it is frozen, its tokens are
normalised to mean 0 and deviation 1 by place and channel, and a decoder learns to draw images from them, with noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.data.images import ImageSet, evenly_spaced
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.paths import path_argument, source_argument
from gspn_dit.prepare.train_vae import (
    BATCH,
    STATISTICS_IMAGES,
    learning_rate,
    reconstruction_psnr,
    save,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE
    from torch import Tensor, nn

HEAD_CHANNELS = 64
"""Of diffusers' encoders, whatever their width."""
HIDDEN_SHARE = 0.5
"""Of the patches, while the encoder is trained."""


def create_rae(image_size: int, patch_size: int, channels: int, layers: int) -> AutoencoderRAE:
    """Build an AutoencoderRAE whose encoder, a ViT as in MAE, and decoder have the same width and depth."""
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    return AutoencoderRAE(
        encoder_type="mae",
        encoder_hidden_size=channels,
        encoder_patch_size=patch_size,
        encoder_num_hidden_layers=layers,
        encoder_input_size=image_size,
        patch_size=patch_size,
        decoder_hidden_size=channels,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=channels // HEAD_CHANNELS,
        decoder_intermediate_size=4 * channels,
        encoder_norm_mean=[0.5] * 3,
        encoder_norm_std=[0.5] * 3,
    )


def patches(images: Tensor, size: int) -> Tensor:
    """Cut images [B, C, H, W] into squares, row by row: [B, patches, C·size²]."""
    import torch

    return torch.nn.functional.unfold(images, size, stride=size).transpose(1, 2)


def hide(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Set patches of images [B, C, H, W] in [0, 1] to grey where their uniform draws [B, patches] are below 1/2."""
    side = images.shape[-1] // size
    hidden = (draws < HIDDEN_SHARE).reshape(-1, 1, side, side).to(images.device)
    return images.masked_fill(hidden.repeat_interleave(size, 2).repeat_interleave(size, 3), 0.5)


def representation_loss(tokens: Tensor, images: Tensor, labels: Tensor, classify: nn.Module, draw: nn.Module) -> Tensor:
    """Return the cross-entropy of the classes plus the squared error of all patches, in [-1, 1].

    Args:
        tokens: of images of which half is hidden, [B, C, h, w].
        images: the whole ones, [B, 3, H, W] in [0, 1].
        labels: int64 [B].
        classify: of the mean token, [B, C] to [B, classes].
        draw: of each token, [B, h·w, C] to [B, h·w, 3·patch²].
    """
    from torch.nn import functional as F

    size = images.shape[-1] // tokens.shape[-1]
    drawn = draw(tokens.flatten(2).transpose(1, 2))
    return F.cross_entropy(classify(tokens.mean(dim=(2, 3))), labels) + F.mse_loss(drawn, 2 * patches(images, size) - 1)


def optimise(name: str, weights: Iterable[nn.Parameter], loss: Callable[[range], Tensor], options: Any) -> None:
    """Minimise a loss of sample numbers for `options.steps` steps."""
    import torch

    weights = list(weights)
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-2)
    began = time.perf_counter()
    for step in range(options.steps):
        value = loss(range(step * options.batch_size, (step + 1) * options.batch_size))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.learning_rate, step, options.steps)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            rate = (step + 1) * options.batch_size / (time.perf_counter() - began)
            print(f"{name} step {step + 1}/{options.steps}: loss {value.item():.5f}, {rate:.0f} images/s", flush=True)


def train(images: ImageSet, options: argparse.Namespace) -> AutoencoderRAE:
    """Train encoder and decoder, one after the other; the weights are a function of the seed (bit-exact on a CPU)."""
    import torch
    from torch import nn

    from gspn_dit import rng

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        rae: Any = create_rae(images.image_size, options.patch_size, options.channels, options.layers)
        rae.to(device)
        classify = nn.Linear(options.channels, images.num_classes).to(device)
        draw = nn.Linear(options.channels, 3 * options.patch_size**2).to(device)

    def batch(numbers: range) -> tuple[Tensor, Tensor]:
        rows = rng.data_indices(options.seed, numbers, len(images))
        labels = torch.from_numpy(images.labels[rows]).to(device)
        return to_unit(images, rows).to(device), labels

    def of_encoder(numbers: range) -> Tensor:
        whole, labels = batch(numbers)
        draws = rng.uniform(options.seed, rng.Stream.ERASING, numbers, (rae.num_patches,))
        tokens = rae.encode(hide(whole, draws, options.patch_size)).latent
        return representation_loss(tokens, whole, labels, classify, draw)

    def of_decoder(numbers: range) -> Tensor:
        whole, _ = batch(numbers)
        with torch.no_grad():
            latents = rae.encode(whole).latent
        noise = rng.normal(options.seed, rng.Stream.POSTERIOR, numbers, latents.shape[1:])
        level = options.noise * rng.uniform(options.seed, rng.Stream.TIMESTEP, numbers, (1, 1, 1)).float()
        return (rae.decode(latents + (level * noise).to(device)).sample - whole).abs().mean()

    learnt = [weight for name, weight in rae.encoder.named_parameters() if "position" not in name]
    for weight in learnt:
        weight.requires_grad_(True)
    optimise("encoder", [*learnt, *classify.parameters(), *draw.parameters()], of_encoder, options)
    rae.encoder.requires_grad_(False)
    set_statistics(rae, images)
    optimise("decoder", rae.decoder.parameters(), of_decoder, options)
    return rae.eval().requires_grad_(False)


def to_unit(images: ImageSet, rows: Any) -> Tensor:
    """Return images by row, float32 [B, 3, H, W] in [0, 1]."""
    from gspn_dit.data.latents import to_signed

    return (to_signed(images.pixels(rows)) + 1) / 2


def set_statistics(rae: AutoencoderRAE, images: ImageSet) -> None:
    """Set mean and deviation of the tokens of some training images, by channel and place, as RAE normalises them."""
    import torch

    rows = evenly_spaced(len(images), STATISTICS_IMAGES)
    with torch.no_grad():
        parts = [
            rae.encode(to_unit(images, rows[start : start + BATCH]).to(rae.device)).latent.double()
            for start in range(0, len(rows), BATCH)
        ]
    std, mean = torch.std_mean(torch.cat(parts), dim=0, correction=0)
    for name, value in (("latents_mean", mean.float()), ("latents_std", std.float())):
        setattr(rae, f"_{name}", value)
        rae.register_to_config(**{name: value.tolist()})


def parse_arguments() -> argparse.Namespace:
    """Parse and check what can be checked without the images; raises UserError."""
    parser = ArgumentParser(prog="gspn_dit.prepare.train_rae", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=source_argument, required=True, metavar="KIND:PLACE",
        help="imagefolder:DIR, hf:NAME_OR_DIR, digits")  # fmt: skip
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where the autoencoder goes")
    parser.add_argument("--image-size", type=int, help="default: the images' own")
    parser.add_argument("--patch-size", type=int, default=4, help="pixels along the side of a latent's cell")
    parser.add_argument(
        "--channels", type=int, default=128, help="of a latent, and width of the ViTs; a multiple of 64"
    )
    parser.add_argument("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    parser.add_argument("--steps", type=int, default=1000, help="for the encoder, and for the decoder")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=0.4, help="highest deviation added to the decoder's latents")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("patch_size", "layers", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    if options.channels < HEAD_CHANNELS or options.channels % HEAD_CHANNELS:
        raise UserError(f"--channels is {options.channels}, but must be a multiple of {HEAD_CHANNELS}")
    if not 0 <= options.noise < float("inf"):
        raise UserError(f"--noise is {options.noise}, but must be at least 0 and finite")
    if Path(options.out).exists():
        raise UserError(f"--out {options.out} exists already; give another directory")
    return options


def main() -> None:
    """The command line."""
    options = parse_arguments()
    from gspn_dit.data.autoencoders import adapt
    from gspn_dit.data.images import open_source

    images = open_source(options.source, "train", options.image_size, 3)
    print(images.describe())
    if images.image_size % options.patch_size:
        raise UserError(f"images of {images.image_size} pixels are not divisible by --patch-size {options.patch_size}")
    held_out = open_source(options.source, "validation", options.image_size, 3)
    began = time.perf_counter(), time.process_time()
    rae = train(images, options)
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    report = {
        "psnr_db": round(reconstruction_psnr(adapt(rae), held_out), 3),
        "training_seconds": round(seconds, 1),
        "training_cpu_seconds": round(cpu_seconds, 1),
        "parameters": sum(parameter.numel() for parameter in rae.parameters()),
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    save(rae, Path(options.out), report)
    print(f"{options.out}: {report['psnr_db']:.2f} dB on held-out images after {seconds:.0f} s")


if __name__ == "__main__":
    run_cli(main)
