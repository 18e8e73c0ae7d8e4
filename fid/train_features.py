"""`python -m fid.train_features`: train a small classifier on real images, to be used as a feature extractor."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspn_dit.data.sources import image_sources
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.paths import path_argument

if TYPE_CHECKING:
    from torch import Tensor

    from fid.classifier import Classifier
    from gspn_dit.data.images import ImageSet

EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02
MAX_ROTATION_RADIANS = 0.2
MAX_SCALE = 0.1
MAX_SHIFT = 0.12  # of the image's side


def random_affine(images: Tensor) -> Tensor:
    """Small random rotations, scalings and shifts with bilinear sampling; images float [B, C, H, W]."""
    import torch
    from torch.nn import functional as F

    angle, scale, shift_x, shift_y = (2.0 * torch.rand(4, len(images)) - 1.0).unbind()
    angle, scale = MAX_ROTATION_RADIANS * angle, 1.0 + MAX_SCALE * scale
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    # affine_grid's coordinates span 2 over the image's side
    shift_x, shift_y = 2.0 * MAX_SHIFT * shift_x, 2.0 * MAX_SHIFT * shift_y
    rows = [torch.stack([cosine, -sine, shift_x], 1), torch.stack([sine, cosine, shift_y], 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 NHWC to float32 NCHW in 0…1."""
    return pixels.permute(0, 3, 1, 2).float() / 255.0


def train_classifier(
    train: ImageSet,
    validation: ImageSet,
    architecture: str = "conv",
    seed: int = 0,
    epochs: int = EPOCHS,
    count: int | None = None,
) -> Classifier:
    """Train a classifier on `train`, standardise its features there, and measure its accuracy on `validation`.

    AdamW with a one-cycle cosine schedule and small random affine changes of the images. A function of its arguments
    on one machine with one number of threads; the caller's random state is left alone. With `count`, only so many
    evenly spaced images of `train` are used.
    """
    import torch
    from torch.nn import functional as F

    from fid.classifier import Classifier, ClassifierInfo
    from gspn_dit.data.images import evenly_spaced

    rows = evenly_spaced(len(train), count or len(train))
    info = ClassifierInfo(
        architecture=architecture,
        data_set=re.sub(r"[^\w.-]", "-", train.name)[:64],
        image_size=train.image_size,
        channels=train.channels,
        class_names=tuple(train.class_names),
        seed=seed,
        training_images=len(rows),
    )
    pixels, labels = torch.from_numpy(train.pixels(rows)), torch.from_numpy(train.labels[rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(info)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = epochs * math.ceil(len(pixels) / BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps, 2), pct_start=0.1)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(pixels)).split(BATCH_SIZE):
                _, logits = model(random_affine(to_unit(pixels[batch])))
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval().requires_grad_(False)
    embedded = torch.cat([model.embed(to_unit(part)) for part in pixels.split(512)]).double()
    model.feature_mean.copy_(embedded.mean(dim=0))
    model.feature_std.copy_(embedded.std(dim=0).clamp_min(1e-6))
    model.info = dataclasses.replace(info, validation_accuracy=accuracy(model, validation))
    return model


def accuracy(model: Classifier, images: ImageSet) -> float:
    """Share of `images` that the classifier assigns to their own class."""
    import torch

    pixels = torch.from_numpy(images.pixels())
    predicted = torch.cat([model(to_unit(part))[1].argmax(dim=1) for part in pixels.split(512)])
    return float((predicted == torch.from_numpy(images.labels)).double().mean())


def build_parser() -> ArgumentParser:
    """The arguments of `python -m fid.train_features`."""
    parser = ArgumentParser(
        prog="python -m fid.train_features", description="Train a feature extractor for python -m fid."
    )
    parser.add_argument("--data", default="digits", help="data set: digits, imagefolder or hf")
    parser.add_argument(
        "--data-path", type=path_argument, default=None, help="directory of an imagefolder or hf data set"
    )
    parser.add_argument("--image-size", type=int, default=None, help="crop and resize the images to this size")
    parser.add_argument("--architecture", default="conv", choices=("conv", "plain"), help="kind of classifier")
    parser.add_argument("--images", type=int, default=None, help="train on so many images, evenly spaced; default all")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, order and augmentation")
    parser.add_argument("--out", type=path_argument, required=True, help="the safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the training split, report the validation accuracy, write the file."""
    options = build_parser().parse_args(arguments)
    if os.path.exists(options.out) and not options.overwrite:
        raise UserError(f"{options.out} exists; give --overwrite to replace it")
    source = image_sources().get(options.data)  # what is unknown is refused where it is opened
    if source is not None and not source.bundled and not options.data_path:
        raise UserError(f"--data {options.data} needs --data-path")
    for name in ("epochs", "images"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    import torch

    from fid.classifier import save_classifier
    from gspn_dit.data.images import load_images

    torch.set_num_threads(1)  # the order of float sums depends on the number of threads
    train = load_images(options.data, options.data_path, "train", options.image_size)
    print(train.describe())
    validation = load_images(options.data, options.data_path, "validation", options.image_size)
    model = train_classifier(train, validation, options.architecture, options.seed, options.epochs, options.images)
    save_classifier(model, model.info, options.out)
    print(f"validation accuracy {model.info.validation_accuracy:.4f} on {len(validation)} images; wrote {options.out}")


if __name__ == "__main__":
    run_cli(main)
