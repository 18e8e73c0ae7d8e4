"""Training images that are read as they come: `datasets` streaming, split over the processes.

The image of a sample number is a function of (seed, number of processes, sample number), as everywhere in this project,
so a resumed run is bit-identical if it has as many processes as before. Unlike a stored set, a stream cannot be
entered anywhere: resuming reads, without decoding, what this process has seen of the current epoch.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.data.batches import draw_flips, draw_posterior, mirror
from gspn_dit.data.decoding import decode_cell
from gspn_dit.data.image_sources import labelled_parts, stream_saved
from gspn_dit.data.images import Headers, ImageSet, check_labels, check_parts, read_headers
from gspn_dit.data.latents import Latent
from gspn_dit.errors import LocalUserError, UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SHARDS = 256
"""Into how many pieces a saved data set is cut, whose order is shuffled and which the processes share out."""
INSPECTED = 100
"""First images of a stream from files or the hub, whose headers decide size and channels."""
ROW = "row"
"""Column of a saved set's rows by which messages name them."""


@dataclass(frozen=True)
class ImageStream:
    """Labelled images that can only be read in order."""

    dataset: IterableDataset
    """Columns `image` (Image, undecoded) and `label` (ClassLabel), and `ROW` where the rows are numbered."""
    name: str
    count: int
    image_size: int
    channels: int
    crop: bool
    part: str = "all"
    """The split, as messages name it."""
    remarks: tuple[str, ...] = ()
    """What a person should know of the images."""

    def __len__(self) -> int:
        return self.count

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by class id."""
        return list(self.dataset.features["label"].names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def rows(self, seed: int, epoch: int, rank: int, world: int, skip: int) -> Iterator[dict[str, Any]]:
        """Yield what a process reads in an epoch from its row `skip` on, again and again if it is short of rows."""
        from datasets import IterableDataset
        from datasets.distributed import split_dataset_by_node

        # A buffer of one, fed by one piece at a time, moves nothing: the order of the pieces alone is shuffled.
        options: dict[str, Any] = {"buffer_size": 1}
        if "max_buffer_input_shards" in inspect.signature(IterableDataset.shuffle).parameters:
            options["max_buffer_input_shards"] = 1
        shuffled = self.dataset.shuffle(seed=int(rng.permutation(seed, epoch, 1 << 16)[0]) + (epoch << 16), **options)
        mine = split_dataset_by_node(shuffled, rank=rank, world_size=world)
        rows = iter(mine.skip(skip))
        first = next(rows, None)
        if first is None and (count := sum(1 for _ in mine)):  # the row lies in a later round
            rows = iter(mine.skip(skip % count))
            first = next(rows)
        while True:
            if first is None:
                raise UserError(f"the stream '{self.name}' has no images for process {rank} of {world}")
            yield from itertools.chain([first], rows)
            rows = iter(mine)
            first = next(rows, None)


class _Block(NamedTuple):
    """Rows that were read one after another and are shuffled among themselves."""

    epoch: int
    number: int
    """Place among the blocks of the epoch."""
    rows: list[dict[str, Any]]


@dataclass
class StreamBatches:
    """Batches of a stream for one process of `world`; `shuffled` must be asked for the sample numbers of this one."""

    images: ImageStream
    latent: Latent
    seed: int
    horizontal_flip: bool = False
    shuffle_images: int = 1024
    """Rows that are kept, and shuffled among themselves."""
    rank: int = 0
    world: int = 1
    _block: _Block = field(default=_Block(-1, -1, []), init=False, repr=False)
    _rows: Iterator[dict[str, Any]] = field(default_factory=lambda: iter(()), init=False, repr=False)

    @cached_property
    def _rows_per_epoch(self) -> int:
        return max(1, len(self.images) // self.world)

    def shuffled(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return latents float32 [B, C, H, W] and labels int64 [B] of consecutive sample numbers of this process."""
        # A batch spans world · B numbers; this process has seen as many as lie before it, divided by the world.
        first = (numbers[0] - self.rank * len(numbers)) // self.world
        rows = [self._row(first + place) for place in range(len(numbers))]
        images = self.images
        check_labels([row["label"] for row in rows], images.num_classes, images.part, LocalUserError)
        decoded = [
            decode_cell(
                row["image"],
                row.get(ROW, f"of sample number {number} of the stream"),
                images.image_size,
                images.channels,
                images.crop,
            )[0]
            for row, number in zip(rows, numbers, strict=True)
        ]
        pixels = mirror(np.stack(decoded), draw_flips(self.seed, numbers, self.horizontal_flip))
        noise = draw_posterior(self.latent, self.seed, rng.Stream.POSTERIOR, numbers)
        return self.latent.encode(pixels, noise), torch.tensor([row["label"] for row in rows])

    def at(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Refuse: an image of a stream cannot be asked for by its index."""
        raise UserError("images of a stream cannot be looked up; leave out data.streaming, or what asks for them")

    def _row(self, position: int) -> dict[str, Any]:
        """Return what this process reads at a position of its own; blocks of rows are read in order and shuffled."""
        epoch, offset = divmod(position, self._rows_per_epoch)
        number, place = divmod(offset, self.shuffle_images)
        if (epoch, number) != (self._block.epoch, self._block.number):
            self._block = self._read_block(epoch, number)
        rows = self._block.rows
        blocks = -(-self._rows_per_epoch // self.shuffle_images)
        order = rng.permutation(self.seed, (epoch * blocks + number) * self.world + self.rank, len(rows))
        return rows[order[place]]

    def _read_block(self, epoch: int, number: int) -> _Block:
        """Read on, or, for the first block, a new epoch or a resumed run, from the block's first row."""
        first = number * self.shuffle_images
        if (epoch, number - 1) != (self._block.epoch, self._block.number):
            self._rows = self.images.rows(self.seed, epoch, self.rank, self.world, first)
        length = min(self.shuffle_images, self._rows_per_epoch - first)
        return _Block(epoch, number, list(itertools.islice(self._rows, length)))


def open_stream(
    path: str | None,
    image_size: int | None,
    validation_images: int,
    read: Callable[[str | None], dict[str, Any]] = stream_saved,
) -> tuple[ImageStream, ImageSet | None]:
    """Open a data set for streaming: training images, and as many validation images as are asked for.

    A saved set is checked as a whole, as where it is not streamed; of another one the first images are, and each that
    is drawn.

    Args:
        path: a directory that `save_to_disk` wrote, a directory of Parquet or other files that `load_dataset` streams,
            or a name on the Hugging Face hub.
        image_size: centre-crop and resize to this size; None: all have the size of the first ones.
        validation_images: these are read at once and kept; none if the source has no held-out part.
        read: opens the splits at the path.

    Raises:
        UserError: it cannot be opened, lacks classes, or does not say how many images it has.
    """
    from datasets import Dataset

    place = Path(str(path))
    parts = dict(list(labelled_parts(read(path), place, decode=False).items())[:2])
    saved = {name: part for name, part in parts.items() if isinstance(part, Dataset)}
    if saved:
        check_parts(saved)
    (name, train), *others = parts.items()
    count = len(train) if isinstance(train, Dataset) else _count(train)
    if not count:
        raise UserError(
            f"the data set {path} does not say how many images it has, which a resumed stream must know; "
            "write it with save_to_disk or push_to_hub, which record it"
        )
    held_out = [(part, _first_rows(part, dataset, validation_images)) for part, dataset in others]
    headers = read_headers(saved) if saved else _first_headers(train)
    size, channels = image_size or headers.common_size(place.name), headers.channels
    crop, remarks = image_size is not None, tuple(headers.remarks())
    stream = ImageStream(_cut(train), place.name, count, size, channels, crop, name, remarks)
    for part, rows in held_out:
        check_parts({part: rows})
        return stream, ImageSet(rows, place.name, size, channels, crop, has_validation=True)
    return stream, None


def _cut(dataset: Dataset | IterableDataset) -> IterableDataset:
    """Return a set as a stream; of a saved one it comes in pieces, and every row knows its number."""
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        return dataset
    numbered = dataset.add_column(ROW, np.arange(len(dataset)))
    return numbered.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(dataset))))


def _count(dataset: IterableDataset) -> int:
    splits = dataset.info.splits or {}
    return int(splits[str(dataset.split)].num_examples or 0) if str(dataset.split) in splits else 0


def _first_headers(dataset: IterableDataset) -> Headers:
    headers = Headers()
    for row in dataset.take(INSPECTED):
        headers.add(row["image"], "among the first of the stream")
    return headers


def _first_rows(part: str, dataset: Dataset | IterableDataset, count: int) -> Dataset:
    """Read the first rows of a held-out part."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    if isinstance(dataset, Dataset):
        rows = dataset.select(range(min(count, len(dataset))))
        return rows.cast_column("image", ImageFeature())
    found = list(dataset.take(count))
    features = dataset.features.copy()
    features["image"] = ImageFeature()
    check_labels([row["label"] for row in found], len(features["label"].names), part)
    columns = {name: [row[name] for row in found] for name in ("image", "label")}
    return Dataset.from_dict(columns, features=features)
