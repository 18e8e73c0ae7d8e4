"""Encoded texts on disk: shards that are memory-mapped, and a manifest that is written last.

    manifest.json             the text encoder, its channels; texts, bytes and SHA-256 of each shard
    shard-00000.safetensors   states float16 [all tokens, width], starts int64 [n + 1], texts uint8 (UTF-8, JSON),
                              and pooled float16 [n, P] where the encoder has them

Texts are distinct, and the empty one is among them. `gspn_dit.prepare.encode_text` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.data.latent_shards import MANIFEST, PLAN, find_damage
from gspn_dit.errors import UserError
from gspn_dit.text import TextPart, TextTable

FORMAT_VERSION = 1


def part_bytes(part: TextPart, texts: list[str]) -> bytes:
    """Return the content of a shard: the same for the same texts and states."""
    from safetensors.torch import save

    tensors = {
        "states": part.states.half(),
        "starts": part.starts,
        "texts": torch.from_numpy(np.frombuffer(json.dumps(texts).encode(), np.uint8).copy()),
    }
    if part.pooled is not None:
        tensors["pooled"] = part.pooled.half()
    for name in ("states", "pooled"):
        if name in tensors and not tensors[name].isfinite().all():
            raise UserError(f"the text encoder gives {name} that float16 cannot hold")
    return save(tensors)


def read_part(path: Path) -> tuple[TextPart, list[str]]:
    """Return a shard's texts and their states, which are mapped and not read; raises UserError if it is damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as shard:
            found: dict[str, Tensor] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        texts = json.loads(found["texts"].numpy().tobytes())
        part = TextPart(found["states"], found["starts"], found.get("pooled"))
        if len(part.starts) != len(texts) + 1 or int(part.starts[-1]) != len(part.states):
            raise ValueError("its parts do not fit")
    except Exception as error:  # safetensors has an error of its own
        raise UserError(f"the shard {path} is damaged: {str(error).splitlines()[0]}") from None
    return part, texts


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of encoded texts; raises UserError if there is none, or it is of another version."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        version = manifest["format_version"], manifest["kind"]
    except FileNotFoundError:
        unfinished = (directory / PLAN).exists()
        remedy = (
            "it is unfinished: continue with --resume" if unfinished else "write them with gspn_dit.prepare.encode_text"
        )
        raise UserError(f"{directory} holds no encoded texts (no {MANIFEST}); {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / MANIFEST} is not of encoded texts: {error}") from None
    if version != (FORMAT_VERSION, "texts"):
        raise UserError(f"{directory} has format_version and kind {version}, this version reads {FORMAT_VERSION}")
    return manifest


def open_texts(directory: str, encoder: str, max_tokens: int) -> tuple[TextTable, dict[str, Any]]:
    """Return encoded texts by number, and what tells their encoder; sizes are checked, checksums by --verify alone.

    Raises:
        UserError: there are none, a shard is missing or damaged, or a config's encoder is another one.
    """
    place = Path(directory)
    manifest = read_manifest(place)
    spec = manifest["encoder"]
    if spec["encoder"] != encoder or spec["max_tokens"] not in (None, max_tokens):
        raise UserError(
            f"text.table {directory} was made with --encoder {spec['encoder']} and --max-tokens {spec['max_tokens']}, "
            f"but text.encoder is {encoder} and text.max_tokens {max_tokens}; set them alike"
        )
    parts: list[TextPart] = []
    numbers: dict[str, int] = {}
    for entry in manifest["shards"]:
        if damage := find_damage(place, entry, thorough=False):
            raise UserError(f"{damage}; encode the texts again with gspn_dit.prepare.encode_text")
        part, texts = read_part(place / entry["file"])
        parts.append(part)
        numbers |= {text: number for number, text in enumerate(texts, start=len(numbers))}
    return TextTable(numbers, tuple(parts)), spec
