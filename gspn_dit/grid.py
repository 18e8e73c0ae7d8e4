"""Image grids with one row per class, and PNG files that are never half-written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gspn_dit.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

MIN_TILE = 48  # pixels: smaller images are enlarged by a whole factor
MAX_COLUMNS = 16  # default limit on the images of one row
GUTTER = 2
FONT_SIZE = 16


def class_grid(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
) -> Image:
    """Draw images on white, one row per class with the class name in front, or row by row without labels.

    Args:
        images: uint8 [n, H, W, C], C = 1 or 3, n ≥ 1.
        labels: class ids, [n]; rows follow the ids, and a row shows its class in the order given.
        class_names: names by id; the id itself where there is none.
        columns: images per row. With labels further images of a class are left out (default: the largest class, at
            most 16); without labels the images wrap (default: a square, at most 16).
        scale: whole factor of nearest-neighbour enlargement; default: the smallest that makes tiles ≥ 48 pixels.

    Returns:
        An RGB image.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw

    _check(images, labels, columns, scale)
    rows, names = _arrange(len(images), labels, class_names, columns)
    scale = scale or max(1, math.ceil(MIN_TILE / min(images.shape[1:3])))
    tile_height, tile_width = images.shape[1] * scale, images.shape[2] * scale
    font = _font()
    margin = max((math.ceil(font.getlength(name)) for name in names), default=0)
    left = GUTTER + (margin + 4 * GUTTER if margin else 0)
    width = left + max(len(row) for row in rows) * (tile_width + GUTTER)
    row_height = max(tile_height, FONT_SIZE + 4) if margin else tile_height
    grid = PILImage.new("RGB", (width, GUTTER + len(rows) * (row_height + GUTTER)), "white")
    draw = ImageDraw.Draw(grid)
    for number, row in enumerate(rows):
        top = GUTTER + number * (row_height + GUTTER)
        if margin:
            anchor = (left - 3 * GUTTER, top + row_height // 2)
            draw.text(anchor, names[number], fill="black", font=font, anchor="rm")
        for column, index in enumerate(row):
            tile = to_pil(images[index]).convert("RGB")
            tile = tile.resize((tile_width, tile_height), PILImage.Resampling.NEAREST)
            grid.paste(tile, (left + column * (tile_width + GUTTER), top + (row_height - tile_height) // 2))
    return grid


def side_by_side(pictures: Mapping[str, Image]) -> Image:
    """Return pictures on white beside each other, each under its title; RGB."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    font, head = _font(), FONT_SIZE + 4 * GUTTER
    widths = [max(image.width, math.ceil(font.getlength(title)) + 4 * GUTTER) for title, image in pictures.items()]
    height = head + max(image.height for image in pictures.values())
    joined = PILImage.new("RGB", (sum(widths) + (len(widths) - 1) * 4 * GUTTER, height), "white")
    draw, left = ImageDraw.Draw(joined), 0
    for width, (title, image) in zip(widths, pictures.items()):
        draw.text((left + 2 * GUTTER, head // 2), title, fill="black", font=font, anchor="lm")
        joined.paste(image, (left, head))
        left += width + 4 * GUTTER
    return joined


def to_pil(pixels: np.ndarray) -> Image:
    """Return an image uint8 [H, W, C] as one of Pillow's: mode "L" for C = 1, "RGB" for C = 3."""
    from PIL import Image as PILImage

    return PILImage.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_png(image: Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG through a temporary file beside it, so that `path` is complete whenever it exists."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: image.save(file, format="PNG"))


def _check(
    images: np.ndarray, labels: Sequence[int] | np.ndarray | None, columns: int | None, scale: int | None
) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"a grid needs uint8 images [n, H, W, 1 or 3], not {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be at least 1, not {scale}")


def _arrange(
    count: int,
    labels: Sequence[int] | np.ndarray | None,
    class_names: Sequence[str] | None,
    columns: int | None,
) -> tuple[list[list[int]], list[str]]:
    """Image numbers by row, and the rows' names (none without labels)."""
    if labels is None:
        columns = columns or min(MAX_COLUMNS, math.ceil(math.sqrt(count)))
        return [list(range(start, min(start + columns, count))) for start in range(0, count, columns)], []
    columns = columns or MAX_COLUMNS
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(int(label), []).append(index)
    ids = sorted(by_class)
    known = class_names or ()
    names = [known[label] if 0 <= label < len(known) else str(label) for label in ids]
    return [by_class[label][:columns] for label in ids], names


def _font() -> FreeTypeFont | ImageFont:
    from PIL import ImageFont as fonts

    return fonts.load_default(FONT_SIZE)
