"""Encode the images of a data set once, by any number of processes, to shards of latents that training reads.

    accelerate launch -m gspn_dit.prepare.encode --source imagefolder:DIR --vae VAE --image-size 256 --out latents

Shard i holds the images [i·n, (i+1)·n) of the source, encoded in batches that depend on these numbers alone: neither
the number of processes nor an interruption changes a bit (on one kind of machine). Each shard is complete or absent;
the manifest is written last. `--resume` continues, `--verify` checks what was written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.data.latent_shards import (
    CAPTIONS,
    MANIFEST,
    PLAN,
    Shard,
    find_damage,
    read_manifest,
    shard_name,
    to_json,
)
from gspn_dit.errors import ArgumentParser, LocalUserError, UserError, advise_on_memory, run_cli
from gspn_dit.files import is_temporary, write_atomically
from gspn_dit.locks import NAME as LOCK
from gspn_dit.locks import Lock, refuse_if_held, sole_job
from gspn_dit.paths import path_argument, source_argument
from gspn_dit.prepare.encode_check import verify
from gspn_dit.prepare.encode_plan import check_same_plan, make_plan, open_captioned, open_images, read_plan

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gspn_dit.prepare.encoder import Encoder

GRACE_SECONDS = 5
"""How long a process that lost another one waits before it ends, so that the launcher finds the dead one first."""


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


def check_out(out: Path, resume: bool) -> None:
    """Raise UserError where shards cannot be written, or were begun and nothing says to continue."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    if not out.is_dir() or all(is_temporary(file.name) or file.name == LOCK for file in out.iterdir()):
        return
    if (out / MANIFEST).exists() and not resume:
        raise UserError(f"--out {out} holds encoded latents already; --verify checks them, or give another directory")
    if not (out / MANIFEST).exists() and not (out / PLAN).exists():
        raise UserError(f"--out {out} is not empty and holds no latents; give another directory")
    if not resume:
        raise UserError(f"--out {out} holds an unfinished encoding; continue with --resume, or give another directory")


def share_of_shards(out: Path, count: int, accelerator: Accelerator) -> list[int]:
    """Return the shards of this process: those that are there to be checked, and an even share of those that lack."""
    from accelerate.utils import broadcast_object_list

    found = [[(out / shard_name(number)).exists() for number in range(count)]]
    broadcast_object_list(found)
    rank, world = accelerator.process_index, accelerator.num_processes
    present = [number for number in range(count) if found[0][number]]
    missing = [number for number in range(count) if not found[0][number]]
    return present[rank::world] + missing[rank::world]


