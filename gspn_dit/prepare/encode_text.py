"""Encode the captions of a set once, to shards that text-to-image training reads instead of encoding at its start.

    python -m gspn_dit.prepare.encode_text --data data/emoji --encoder minilm --max-tokens 16 --out texts
    python train.py --config configs/demo_text.yaml --text.table texts

Each shard is complete or absent, and a function of the captions and the encoder alone; the manifest is written last.
`--resume` continues an unfinished encoding, `--verify` checks what was written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.config import DataConfig
from gspn_dit.data.captions import captions_of, load_captioned
from gspn_dit.data.latent_shards import MANIFEST, PLAN, find_damage, shard_name, to_json
from gspn_dit.data.latent_shards import open_latents as open_shards
from gspn_dit.data.text_shards import FORMAT_VERSION, part_bytes, read_manifest, read_part
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import is_temporary, write_atomically
from gspn_dit.locks import NAME as LOCK
from gspn_dit.locks import sole_job
from gspn_dit.paths import path_argument
from gspn_dit.text import Encoder, encode_part, in_order, load_encoder

VERIFIED_TEXTS = 16
TOLERANCE = 2e-3
"""Largest difference, over the largest state, that float16 and another machine's rounding leave."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without the captions; raises UserError."""
    parser = ArgumentParser(prog="gspn_dit.prepare.encode_text", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=path_argument, metavar="DIR", help="a captioned folder, or encoded latents")
    parser.add_argument("--kind", choices=("imagefolder", "hf", "latents"), default="imagefolder", help="of --data")
    parser.add_argument("--caption-column", default="text", help="as data.caption_column")
    parser.add_argument("--encoder", default="minilm", help="as text.encoder")
    parser.add_argument("--max-tokens", type=int, default=32, help="as text.max_tokens")
    parser.add_argument("--prompt", action="append", default=[], dest="prompts", help="a text more; repeatable")
    parser.add_argument("--device", default="cpu", help="where the encoder runs")
    parser.add_argument("--shard-texts", type=int, default=4096, help="texts per shard")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where the shards go")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished encoding")
    parser.add_argument("--verify", action="store_true", help="check the shards in --out, and encode a few texts again")
    options = parser.parse_args(arguments)
    for name, least in (("max_tokens", 2), ("shard_texts", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least {least}")
    if options.verify and options.resume:
        raise UserError("--verify and --resume contradict each other; give one of them")
    if not options.verify and options.data is None:
        raise UserError("--data is missing")
    return options


def read_captions(options: argparse.Namespace) -> list[str]:
    """Return the distinct captions of both splits, and the prompts; raises UserError."""
    texts = set(options.prompts)
    if options.kind == "latents":
        everything = [open_shards(options.data, split) for split in ("train", "validation")]
        captions = [captions_of(part) for part in everything]
    else:
        data = DataConfig(options.kind, options.data, caption_column=options.caption_column)
        captions = [load_captioned(data, split).captions for split in ("train", "validation")]
    return sorted(texts | {text for part in captions for variants in part for text in variants})


def make_plan(options: argparse.Namespace, encoder: Encoder, ordered: list[str]) -> dict[str, Any]:
    """Return everything that the shards are a function of, as plain JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": "texts",
        "encoder": encoder.spec(),
        "width": encoder.width,
        "texts": len(ordered),
        "texts_sha256": hashlib.sha256(json.dumps(ordered).encode()).hexdigest(),
        "shard_texts": options.shard_texts,
    }


def _begin(out: Path, plan: dict[str, Any], resume: bool) -> bool:
    """Write the plan, or check that it is the one that an encoding was begun with; return whether all is done."""
    held = [file for file in out.iterdir() if not is_temporary(file.name) and file.name != LOCK]
    for name in (MANIFEST, PLAN):
        if not (out / name).exists():
            continue
        if not resume:
            raise UserError(f"--out {out} holds encoded texts already; --resume goes on, --verify checks them")
        before = read_manifest(out) if name == MANIFEST else json.loads((out / PLAN).read_bytes())
        for key, value in plan.items():
            if before.get(key) != value:
                raise UserError(
                    f"--out {out} was begun with {key} = {before.get(key)}, now it is {value}; give what it was begun "
                    "with, or another directory"
                )
        return name == MANIFEST
    if held:
        raise UserError(f"--out {out} is not empty and holds no texts; give another directory")
    write_atomically(out / PLAN, to_json(plan))
    return False


def encode(options: argparse.Namespace) -> None:
    """Encode what the options ask for; raises UserError."""
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    texts = read_captions(options)
    encoder = load_encoder(options.encoder, options.max_tokens).to(options.device)
    ordered = in_order(encoder, texts)
    plan = make_plan(options, encoder, ordered)
    with sole_job(out, "--out") as lock:
        lock.keep_directory()
        try:
            if _begin(out, plan, options.resume):
                print(f"{out} is complete: nothing to do")
                return
            entries = [_encode_shard(out, number, encoder, plan, ordered) for number in range(_shards(plan))]
            write_atomically(out / MANIFEST, to_json({**plan, "shards": entries}))
            (out / PLAN).unlink()
        except OSError as error:
            raise UserError(f"cannot write {out}: {error}; make room and continue with --resume") from None
    print(f"{out}: {len(ordered):,} texts in {len(entries)} shards, {encoder.width} channels")


def _shards(plan: dict[str, Any]) -> int:
    return -(-plan["texts"] // plan["shard_texts"])


def _encode_shard(out: Path, number: int, encoder: Encoder, plan: dict[str, Any], ordered: list[str]) -> dict[str, Any]:
    """Write a shard that is not there, and return its entry in the manifest."""
    path, size = out / shard_name(number), plan["shard_texts"]
    texts = ordered[number * size : (number + 1) * size]
    if not path.exists():
        part = encode_part(encoder, texts, f"shard {number + 1} of {_shards(plan)}")
        write_atomically(path, part_bytes(part, texts))
    elif read_part(path)[1] != texts:
        raise UserError(f"the shard {path} holds other texts; delete it and continue with --resume")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": path.name, "texts": len(texts), "bytes": len(content), "sha256": digest}


def verify(options: argparse.Namespace) -> None:
    """Check every shard's checksum, and some texts against the encoder; raises UserError for what does not hold."""
    out = Path(options.out)
    manifest = read_manifest(out)
    damage = [found for entry in manifest["shards"] if (found := find_damage(out, entry, thorough=True))]
    if damage:
        raise UserError(f"{damage[0]} ({len(damage)} of {len(manifest['shards'])} shards); delete and encode it again")
    spec = manifest["encoder"]
    encoder = load_encoder(spec["encoder"], spec["max_tokens"] or options.max_tokens).to(options.device)
    if encoder.spec() != spec:
        raise UserError(f"{out} was made with another text encoder than {spec['encoder']} is now")
    part, texts = read_part(out / manifest["shards"][-1]["file"])
    for row in range(0, len(texts), max(1, len(texts) // VERIFIED_TEXTS)):
        stored = part.states[part.starts[row] : part.starts[row + 1]].float()
        again = encode_part(encoder, [texts[row]]).states
        if stored.shape != again.shape or (stored - again).abs().max() > TOLERANCE * again.abs().max():
            raise UserError(f"{out}: the states of '{texts[row]}' are not those of the encoder; encode them again")
    print(f"{out}: {manifest['texts']:,} texts in {len(manifest['shards'])} shards are intact")


def main() -> None:
    """The command line."""
    options = parse_arguments()
    verify(options) if options.verify else encode(options)


if __name__ == "__main__":
    run_cli(main)
