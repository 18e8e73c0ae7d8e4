"""A job that writes shards, whatever they hold: one owner of the directory, a plan first, the manifest last.

Each shard is complete or absent, an even share of the missing ones is this process's, and a resumed job must have
been begun with the same plan.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from gspn_dit.errors import LocalUserError, UserError, advise_on_memory
from gspn_dit.files import is_temporary, write_atomically
from gspn_dit.locks import NAME as LOCK
from gspn_dit.locks import Lock, sole_job
from gspn_dit.prepare.encode_plan import check_same_plan, read_plan

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gspn_dit.data.images import ImageSet
    from gspn_dit.prepare.encoder import Encoder, Encodes

GRACE_SECONDS = 5
"""How long a process that lost another one waits before it ends, so that the launcher finds the dead one first."""


@dataclass(frozen=True)
class Work:
    """What a command has opened to encode, and everything that its shards are a function of."""

    images: ImageSet
    encodes: Encodes
    plan: dict[str, Any]
    """Plain JSON values."""
    captions: Sequence[tuple[str, ...]] | None = None
    """Those of the images, in their order, where they are kept, too."""


def run_job(
    options: argparse.Namespace,
    open_work: Callable[[], Work],
    report: Callable[[Work, dict[str, Any]], None],
) -> None:
    """Encode what is missing in `--out`, in this process or with those that were launched beside it.

    Args:
        options: `out`, `resume`, `batch_size`, `shard_images`, `skip_bad`, `precision` and `workers`.
        open_work: opens images and encoder, once the directory is this job's; raises UserError.
        report: prints what is there, given the manifest.
    """
    accelerator, out = create_accelerator(), Path(options.out)
    advice = f"--batch-size is {options.batch_size}; lower it, and begin again in another --out"
    with sole_job(out, "--out") as lock, advise_on_memory(advice):
        check_out(out, options.resume)  # again: another job may have been here meanwhile
        work = open_work()
        lock.keep_directory()
        plan = begin(options, work.plan, accelerator)
        if plan is None:
            accelerator.print(f"{out} is complete: nothing to do")
            return
        accelerator.print(work.images.describe())
        parts = _encode_together(options, work, accelerator, lock)
        if accelerator.is_main_process:
            report(work, finish(out, plan, parts, options.skip_bad, work.captions))
        accelerator.wait_for_everyone()
        accelerator.end_training()


def _encode_together(
    options: argparse.Namespace, work: Work, accelerator: Accelerator, lock: Lock
) -> list[dict[int, tuple[dict, dict]]]:
    """Return what each process made; raises UserError where one of them was lost."""
    import torch
    from accelerate.utils import gather_object

    from gspn_dit.prepare.encoder import Encoder

    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    encoder = Encoder(work.images, work.encodes.to(accelerator.device), options)
    entries = encode_shards(encoder, Path(options.out), accelerator, lock)
    try:
        return gather_object([entries])
    except RuntimeError as error:
        time.sleep(GRACE_SECONDS)
        raise UserError("another process has ended early and tells why; continue with --resume") from error


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
