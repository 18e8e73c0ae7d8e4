"""Encode the images of a data set once, by any number of processes, to shards of latents that training reads.

    accelerate launch -m gspn_dit.prepare.encode --source imagefolder:DIR --vae VAE --image-size 256 --out latents

Shard i holds the images [i·n, (i+1)·n) of the source, encoded in batches that depend on these numbers alone: neither
the number of processes nor an interruption changes a bit (on one kind of machine). Each shard is complete or absent;
the manifest is written last. `--resume` continues, `--verify` checks what was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.locks import refuse_if_held
from gspn_dit.paths import path_argument, source_argument
from gspn_dit.prepare.encode_check import verify
from gspn_dit.prepare.encode_plan import make_plan, open_captioned, open_images
from gspn_dit.prepare.job import Work, check_out, run_job


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without the images; raises UserError."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--source", type=source_argument, metavar="KIND:PLACE", help="imagefolder:DIR, hf:NAME_OR_DIR or digits"
    )
    parser.add_argument("--split", choices=("train", "validation"), default="train",
                        help="which part; a source without parts is all train")  # fmt: skip
    parser.add_argument("--vae", type=path_argument, metavar="NAME_OR_DIR", help="an AutoencoderKL of diffusers")
    parser.add_argument("--image-size", type=int, default=256, help="pixels after ADM's centre crop")
    parser.add_argument("--captions", metavar="KEY", help="keep captions, too: a key of metadata.jsonl or a column")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where the latents go")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished encoding")
    parser.add_argument("--verify", action="store_true", help="check the shards in --out, and decode a few images")
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N unreadable images")
    parser.add_argument("--shard-images", type=int, default=4096, help="images per shard")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at a time")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the autoencoder")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode images, per process")
    options = parser.parse_args(arguments)
    for name, least in (("image_size", 1), ("skip_bad", 0), ("shard_images", 1), ("batch_size", 1), ("workers", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least {least}")
    if options.verify and options.resume:
        raise UserError("--verify and --resume contradict each other; give one of them")
    if not options.verify:
        for name in ("source", "vae"):
            if getattr(options, name) is None:
                raise UserError(f"--{name} is missing")
        refuse_if_held(Path(options.out), "--out")
        check_out(Path(options.out), options.resume)
    return options


def open_work(options: argparse.Namespace) -> Work:
    """Open autoencoder, images and their captions; raises UserError for what does not exist or fit."""
    from gspn_dit.data.latents import AutoencoderLatent, where
    from gspn_dit.data.vae import load_vae

    latent = AutoencoderLatent(load_vae(options.vae), options.image_size, where(options.vae))
    wanted = (options.source, options.split, options.image_size, latent.image_channels)
    if not options.captions:
        images = open_images(*wanted)
        return Work(images, latent, make_plan(options, images, latent))
    captioned = open_captioned(*wanted, options.captions)
    plan = make_plan(options, captioned.images, latent)
    plan["captions"] = {"column": options.captions, "fingerprint": captioned.fingerprint()}
    return Work(captioned.images, latent, plan, captioned.captions)


def run(options: argparse.Namespace) -> None:
    """Encode what the options ask for."""

    def report(work: Work, manifest: dict[str, Any]) -> None:
        counts = [f"{count} of mode {mode}" for mode, count in manifest["converted"].items()]
        print(
            f"{options.out}: {manifest['images']:,} images in {len(manifest['shards'])} shards, "
            f"{len(manifest['skipped'])} left out, converted to {'grey' if work.images.channels == 1 else 'RGB'}: "
            f"{', '.join(counts) or 'none'}"
        )
        for problem in manifest["skipped"]:
            print(f"left out: {problem}")

    run_job(options, lambda: open_work(options), report)


def main() -> None:
    """The command line."""
    options = parse_arguments()
    if options.verify:
        verify(options)
    else:
        run(options)


def cli() -> None:
    """The command `gspn-encode`."""
    run_cli(main, "what is there is kept; continue with --resume")


if __name__ == "__main__":
    cli()
