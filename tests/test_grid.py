"""Grids: where tiles land, how they are enlarged and labelled, and files that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from gspn_dit.grid import GUTTER, MIN_TILE, class_grid, save_png


def flat(values: list[int], size: int = 48, channels: int = 1) -> np.ndarray:
    """One image of `size` pixels per value, all of that value."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), size, size, channels)).copy()


def tile_values(grid: Image.Image, rows: int, columns: int, tile: int = 48) -> list[list[int]]:
    """The grey value in the middle of every tile."""
    pixels = np.asarray(grid)
    left = pixels.shape[1] - columns * (tile + GUTTER)
    middle = tile // 2
    return [
        [
            int(pixels[GUTTER + r * (tile + GUTTER) + middle, left + c * (tile + GUTTER) + middle, 0])
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def test_one_row_per_class_in_the_order_given() -> None:
    grid = class_grid(flat([10, 20, 30, 40, 50, 60]), [3, 1, 3, 1, 1, 3], ["a", "b", "c", "d"])
    assert tile_values(grid, 2, 3) == [[20, 40, 50], [10, 30, 60]]


def test_columns_limits_a_class_and_white_fills_short_rows() -> None:
    grid = class_grid(flat([10, 20, 30, 40]), [0, 0, 0, 1], ["a", "b"], columns=2)
    assert tile_values(grid, 2, 2) == [[10, 20], [40, 255]]


def test_without_labels_images_wrap_and_no_margin_is_left() -> None:
    grid = class_grid(flat([10, 20, 30, 40, 50]))
    assert grid.size == (GUTTER + 3 * (48 + GUTTER), GUTTER + 2 * (48 + GUTTER))
    assert tile_values(grid, 2, 3) == [[10, 20, 30], [40, 50, 255]]


@pytest.mark.parametrize(("size", "scale"), [(8, 6), (7, 7), (32, 2), (48, 1), (256, 1)])
def test_small_images_are_enlarged_by_a_whole_factor(size: int, scale: int) -> None:
    grid = class_grid(flat([9], size))
    assert grid.size == (size * scale + 2 * GUTTER, size * scale + 2 * GUTTER)
    assert size * scale >= MIN_TILE


def test_enlargement_repeats_pixels() -> None:
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    tile = np.asarray(class_grid(image, scale=3))[GUTTER:-GUTTER, GUTTER:-GUTTER, 0]
    np.testing.assert_array_equal(tile, image[0, :, :, 0].repeat(3, axis=0).repeat(3, axis=1))


def test_colours_stay() -> None:
    image = np.zeros((1, 48, 48, 3), np.uint8)
    image[...] = (1, 2, 3)
    assert class_grid(image).getpixel((20, 20)) == (1, 2, 3)


def test_rows_are_labelled_by_name_or_by_id() -> None:
    images = flat([0, 0])

    def margin(names: list[str] | None) -> np.ndarray:
        pixels = np.asarray(class_grid(images, [0, 1], names))
        return pixels[:, : pixels.shape[1] - 48 - 2 * GUTTER]

    short, long = margin(["i", "i"]), margin(["i", "a long class name"])
    assert long.shape[1] > short.shape[1]
    for row in (slice(0, 50), slice(50, 100)):
        assert long[row].min() < 60  # there is dark text in front of every row
    assert long.mean() > 200  # on white
    np.testing.assert_array_equal(margin(None), margin(["0", "1"]))
    np.testing.assert_array_equal(margin(["0"]), margin(["0", "1"]))


def test_labels_fit_beside_tiny_tiles() -> None:
    assert class_grid(flat([0, 0], 4), [0, 1], ["g", "j"], scale=1).size[1] >= 2 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((1, 8, 8, 1))}, "uint8 images"),
        ({"images": np.zeros((1, 8, 8, 2), np.uint8)}, r"not uint8 of shape \(1, 8, 8, 2\)"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, r"\(0, 8, 8, 1\)"),
        ({"images": flat([1, 2]), "labels": [0]}, "1 labels for 2 images"),
        ({"images": flat([1]), "columns": 0}, "columns must be at least 1, not 0"),
        ({"images": flat([1]), "scale": 0}, "scale must be at least 1, not 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_grid(**arguments)


def test_a_png_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "grid.png"
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    save_png(picture, path)
    with Image.open(path) as stored:
        assert stored.size == (3, 2) and stored.getpixel((0, 0)) == (1, 2, 3)

    def fail(_: Image.Image, target: BinaryIO, **__: str) -> None:
        target.write(b"half")
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(picture, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
