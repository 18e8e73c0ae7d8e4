"""Batches: functions of the seed and the sample numbers, whatever the size of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import Tensor

from gspn_dit import rng
from gspn_dit.data import batches as batches_module
from gspn_dit.data.batches import Batches
from gspn_dit.data.images import ImageSet
from gspn_dit.data.latents import IdentityLatent

COUNT = 13


def pixels_of(index: int) -> np.ndarray:
    """Image number `index`: its number at the left, 200 at the right."""
    image = np.full((4, 4), index, dtype=np.uint8)
    image[:, 2:] = 200
    return image


@pytest.fixture(scope="module")
def image_set() -> ImageSet:
    columns = {
        "image": [PILImage.fromarray(pixels_of(index)) for index in range(COUNT)],
        "label": [index % 3 for index in range(COUNT)],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    return ImageSet(Dataset.from_dict(columns, features=features), "numbers", image_size=4, channels=1)


def make(image_set: ImageSet, seed: int = 5, flip: bool = False) -> Batches:
    return Batches(image_set, IdentityLatent(4, 1), seed, flip)


def numbers_in(latents: Tensor) -> list[int]:
    """Which image each latent is, whether it was mirrored or not."""
    pixels = IdentityLatent(4, 1).decode(latents)
    return [int(min(image[0, 0, 0], image[0, 3, 0])) for image in pixels]


def mirrored(latents: Tensor) -> list[bool]:
    return [bool(image[0, 0, 0] > image[0, 0, 3]) for image in latents]


def test_images_come_in_the_order_of_the_seed_with_their_labels(image_set: ImageSet) -> None:
    latents, labels = make(image_set).shuffled(range(20))
    expected = rng.data_indices(5, range(20), COUNT).tolist()
    assert numbers_in(latents) == expected
    assert labels.tolist() == [index % 3 for index in expected]
    assert (latents.dtype, latents.shape, labels.dtype) == (torch.float32, (20, 1, 4, 4), torch.int64)
    np.testing.assert_array_equal(IdentityLatent(4, 1).decode(latents)[0, :, :, 0], pixels_of(expected[0]))


def test_every_epoch_covers_every_image_in_another_order(image_set: ImageSet) -> None:
    order = numbers_in(make(image_set).shuffled(range(3 * COUNT))[0])
    epochs = [order[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_batch_size_does_not_matter(image_set: ImageSet, flip: bool, size: int) -> None:
    batches = make(image_set, flip=flip)
    whole, whole_labels = batches.shuffled(range(28))
    parts = [batches.shuffled(range(start, start + size)) for start in range(0, 28, size)]
    assert torch.equal(torch.cat([latents for latents, _ in parts]), whole)
    assert torch.equal(torch.cat([labels for _, labels in parts]), whole_labels)


def test_batches_can_be_asked_for_in_any_order(image_set: ImageSet) -> None:
    batches = make(image_set, flip=True)
    whole, _ = batches.shuffled(range(28))
    assert torch.equal(batches.shuffled([27, 3, 14])[0], whole[[27, 3, 14]])


def test_the_seed_decides(image_set: ImageSet) -> None:
    first, second = (make(image_set, seed).shuffled(range(COUNT))[0] for seed in (0, 1))
    assert numbers_in(first) != numbers_in(second)


def test_half_of_the_samples_are_mirrored_by_their_number(image_set: ImageSet) -> None:
    latents, _ = make(image_set, flip=True).shuffled(range(1000))
    flipped = mirrored(latents)
    assert 437 < sum(flipped) < 563  # four standard deviations
    assert flipped == (rng.uniform(5, rng.Stream.FLIP, range(1000)) < 0.5).tolist()
    of_first_image = [flip for flip, number in zip(flipped, numbers_in(latents), strict=True) if number == 0]
    assert {True, False} == set(of_first_image)  # a new draw every epoch
    original, _ = make(image_set).shuffled(range(1000))
    assert not any(mirrored(original))
    chosen = torch.tensor(flipped)[:, None, None, None]
    assert torch.equal(latents, torch.where(chosen, original.flip(3), original))


def test_validation_is_in_the_order_asked_for_and_never_mirrored(image_set: ImageSet) -> None:
    batches = make(image_set, flip=True)
    latents, labels = batches.at(range(2, 9))
    assert numbers_in(latents) == [2, 3, 4, 5, 6, 7, 8]
    assert labels.tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert not any(mirrored(latents))
    assert numbers_in(batches.at([9, 1])[0]) == [9, 1]


def test_decoding_on_demand_gives_what_the_cache_gives(image_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = make(image_set, flip=True)
    expected = cached.shuffled(range(30))
    monkeypatch.setattr(batches_module, "CACHE_BYTES", COUNT * 4 * 4 - 1)  # one byte short
    uncached = make(image_set, flip=True)
    decoded: list[int] = []
    monkeypatch.setattr(
        ImageSet, "pixels", lambda self, rows=None, original=ImageSet.pixels: decoded.append(1) or original(self, rows)
    )
    for _ in range(2):
        actual = uncached.shuffled(range(30))
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert len(decoded) == 2
    assert torch.equal(uncached.at([3, 1])[0], cached.at([3, 1])[0])


def test_a_set_that_fits_is_decoded_once(image_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(
        ImageSet, "pixels", lambda self, rows=None, original=ImageSet.pixels: decoded.append(1) or original(self, rows)
    )
    monkeypatch.setattr(batches_module, "CACHE_BYTES", COUNT * 4 * 4)
    batches = make(image_set)
    for start in range(0, 40, 8):
        batches.shuffled(range(start, start + 8))
    batches.at([0])
    assert len(decoded) == 1


def test_batches_do_not_change_the_cache(image_set: ImageSet) -> None:
    batches = make(image_set, flip=True)
    first, labels = batches.shuffled(range(COUNT))
    kept, kept_labels = first.clone(), labels.clone()
    first[:], labels[:] = 0, 0  # what a caller does to its batch
    again, again_labels = batches.shuffled(range(COUNT))
    assert torch.equal(again, kept)
    assert torch.equal(again_labels, kept_labels)
