"""What text-to-image learns from: images as batches with their captions, and every caption encoded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn_dit.config import Config
from gspn_dit.data.batches import Batches, LatentBatches
from gspn_dit.data.build import build_data, fingerprint
from gspn_dit.data.captions import captions_of, load_captioned
from gspn_dit.data.images import ImageSet
from gspn_dit.data.latents import create_latent
from gspn_dit.data.text_shards import open_texts, read_manifest
from gspn_dit.errors import UserError
from gspn_dit.text import TextTable, encode_all, encoder_width, load_encoder


@dataclass(frozen=True)
class CaptionedBatches:
    """Images of a split, and the captions of each."""

    images: Batches | LatentBatches
    captions: list[tuple[str, ...]]

    def fingerprint(self) -> str:
        """Return a hash by which other images are noticed."""
        images = self.images.images
        return fingerprint(images) if isinstance(images, ImageSet) else images.fingerprint


def open_captioned(config: Config) -> tuple[CaptionedBatches, CaptionedBatches | None]:
    """Return what is trained on and what validates, if anything does; raises UserError for what cannot be used."""
    if config.data.name == "latents":
        data = build_data(config)
        parts = [
            CaptionedBatches(part, captions_of(part.images))
            for part in (data.training, data.validation)
            if isinstance(part, LatentBatches)
        ]
        return parts[0], parts[1] if len(parts) > 1 else None
    training = _open_images(config, "train")
    held_out = training.images.images.has_validation or config.data.validation_fraction > 0
    return training, _open_images(config, "validation") if held_out else None


def _open_images(config: Config, split: str) -> CaptionedBatches:
    opened = load_captioned(config.data, split)
    images = opened.images
    latent = create_latent(config.latent, images.image_size, images.channels)
    images = dataclasses.replace(images, channels=latent.image_channels)
    batches = Batches(images, latent, config.seed, config.data.horizontal_flip and split == "train")
    batches.decode_small_set()
    return CaptionedBatches(batches, opened.captions)


def encode_texts(config: Config, texts: set[str]) -> tuple[TextTable, dict[str, Any]]:
    """Return texts, encoded, and what tells their encoder; raises UserError where a prepared table lacks one."""
    options = config.text
    if options.table is None:
        encoder = load_encoder(options.encoder, options.max_tokens)
        return encode_all(encoder, sorted(texts)), encoder.spec()
    table, spec = open_texts(options.table, options.encoder, options.max_tokens)
    if missing := sorted(texts - table.numbers.keys()):
        raise UserError(
            f"text.table {options.table} lacks {len(missing):,} of {len(texts):,} captions and prompts, such as "
            f"'{missing[0]}'; encode them again with gspn_dit.prepare.encode_text"
        )
    return table, spec


def text_width(config: Config) -> int:
    """Return the channels of a text's states, without its encoder's weights."""
    table = config.text.table
    return encoder_width(config.text.encoder) if table is None else read_manifest(Path(table))["width"]
