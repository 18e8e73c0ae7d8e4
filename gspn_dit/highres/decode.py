"""Latents of any size to a PNG file, a band of tiles at a time: the image is never held whole."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from gspn_dit.files import write_atomically

TILE, OVERLAP = 64, 16
"""Latent pixels of a decoder's tile, and how many of them it shares with the next, over which the two are blended."""


def spans(extent: int, tile: int = TILE, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Cut a side into spans of `tile`, the last one shorter, each sharing `overlap` with the next.

    >>> spans(100, 64, 16)
    [(0, 64), (48, 100)]
    """
    starts = range(0, max(extent - overlap, 1), tile - overlap)
    return [(start, min(start + tile, extent)) for start in starts]


def _blend(before: np.ndarray, after: np.ndarray, axis: int) -> np.ndarray:
    """Fade from one array to another of the same shape along an axis."""
    count = before.shape[axis]
    ramp = ((np.arange(count, dtype=np.float32) + 0.5) / count).reshape([-1 if n == axis else 1 for n in range(3)])
    return before * (1 - ramp) + after * ramp


@contextmanager
def upcast(vae: Any) -> Iterator[None]:
    """Let an autoencoder in float16 whose activations overflow there (`force_upcast`, SDXL's) compute in float32."""
    dtype = vae.dtype
    needed = dtype == torch.float16 and vae.config.get("force_upcast")
    if needed:
        nn.Module.to(vae, dtype=torch.float32)
    try:
        yield
    finally:
        if needed:
            nn.Module.to(vae, dtype=dtype)


@torch.no_grad()
def _decode_tile(vae: Any, latents: Tensor) -> np.ndarray:
    """Return pixels, float32 [H, W, C] in [-1, 1]; raises ValueError where any is not finite."""
    config = vae.config
    scaled = latents / config.scaling_factor + (config.get("shift_factor") or 0)
    pixels = vae.decode(scaled.to(vae.device, vae.dtype)).sample[0].permute(1, 2, 0).float()
    if not torch.isfinite(pixels).all():
        raise ValueError(f"the autoencoder decodes to NaN or infinite values in {vae.dtype}; use it in float32")
    return pixels.cpu().numpy()


def _bands(vae: Any, latents: Tensor, factor: int) -> Iterator[np.ndarray]:
    """Yield the tiles of each span of rows side by side, float32 [rows, W, C]."""
    width = latents.shape[-1]
    for top, bottom in spans(latents.shape[-2]):
        band: list[np.ndarray] = []
        for left, right in spans(width):
            tile = _decode_tile(vae, latents[:, :, top:bottom, left:right])
            shared = OVERLAP * factor
            if band:
                tile[:, :shared] = _blend(band[-1][:, -shared:], tile[:, :shared], axis=1)
                band[-1] = band[-1][:, :-shared]
            band.append(tile)
        yield np.concatenate(band, axis=1)


def refuse_diverged(latents: Tensor) -> None:
    """Raise ValueError where any latent is not finite."""
    if not torch.isfinite(latents).all():
        raise ValueError("the latents hold NaN or infinite values: the model has diverged; try float32 or fewer stages")


def decode_rows(vae: Any, latents: Tensor, factor: int) -> Iterator[np.ndarray]:
    """Decode latents [1, C, h, w], scaled as the model has them, to rows of pixels, uint8 [rows, W, 3], from the top.

    Raises ValueError where any latent or pixel is not finite.
    """
    refuse_diverged(latents)
    shared, kept = OVERLAP * factor, None
    with upcast(vae):
        for band in _bands(vae, latents, factor):
            if kept is not None:
                band[:shared] = _blend(kept, band[:shared], axis=0)
            kept = band[-shared:]
            yield _to_uint8(band[:-shared])
    assert kept is not None
    yield _to_uint8(kept)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8)


def write_png(path: Path, rows: Iterator[np.ndarray], height: int, width: int) -> None:
    """Write rows of RGB pixels, uint8 [any number, width, 3], to a PNG file that is complete or absent."""

    def write(file: BinaryIO) -> None:
        def chunk(kind: bytes, content: bytes) -> None:
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        compressor = zlib.compressobj(6)
        for part in rows:
            filters = np.zeros((len(part), 1), np.uint8)  # each row is preceded by its filter: none
            content = compressor.compress(
                np.concatenate([filters, part.reshape(len(part), 3 * width)], axis=1).tobytes()
            )
            if content:
                chunk(b"IDAT", content)
        chunk(b"IDAT", compressor.flush())
        chunk(b"IEND", b"")

    write_atomically(path, write)
