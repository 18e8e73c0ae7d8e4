"""Extract features of images once, by any number of processes, to shards that `training.repa_features` reads.

    accelerate launch -m gspn_dit.prepare.features --source imagefolder:DIR --image-size 256 \\
        --encoder facebook/dinov2-base --encoder-size 224 --out features

Features of each image and of its mirror image are stored as float16 planes, in shards as `gspn_dit.prepare.encode`
writes them: each complete or absent, and no bit depends on the number of processes. `--resume` continues, `--verify`
checks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.data.images import ImageSet, evenly_spaced
from gspn_dit.data.latent_shards import FORMAT_VERSION, find_damage, open_shards
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.locks import refuse_if_held
from gspn_dit.paths import path_argument, source_argument
from gspn_dit.prepare.encode_plan import open_images, source_fingerprint
from gspn_dit.prepare.job import Work, check_out, run_job

if TYPE_CHECKING:
    from gspn_dit.prepare.feature_nets import FeatureNet

VERIFIED_IMAGES = 8
LEAST_COSINE = 0.999
"""Of stored features with those recomputed, on whatever device."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without the images; raises UserError."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--source", type=source_argument, metavar="KIND:PLACE", help="imagefolder:DIR, hf:NAME_OR_DIR or digits")
    add("--split", choices=("train", "validation"), default="train", help="a source without parts is all train")
    add("--image-size", type=int, default=256, help="pixels after ADM's centre crop, as training has them")
    add("--encoder", type=path_argument, metavar="NAME", help="timm:NAME, timm:NAME@FILE with weights of your own, or "
        "a directory or hub name of transformers")  # fmt: skip
    add("--encoder-size", type=int, metavar="N", help="pixels that the encoder is shown (default: --image-size)")
    add("--grid", type=int, metavar="N", help="rows and columns of features, which are resized to them; give the "
        "model's: latent size / patch (default: the encoder's own)")  # fmt: skip
    add("--out", type=path_argument, required=True, metavar="DIR", help="where the features go")
    add("--resume", action="store_true", help="continue an unfinished extraction")
    add(
        "--verify",
        action="store_true",
        help="check the shards in --out; with --encoder and --source compute some again",
    )
    add("--shard-images", type=int, default=4096, help="images per shard")
    add("--batch-size", type=int, default=32, help="images encoded at a time")
    add("--precision", choices=("float32", "bf16"), default="float32", help="of the encoder")
    add("--workers", type=int, default=4, help="threads that decode images, per process")
    options = parser.parse_args(arguments)
    for name in ("image_size", "encoder_size", "grid", "shard_images", "batch_size", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if options.verify and options.resume:
        raise UserError("--verify and --resume contradict each other; give one of them")
    for name in ("source", "encoder"):
        if getattr(options, name) is None and not options.verify:
            raise UserError(f"--{name} is missing")
    if options.verify and (options.source is None) != (options.encoder is None):
        raise UserError(
            "--verify computes features again where both --source and --encoder are given; give both or none"
        )
    options.skip_bad = 0  # every training image needs its features
    if not options.verify:
        refuse_if_held(Path(options.out), "--out")
        check_out(Path(options.out), options.resume)
    return options


def _open(options: argparse.Namespace) -> tuple[FeatureNet, ImageSet]:
    from gspn_dit.prepare.feature_nets import FeatureNet

    images = open_images(options.source, options.split, options.image_size, FeatureNet.image_channels)
    return FeatureNet(options.encoder, options.image_size, options.encoder_size, options.grid), images


def make_plan(options: argparse.Namespace, images: ImageSet, net: FeatureNet) -> dict[str, Any]:
    """Return everything that the shards are a function of, as plain JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "name": options.source,
            "split": options.split,
            "images": len(images),
            "fingerprint": source_fingerprint(images),
        },
        "features": net.spec(),
        "transform": {
            "crop": "ADM centre crop",
            "image_size": options.image_size,
            "flips": [False, True],
            "precision": options.precision,
            "batch_size": options.batch_size,
        },
        "shard_images": options.shard_images,
        "class_names": images.class_names,
    }


def run(options: argparse.Namespace) -> None:
    """Extract what the options ask for."""

    def open_work() -> Work:
        net, images = _open(options)
        return Work(images, net, make_plan(options, images, net))

    def report(work: Work, manifest: dict[str, Any]) -> None:
        size = work.encodes.size
        print(
            f"{options.out}: {size}x{size} features of {work.encodes.moment_channels} dimensions of "
            f"{manifest['images']:,} images and their mirror images, in {len(manifest['shards'])} shards"
        )

    run_job(options, open_work, report)


def verify(options: argparse.Namespace) -> None:
    """Hash all shards again and, of a few images, compute the features again; raises UserError."""
    if int(os.environ.get("RANK", "0")):
        return
    out = Path(options.out)
    shards = open_shards(out)
    damages = [damage for entry in shards.manifest["shards"] if (damage := find_damage(out, entry, thorough=True))]
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise UserError(f"{damages[0]}{more}; delete it and extract it again with --resume")
    print(f"{out}: {len(shards.manifest['shards'])} shards with {len(shards):,} images are as they were written")
    if options.encoder is None:
        return
    net, images = _open(options)
    if source_fingerprint(images) != shards.manifest["source"]["fingerprint"]:
        raise UserError(f"--source {options.source} does not hold the images that {out} was extracted from")
    items = evenly_spaced(len(shards), VERIFIED_IMAGES)
    found = net.moments(images.pixels(items)).numpy()
    stored = shards.moments(items, np.zeros(len(items), dtype=bool)).astype(np.float32)
    if found.shape != stored.shape:
        raise UserError(f"--encoder {options.encoder} gives other features than {out} holds: {list(found.shape[1:])}")
    cosine = float((found * stored).sum() / np.sqrt(np.square(found).sum() * np.square(stored).sum()))
    if cosine < LEAST_COSINE:
        raise UserError(
            f"--encoder {options.encoder} gives other features than {out} holds: their cosine is {cosine:.4f}"
        )
    print(f"{len(items)} images, encoded again, have the features that are stored: cosine {cosine:.6f}")


def main() -> None:
    """The command line."""
    options = parse_arguments()
    verify(options) if options.verify else run(options)


if __name__ == "__main__":
    run_cli(main, "what is there is kept; continue with --resume")
