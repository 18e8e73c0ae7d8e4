"""Fashion-MNIST as a saved data set: 70,000 greyscale images of 10 kinds of clothing, padded from 28×28 to 32×32.

    python -m gspn_dit.prepare.fashion --out fashion

The files are those of the Debian package `dataset-fashion-mnist` (Xiao et al., arXiv 1708.07747), in the IDX format.
"""

from __future__ import annotations

import gzip
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.paths import path_argument

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "/usr/share/datasets/fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
CLASS_NAMES = [
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
PADDING = 2
"""Black pixels on each side: 28 + 2·2 = 32 is divisible by a VAE's factor and a patch."""
IMAGES, LABELS = 2051, 2049  # magic numbers: unsigned bytes in three dimensions and in one


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the uint8 array of a gzipped IDX file; raises UserError if it is missing or damaged."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; apt-get install dataset-fashion-mnist, or give --source") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    dimensions = magic & 0xFF
    header = np.frombuffer(content, ">i4", count=min(1 + dimensions, len(content) // 4))
    shape = tuple(int(size) for size in header[1:])
    if header[:1].tolist() != [magic] or len(content) != 4 * (1 + dimensions) + np.prod(shape):
        raise UserError(f"{path} is not an IDX file of the kind {magic}, or is cut short")
    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def read_split(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [n, 32, 32] and labels uint8 [n] of "train" or "test"."""
    images = read_idx(source / f"{FILES[split]}-images-idx3-ubyte.gz", IMAGES)
    labels = read_idx(source / f"{FILES[split]}-labels-idx1-ubyte.gz", LABELS)
    if len(images) != len(labels) or (len(labels) and labels.max() >= len(CLASS_NAMES)):
        raise UserError(f"the images and labels of '{split}' in {source} do not belong together")
    return np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING))), labels


def _dataset(images: np.ndarray, labels: np.ndarray) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    def cells() -> Iterator[dict[str, Any]]:
        for image in images:
            buffer = io.BytesIO()
            PILImage.fromarray(image).save(buffer, "PNG")
            yield {"bytes": buffer.getvalue(), "path": None}

    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    return Dataset.from_dict({"image": list(cells()), "label": labels.tolist()}, features=features)


def convert(source: Path, out: Path) -> None:
    """Write the splits `train` and `test` with `save_to_disk`; `out` is complete or absent."""
    from datasets import DatasetDict

    if out.exists():
        raise UserError(f"--out {out} exists already; give another directory")
    splits = DatasetDict({split: _dataset(*read_split(source, split)) for split in FILES})
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        splits.save_to_disk(str(partial))
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error}") from None
    print(f"{out}: {', '.join(f'{len(splits[split]):,} images for {split}' for split in splits)}")


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="gspn_dit.prepare.fashion", description="Turn Fashion-MNIST into a saved data set.")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where the data set goes")
    parser.add_argument(
        "--source", type=path_argument, default=SOURCE, metavar="DIR", help="directory of the .gz files"
    )
    options = parser.parse_args()
    convert(Path(options.source), Path(options.out))


if __name__ == "__main__":
    run_cli(main)