def encode_shards(encoder: Encoder, out: Path, accelerator: Accelerator, lock: Lock) -> dict[int, tuple[dict, dict]]:
    """Encode this process's share; return each shard's manifest entry and facts by number."""
    images, size = encoder.images, encoder.options.shard_images
    mine = share_of_shards(out, -(-len(images) // size), accelerator)
    entries = {}
    began, encoded = time.perf_counter(), 0
    for done, number in enumerate(mine, start=1):
        shard = Shard(out / shard_name(number))
        if shard.is_intact():
            encoder.count_skipped(len(shard.facts["skipped"]), f"shard {shard.path.name} lacks images")
        else:
            content = encoder.encode(number)
            lock.check()
            write_shard(shard.path, content)
            shard = Shard(shard.path)
            encoded += len(shard.labels)
            rate = encoded / (time.perf_counter() - began)
            left = time.strftime("%H:%M:%S", time.gmtime((len(mine) - done) * size / rate if rate else 0))
            accelerator.print(
                f"shard {done}/{len(mine)} of a process: {rate * accelerator.num_processes:.1f} images/s, {left} left",
                flush=True,
            )
        entries[number] = shard.entry(), shard.facts
    return entries


def write_shard(path: Path, content: bytes) -> None:
    """Write a shard atomically; raises LocalUserError if the disk refuses."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise LocalUserError(f"cannot write {path}: {error}; make room and continue with --resume") from None


def finish(
    out: Path,
    plan: dict[str, Any],
    parts: Sequence[dict[int, tuple[dict, dict]]],
    skip_bad: int,
    captions: Sequence[tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """Write captions and the manifest of the shards that all processes made, and delete the plan; raises UserError.

    `captions` are those of the source's images, in its order.
    """
    by_number = {number: facts for part in parts for number, facts in part.items()}
    converted: Counter[str] = Counter()
    skipped: list[str] = []
    for _, facts in sorted(by_number.items()):
        converted.update(facts[1]["converted"])
        skipped += facts[1]["skipped"]
    if len(skipped) > skip_bad:
        raise UserError(f"{len(skipped)} images are unreadable, --skip-bad allows {skip_bad}; the first: {skipped[0]}")
    shards = [entry for _, (entry, _) in sorted(by_number.items())]
    manifest = {
        **plan,
        "images": sum(entry["images"] for entry in shards),
        "skipped": skipped,
        "converted": dict(sorted(converted.items())),
        "shards": shards,
    }
    if not manifest["images"]:
        raise UserError(f"none of the {len(skipped)} images could be read; the first: {skipped[0]}")
    try:
        if captions is not None:
            content = _caption_lines(out, shards, captions)
            manifest["captions"] = {**plan["captions"], "sha256": hashlib.sha256(content).hexdigest()}
            write_atomically(out / CAPTIONS, content)
        write_atomically(out / MANIFEST, to_json(manifest))
        (out / PLAN).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out / MANIFEST}: {error}; make room and continue with --resume") from None
    return manifest


def _caption_lines(out: Path, shards: Sequence[dict[str, Any]], captions: Sequence[tuple[str, ...]]) -> bytes:
    """Return the captions of the images in shards, a line of JSON each."""
    rows = [int(row) for entry in shards for row in Shard(out / entry["file"]).indices]
    return "".join(json.dumps(captions[row], ensure_ascii=False) + "\n" for row in rows).encode()


def run(options: argparse.Namespace) -> None:
    """Encode what the options ask for."""
    accelerator = create_accelerator()
    advice = f"--batch-size is {options.batch_size}; lower it, and begin again in another --out"
    with sole_job(Path(options.out), "--out") as lock, advise_on_memory(advice):
        check_out(Path(options.out), options.resume)  # again: another job may have been here meanwhile
        _run_alone(options, accelerator, lock)


def _run_alone(options: argparse.Namespace, accelerator: Accelerator, lock: Lock) -> None:
    import torch
    from accelerate.utils import gather_object

    from gspn_dit.data.latents import AutoencoderLatent, where
    from gspn_dit.data.vae import load_vae
    from gspn_dit.prepare.encoder import Encoder

    out = Path(options.out)
    latent = AutoencoderLatent(load_vae(options.vae), options.image_size, where(options.vae))
    wanted, captioned = (options.source, options.split, options.image_size, latent.image_channels), None
    if options.captions:
        captioned = open_captioned(*wanted, options.captions)
    images = open_images(*wanted) if captioned is None else captioned.images
    lock.keep_directory()
    whole = make_plan(options, images, latent)
    if captioned is not None:
        whole["captions"] = {"column": options.captions, "fingerprint": captioned.fingerprint()}
    plan = begin(options, whole, accelerator)
    if plan is None:
        accelerator.print(f"{out} is complete: nothing to do")
        return
    accelerator.print(images.describe())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    latent.to(accelerator.device)
    entries = encode_shards(Encoder(images, latent, options), out, accelerator, lock)
    try:
        parts = gather_object([entries])
    except RuntimeError as error:
        time.sleep(GRACE_SECONDS)
        raise UserError("another process has ended early and tells why; continue with --resume") from error
    if accelerator.is_main_process:
        manifest = finish(out, plan, parts, options.skip_bad, None if captioned is None else captioned.captions)
        counts = [f"{count} of mode {mode}" for mode, count in manifest["converted"].items()]
        print(
            f"{out}: {manifest['images']:,} images in {len(manifest['shards'])} shards, "
            f"{len(manifest['skipped'])} left out, converted to {'grey' if latent.image_channels == 1 else 'RGB'}: "
            f"{', '.join(counts) or 'none'}"
        )
        for problem in manifest["skipped"]:
            print(f"left out: {problem}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def create_accelerator() -> Accelerator:
    """Return the Accelerator of this job, whose processes may wait for each other for days."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )


def begin(options: argparse.Namespace, plan: dict[str, Any], accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the plan to work by, which a resumed encoding began with, or None if all is done.

    Raises UserError if the encoding to resume was begun differently, or the directory cannot be written.
    """
    out = Path(options.out)
    complete = (out / MANIFEST).exists()
    if complete or (out / PLAN).exists():
        before = read_manifest(out) if complete else read_plan(out)
        check_same_plan(before, plan, out)
        plan = {key: now if key == "captions" else before[key] for key, now in plan.items()}
        complete = complete and not any(find_damage(out, entry, thorough=False) for entry in before["shards"])
    accelerator.wait_for_everyone()  # all have read the directory before one of them changes it
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for file in out.iterdir():
                if is_temporary(file.name):
                    file.unlink()
            if complete:
                (out / PLAN).unlink(missing_ok=True)
            else:
                write_atomically(out / PLAN, to_json(plan))
                (out / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error}") from None
    accelerator.wait_for_everyone()
    return None if complete else plan


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
