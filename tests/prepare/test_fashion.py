"""Reading Fashion-MNIST: the IDX format by hand, and the package's files where they are installed."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from gspn_dit.data.images import load_images
from gspn_dit.errors import UserError
from gspn_dit.prepare.fashion import CLASS_NAMES, IMAGES, LABELS, SOURCE, convert, read_idx, read_split


def write_idx(path: Path, magic: int, values: np.ndarray) -> None:
    header = magic.to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_source(directory: Path, labels: tuple[int, ...] = (9, 0, 3)) -> Path:
    """Three training images and two test images; pixel (r, c) of image i is i + r + c."""
    pixels = np.arange(28)[:, None] + np.arange(28) + np.arange(3)[:, None, None]
    for name, count in (("train", 3), ("t10k", 2)):
        write_idx(directory / f"{name}-images-idx3-ubyte.gz", IMAGES, pixels[:count])
        write_idx(directory / f"{name}-labels-idx1-ubyte.gz", LABELS, np.array(labels[:count]))
    return directory


def test_images_are_padded_and_labels_named(tmp_path: Path) -> None:
    convert(write_source(tmp_path / "source"), tmp_path / "set")
    train, test = (load_images("hf", tmp_path / "set", split) for split in ("train", "validation"))
    assert (len(train), len(test), train.image_size, train.channels) == (3, 2, 32, 1)
    assert [train.class_names[label] for label in train.labels] == ["Ankle boot", "T-shirt", "Dress"]
    pixels = train.pixels()[2, :, :, 0]
    assert pixels[2, 2] == 2 and pixels[29, 29] == 2 + 27 + 27
    assert not pixels[:2].any() and not pixels[30:].any() and not pixels[:, :2].any() and not pixels[:, 30:].any()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    images = source / "train-images-idx3-ubyte.gz"
    content = images.read_bytes()
    images.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        read_split(source, "train")
    images.write_bytes(gzip.compress(gzip.decompress(content)[:-1]))
    with pytest.raises(UserError, match="is not an IDX file of the kind 2051, or is cut short"):
        read_split(source, "train")
    images.write_bytes(gzip.compress(b"abc"))
    with pytest.raises(UserError, match="is not an IDX file"):
        read_idx(images, IMAGES)
    images.unlink()
    with pytest.raises(UserError, match="does not exist; apt-get install dataset-fashion-mnist"):
        convert(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    write_source(tmp_path / "wrong", labels=(10, 0, 1))
    with pytest.raises(UserError, match="do not belong together"):
        read_split(tmp_path / "wrong", "train")
    with pytest.raises(UserError, match="exists already; give another directory"):
        convert(tmp_path / "wrong", tmp_path / "wrong")


@pytest.mark.skipif(
    not Path(SOURCE).is_dir() and not os.environ.get("CI"), reason="apt-get install dataset-fashion-mnist"
)
def test_the_package_holds_70000_images() -> None:
    images, labels = read_split(Path(SOURCE), "test")
    assert images.shape == (10_000, 32, 32) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [1000] * len(CLASS_NAMES)
    labels = read_idx(Path(SOURCE) / "train-labels-idx1-ubyte.gz", LABELS)
    assert np.bincount(labels).tolist() == [6000] * len(CLASS_NAMES)
