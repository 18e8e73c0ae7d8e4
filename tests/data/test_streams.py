"""Streams: every image once per epoch, shared out, and found again by a resumed run."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from gspn_dit import rng
from gspn_dit.data.images import load_images
from gspn_dit.data.latents import IdentityLatent
from gspn_dit.data.streams import ImageStream, StreamBatches, open_stream
from gspn_dit.errors import LocalUserError, UserError

COUNT = 24


def dataset_of(count: int, first: int = 0) -> datasets.Dataset:
    """Image number i is filled with i; its label is i modulo 2."""
    numbers = range(first, first + count)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    columns = {"image": [Image.new("L", (4, 4), i) for i in numbers], "label": [i % 2 for i in numbers]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved data set of 24 training and 6 test images."""
    directory = tmp_path_factory.mktemp("stream") / "set"
    datasets.DatasetDict({"train": dataset_of(COUNT), "test": dataset_of(6, 100)}).save_to_disk(directory)
    return directory


@pytest.fixture(scope="module")
def stream(saved: Path) -> ImageStream:
    return open_stream(str(saved), None, 4)[0]


def make(
    stream: ImageStream, rank: int = 0, world: int = 1, block: int = 5, seed: int = 3, flip: bool = False
) -> StreamBatches:
    return StreamBatches(stream, IdentityLatent(4, 1), seed, flip, block, rank, world)


def numbers_in(latents: Tensor) -> list[int]:
    return [int(image[0, 0, 0]) for image in IdentityLatent(4, 1).decode(latents)]


def read(batches: StreamBatches, first_batch: int, stop_batch: int, size: int) -> list[int]:
    """Images of consecutive batches of `size` images per process."""
    world, found = batches.world, []
    for batch in range(first_batch, stop_batch):
        first = (batch * world + batches.rank) * size
        latents, labels = batches.shuffled(range(first, first + size))
        images = numbers_in(latents)
        assert labels.tolist() == [image % 2 for image in images]
        found += images
    return found


def test_stream_knows_its_classes_size_and_held_out_images(saved: Path) -> None:
    stream, held_out = open_stream(str(saved), None, 4)
    assert (len(stream), stream.class_names, stream.image_size, stream.channels) == (COUNT, ["even", "odd"], 4, 1)
    assert held_out is not None and held_out.pixels()[:, 0, 0, 0].tolist() == [100, 101, 102, 103]
    assert held_out.labels.tolist() == [0, 1, 0, 1]


