"""From an encoded image to pixels: headers, decoding to 8 bits, ADM's centre crop, and what is wrong in one line."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.errors import LocalUserError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

GREY_MODES = ("1", "L")
BACKGROUND = "white"
"""What shines through where an image is transparent."""
_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of EXIF that swap width and height."""


def decode_cell(
    cell: dict[str, Any] | None, row: int | str, size: int | tuple[int, int], channels: int, crop: bool
) -> tuple[np.ndarray, str]:
    """Decode an undecoded image to uint8 [H, W, channels]; return it and the mode it had, such as "L" or "CMYK".

    Args:
        cell: {"bytes": …, "path": …}, one of them None.
        row: its number, or in words where it lies, for an image without a path.
        size: height and width; one number for a square.
        channels: 1 or 3.
        crop: whether an image of another size is resized and centre-cropped.

    Raises:
        LocalUserError: it cannot be read, or has another size and shall not be cropped; names its file or row.
    """
    place = place_of(cell, row)
    height, width = (size, size) if isinstance(size, int) else size
    image, mode = _decode(_content(cell, place), place, channels)
    if image.size != (width, height):
        if not crop:
            raise LocalUserError(
                f"image {place} is {image.size[0]}x{image.size[1]}, the others {width}x{height}; "
                "set data.image_size and every image is centre-cropped and resized to it"
            )
        image = center_crop(image, height, width)
    return as_pixels(image), mode


def as_pixels(image: Image) -> np.ndarray:
    """Return an image of mode "L" or "RGB" as uint8 [H, W, 1 or 3]."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def decode_image(source: bytes | str | os.PathLike[str], place: str, channels: int | None = None) -> Image:
    """Decode one image to 8 bits: mode "L" for 1 channel, "RGB" for 3; None takes what the image has.

    An EXIF orientation is applied, and transparency laid on `BACKGROUND`: what colours an image hides is no one's
    intention.

    Args:
        source: encoded bytes or a file path.
        place: how an error message names the image.
    """
    return _decode(source, place, channels)[0]


def _decode(source: bytes | str | os.PathLike[str], place: str, channels: int | None) -> tuple[Image, str]:
    """Return an image in 8 bits, and the mode it had."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    try:
        with PILImage.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            _require_eight_bits(opened, place)
            opened.load()
            mode = opened.mode
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                background = PILImage.new("RGBA", image.size, BACKGROUND)
                image = PILImage.alpha_composite(background, image.convert("RGBA"))
            if channels is None:
                channels = 1 if mode in GREY_MODES else 3
            return image.convert("L" if channels == 1 else "RGB"), mode
    except UserError:
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise LocalUserError(f"cannot read the image {place}: {_reason(error)}") from error


def read_header(source: bytes | str | os.PathLike[str], place: str) -> tuple[tuple[int, int], str]:
    """Return (width, height) as decoded, an EXIF orientation applied, and the mode of an image.

    Raises UserError if that cannot be read, or the image has more than 8 bits.
    """
    from PIL import Image as PILImage

    try:
        with PILImage.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            _require_eight_bits(opened, place)
            width, height = opened.size
            if width != height and opened.getexif().get(_ORIENTATION) in _QUARTER_TURNS:
                width, height = height, width
            return (width, height), opened.mode
    except LocalUserError as error:  # every process reads the same headers: rank 0 alone reports
        raise UserError(str(error)) from error
    except Exception as error:
        raise UserError(f"cannot read the image {place}: {_reason(error)}") from error


def read_cell_header(cell: dict[str, Any] | None, row: int | str) -> tuple[tuple[int, int], str]:
    """`read_header` of an undecoded image."""
    place = place_of(cell, row)
    try:
        content = _content(cell, place)
    except LocalUserError as error:
        raise UserError(str(error)) from error
    return read_header(content, place)


def center_crop(image: Image, height: int, width: int | None = None) -> Image:
    """The largest centred part of an image of the wanted aspect, resized, as ADM (arXiv 2105.05233) prepares ImageNet.

    Halves with a box filter while both sides are at least twice as long as wanted, then bicubic until the image just
    covers height × width. `width` None is for a square.
    """
    from PIL.Image import Resampling

    width = height if width is None else width
    while image.size[0] >= 2 * width and image.size[1] >= 2 * height:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Resampling.BOX)
    scale = max(width / image.size[0], height / image.size[1])
    if scale != 1:
        covering = (max(width, round(image.size[0] * scale)), max(height, round(image.size[1] * scale)))
        image = image.resize(covering, Resampling.BICUBIC)
    left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def place_of(cell: dict[str, Any] | None, row: int | str) -> str:
    """Return how a message names an undecoded image: by its path, or else its row."""
    path = (cell or {}).get("path")
    if path:
        return str(path)
    return row if isinstance(row, str) else f"in row {row}"


def _content(cell: dict[str, Any] | None, place: str) -> bytes | str:
    content = (cell or {}).get("bytes") or (cell or {}).get("path")
    if not content:
        raise LocalUserError(f"cannot read the image {place}: the cell is empty")
    return content


def _reason(error: Exception) -> str:
    from PIL import Image as PILImage

    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PILImage.DecompressionBombError) and PILImage.MAX_IMAGE_PIXELS:
        most = 2 * PILImage.MAX_IMAGE_PIXELS
        return f"it has more than {most:,} pixels, the most that are decoded; save it smaller, or remove it"
    if isinstance(error, PILImage.UnidentifiedImageError):
        return "not an image that Pillow knows, or damaged"
    return str(error) or type(error).__name__


def _require_eight_bits(image: Image, place: str) -> None:
    if image.mode.startswith(("I", "F")):
        raise LocalUserError(
            f"the image {place} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits"
        )
