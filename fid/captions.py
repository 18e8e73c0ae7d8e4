"""What images were drawn for or show, in words: captions beside files, and vectors of them that were encoded before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.errors import UserError

METADATA = "metadata.jsonl"
COLUMN = "text"


@dataclass(frozen=True)
class Texts:
    """How captions become vectors that images are compared with."""

    encode: Callable[[Sequence[str]], Tensor]
    """Return a vector of length 1 of each caption, float [n, width]."""
    source: str
    """What encodes them, for the report."""
    net: int | None = None
    """Which of the further nets gives images vectors of the same space (CLIP); None: a ridge map of the first net's
    features, fitted on the real images, see `fid.retrieval`."""


def captions_beside(place: Path, files: Callable[[], Sequence[Path]]) -> tuple[str, ...] | None:
    """Return the caption of each image from `metadata.jsonl` in a folder or its splits; None where there is none.

    `files` is called for the images only where there are captions.

    Raises:
        UserError: a line is not `{"file_name": …, "text": …}`, or an image has no line.
    """
    tables = [folder / METADATA for folder in (place, *sorted(path for path in place.iterdir() if path.is_dir()))]
    found: dict[str, str] = {}
    for table in filter(Path.is_file, tables):
        try:
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            found |= {os.path.normpath(table.parent / row["file_name"]): str(row[COLUMN]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{table} has a line that is not {{"file_name": …, "{COLUMN}": …}}: {error!r}; mend or remove it'
            ) from None
    if not found:
        return None
    names = [os.path.normpath(file) for file in files()]
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{METADATA} in {place} has no caption of {missing[0]}; every image needs one, or none has")
    return tuple(found[name] for name in names)


def open_vectors(directory: str | os.PathLike[str]) -> Texts:
    """Captions that `python -m gspn_dit.prepare.encode_text` encoded: the mean state of each, of length 1.

    Raises:
        UserError: there are none, or a shard is damaged; `encode` raises it for a caption that is not among them.
    """
    from gspn_dit.data.text_shards import read_manifest, read_part

    place = Path(directory)
    manifest = read_manifest(place)
    vectors: dict[str, Tensor] = {}
    for entry in manifest["shards"]:
        part, texts = read_part(place / entry["file"])
        for text, start, stop in zip(texts, part.starts[:-1].tolist(), part.starts[1:].tolist(), strict=True):
            vectors[text] = F.normalize(part.states[start:stop].float().mean(dim=0), dim=0)

    def encode(captions: Sequence[str]) -> Tensor:
        missing = sorted(set(captions) - vectors.keys())
        if missing:
            raise UserError(
                f"--texts {place} lacks {len(missing):,} captions, such as '{missing[0]}'; encode those of samples and "
                "reference with gspn_dit.prepare.encode_text"
            )
        return torch.stack([vectors[caption] for caption in captions])

    return Texts(encode, f"{manifest['encoder']['encoder']}, mean state")