def test_every_epoch_reads_every_image_once_in_another_order(stream: ImageStream) -> None:
    images = read(make(stream), 0, 3 * COUNT // 4, 4)
    epochs = [images[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(COUNT))


def test_processes_share_an_epoch_out(stream: ImageStream) -> None:
    for world in (2, 3):
        shares = [read(make(stream, rank, world), 0, 4, COUNT // world // 4) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == list(range(COUNT))


@pytest.mark.parametrize("world", [1, 2])
def test_resumed_run_reads_what_an_uninterrupted_one_reads(stream: ImageStream, world: int) -> None:
    """The same seed, number of processes and batch: bit for bit, from any step on, over the ends of epochs."""
    for rank in range(world):
        whole = read(make(stream, rank, world, flip=True), 0, 20, 3)
        for step in (1, 2, 5, 9, 13, 19):
            assert read(make(stream, rank, world, flip=True), step, 20, 3) == whole[3 * step :]


@pytest.mark.parametrize("rank", [0, 1])
def test_resume_finds_its_row_in_a_later_round_of_a_short_piece(rank: int) -> None:
    """Pieces of 18 and 6 images shared out to two processes: one of them reads its 6 again and again."""

    def piece(sizes: list[int]) -> Iterator[dict[str, Any]]:
        for size in sizes:
            yield from dataset_of(size).cast_column("image", datasets.Image(decode=False))

    features = dataset_of(1).features.copy()
    features["image"] = datasets.Image(decode=False)
    pieces = datasets.IterableDataset.from_generator(piece, features=features, gen_kwargs={"sizes": [18, 6]})
    stream = ImageStream(pieces, "pieces", COUNT, 4, 1, False)
    whole = read(make(stream, rank, 2, block=4), 0, 6, 2)
    assert [read(make(stream, rank, 2, block=4), batch, batch + 1, 2) for batch in range(6)] == [
        whole[2 * batch : 2 * batch + 2] for batch in range(6)
    ]


def test_size_of_the_batch_does_not_matter_in_one_process(stream: ImageStream) -> None:
    assert read(make(stream), 0, 12, 5) == read(make(stream), 0, 60, 1) == read(make(stream), 0, 5, 12)


def test_blocks_are_shuffled_and_a_block_of_one_keeps_the_order_of_the_stream(saved: Path) -> None:
    plain = datasets.load_from_disk(saved)["train"].to_iterable_dataset(num_shards=1)
    stream = ImageStream(plain.cast_column("image", datasets.Image(decode=False)), "x", COUNT, 4, 1, False)
    assert read(make(stream, block=1), 0, 6, 4) == list(range(COUNT))
    images = read(make(stream, block=8), 0, 6, 4)
    assert images != list(range(COUNT))
    assert [sorted(images[start : start + 8]) for start in (0, 8, 16)] == [list(range(s, s + 8)) for s in (0, 8, 16)]


def test_seed_decides(stream: ImageStream) -> None:
    assert read(make(stream, seed=0), 0, 6, 4) != read(make(stream, seed=1), 0, 6, 4)


def test_flips_are_by_sample_number(saved: Path, tmp_path: Path) -> None:
    halves = [Image.new("L", (4, 4)) for _ in range(8)]
    for image in halves:
        image.paste(255, (2, 0, 4, 4))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    columns = {"image": halves, "label": [0] * 8}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "halves")
    stream, held_out = open_stream(str(tmp_path / "halves"), None, 4)
    assert held_out is None
    latents, _ = make(stream, flip=True).shuffled(range(40, 56))
    mirrored = (latents[:, 0, 0, 0] > 0).tolist()
    assert mirrored == (rng.uniform(3, rng.Stream.FLIP, range(40, 56)) < 0.5).tolist() and {True, False} == set(
        mirrored
    )


def test_images_are_cropped_to_the_size_asked_for(saved: Path) -> None:
    stream, _ = open_stream(str(saved), 2, 4)
    latents, _ = StreamBatches(stream, IdentityLatent(2, 1), 0).shuffled(range(3))
    assert latents.shape == (3, 1, 2, 2)


def test_parquet_files_stream_if_their_number_of_rows_is_known(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    dataset_of(COUNT).to_parquet(str(tmp_path / "set" / "train-00000.parquet"))
    with pytest.raises(UserError, match="does not say how many images it has"):
        open_stream(str(tmp_path / "set"), None, 4)


def labelled(labels: list[int | None], names: list[str] | None = None) -> datasets.Dataset:
    names = names or ["even", "odd"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [Image.new("L", (4, 4), i) for i in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    "parts",
    [
        {"train": labelled([0, 1, -1]), "test": labelled([0, 1])},
        {"train": labelled([0, 1, None]), "test": labelled([0, 1])},
        {"train": labelled([0, 1]), "test": labelled([-1, -1])},
        {"train": labelled([0, 1]), "test": labelled([None])},
        {"train": labelled([0, 1]), "test": labelled([0, 1], ["odd", "even"])},
        {"train": labelled([0, 1]), "test": labelled([])},
        {"train": labelled([0, 1]), "unsupervised": labelled([0])},
        {"a": labelled([0, 1]), "b": labelled([0])},
    ],
)
def test_a_saved_set_is_refused_as_where_it_is_not_streamed(tmp_path: Path, parts: dict[str, datasets.Dataset]) -> None:
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError) as stored:
        load_images("hf", tmp_path / "set")
    with pytest.raises(UserError) as streamed:
        open_stream(str(tmp_path / "set"), None, 4)
    assert str(streamed.value) == str(stored.value)


def test_size_and_channels_are_those_of_the_stored_set(tmp_path: Path) -> None:
    """Not those of the first image: a later one in colour makes the set RGB."""
    mixed = labelled([0, 1, 0])
    colour = [*(Image.new("L", (4, 4)) for _ in range(2)), Image.new("RGB", (4, 4), (1, 2, 3))]
    mixed = datasets.Dataset.from_dict({"image": colour, "label": [0, 1, 0]}, features=mixed.features)
    mixed.save_to_disk(tmp_path / "set")
    assert open_stream(str(tmp_path / "set"), None, 4)[0].channels == 3
    sizes = [Image.new("L", (4, 4)), Image.new("L", (5, 4))]
    datasets.Dataset.from_dict({"image": sizes, "label": [0, 1]}, features=mixed.features).save_to_disk(
        tmp_path / "two"
    )
    with pytest.raises(UserError, match=r"mixed sizes: 4x4 \(1 images\), 5x4 \(1 images\); set data\.image_size"):
        open_stream(str(tmp_path / "two"), None, 4)


def test_an_image_is_named_by_its_row(tmp_path: Path) -> None:
    cells: list[dict[str, Any]] = [{"bytes": encoded(i), "path": None} for i in range(12)]
    cells[7]["bytes"] = encoded(7)[:60]  # its header is whole
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict({"image": cells, "label": [0] * 12}, features=features).save_to_disk(tmp_path / "set")
    batches = make(open_stream(str(tmp_path / "set"), None, 4)[0])
    with pytest.raises(LocalUserError, match="cannot read the image in row 7: "):
        batches.shuffled(range(12))


def encoded(value: int) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((4, 4), value).save(content, "PNG")
    return content.getvalue()


def test_rows_of_files_are_checked_as_they_are_drawn() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for label in (0, 1, None, 1):
            yield {"image": {"bytes": encoded(3), "path": None}, "label": label}

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    stream = ImageStream(datasets.IterableDataset.from_generator(rows, features=features), "x", 4, 4, 1, False, "train")
    batches = make(stream, block=1)
    batches.shuffled(range(2))
    with pytest.raises(LocalUserError, match="images without a class label in its part 'train'"):
        batches.shuffled(range(2, 4))


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, stream: ImageStream) -> None:
    with pytest.raises(UserError, match=r"set data\.path"):
        open_stream(None, None, 4)
    with pytest.raises(UserError, match="is neither a directory nor OWNER/NAME"):
        open_stream(str(tmp_path / "absent"), None, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be streamed"):
        open_stream(str(tmp_path / "empty"), None, 4)
    with pytest.raises(UserError, match="images of a stream cannot be looked up"):
        make(stream).at([0])


def test_no_image_is_decoded_but_those_of_the_batch(stream: ImageStream, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: decoded.append(file) or original(file, *rest))
    latents, _ = make(stream).shuffled(range(16, 20))
    assert latents.dtype == torch.float32 and len(decoded) == 4
