"""Augmentations: each is a function of (seed, sample number), and does to the pixels what it says."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from gspn_dit.config import ClassificationConfig
from gspn_dit.data.augment import ATTEMPTS, OPERATIONS, Augmentation, _rectangle, central

EVERYTHING = {
    "crop_scale": (0.3, 1.0),
    "crop_padding": 2,
    "colour_jitter": 0.4,
    "randaugment_magnitude": 9.0,
    "randaugment_deviation": 0.5,
    "erasing_probability": 0.5,
}


def augmentation(size: int = 12, seed: int = 0, flip: bool = False, **settings: Any) -> Augmentation:
    return Augmentation(ClassificationConfig(**settings), size, seed, flip)


def photographs(count: int, channels: int = 3, height: int = 16, width: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (channels, height, width), generator=generator).byte() for _ in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmented_image_is_a_function_of_seed_and_number_alone(channels: int) -> None:
    """Whatever it is batched with, in which order, and whatever the global generators did before."""
    augment, images = augmentation(flip=True, **EVERYTHING), photographs(6, channels)
    numbers = [0, 7, 8, 2**40, 2**40 + 1, 3]
    together = augment(images, numbers)
    assert together.shape == (6, channels, 12, 12) and together.dtype == torch.float32
    torch.manual_seed(1)
    torch.rand(5)
    backwards = augment(images[::-1], numbers[::-1])
    assert torch.equal(backwards.flip(0), together)
    for image, number, expected in zip(images, numbers, together, strict=True):
        assert torch.equal(augment([image], [number])[0], expected)
    other_seed = augmentation(flip=True, seed=1, **EVERYTHING)(images, numbers)
    other_numbers = augment(images, [n + 16 for n in numbers])
    assert all(not torch.equal(a, b) for a, b in zip(together, other_seed, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(together, other_numbers, strict=True))


def test_turning_one_augmentation_off_changes_no_other() -> None:
    images, numbers = photographs(40, height=12, width=12), range(40)
    both = augmentation(flip=True, crop_padding=2)(images, numbers)
    alone = augmentation(flip=True)(images, numbers)
    flipped = [bool(torch.equal(out, plain.flip(-1))) for out, plain in zip(alone, augmentation()(images, numbers))]
    assert 10 < sum(flipped) < 30
    shifted = augmentation(crop_padding=2)(images, numbers)
    for out, shift, flip in zip(both, shifted, flipped, strict=True):
        assert torch.equal(out, shift.flip(-1) if flip else shift)


def test_without_augmentations_an_image_is_only_normalised() -> None:
    (image,) = photographs(1, height=12, width=12)
    out = augmentation(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 1.0])([image], [3])[0]
    expected = (image.double() / 255 - torch.tensor([[[0.1]], [[0.2]], [[0.3]]])) / torch.tensor(
        [[[0.5]], [[0.25]], [[1.0]]]
    )
    torch.testing.assert_close(out, expected.float())


def test_evaluation_takes_the_centre_of_the_short_side() -> None:
    """Of 40×20 with half the short side: 20 rows become 16, 40 columns 32, of which 8×8 in the middle are kept."""
    image = torch.arange(40).byte().repeat(1, 20, 1)
    settings = ClassificationConfig(evaluation_crop=0.5)
    expected = F.center_crop(
        F.resize(image, [16, 32], antialias=True, interpolation=F.InterpolationMode.BICUBIC), [8, 8]
    )
    assert torch.equal(central(image, 8, settings), expected)
    assert torch.equal(central(image[:, :, :20], 20, ClassificationConfig()), image[:, :, :20])  # as it is


def test_shifts_are_uniform_and_leave_black() -> None:
    image = torch.full((1, 6, 6), 255, dtype=torch.uint8)
    out = augmentation(size=6, crop_padding=1)([image] * 900, range(900))
    lit = (out > 0).sum(dim=(1, 2, 3))
    counts = {size: int((lit == size).sum()) for size in (25, 30, 36)}
    assert sum(counts.values()) == 900  # both, one or neither direction shifted: 4, 4 and 1 of 9 cases
    for size, expected in ((25, 400), (30, 400), (36, 100)):
        assert abs(counts[size] - expected) < 4 * math.sqrt(expected)


def test_a_rectangle_by_hand_and_the_first_that_fits() -> None:
    """Area 1/4 of 8×8 at ratio 1: 4×4; its corner is anywhere in 0…4."""
    assert _rectangle(8, 8, (0.25, 0.25), (1.0, 1.0), [[0.0, 0.0, 0.99, 0.3]]) == (4, 1, 4, 4)
    # Ratio 4 of the whole area would be 16 wide.
    draws = [[1.0, 0.999999, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    assert _rectangle(8, 8, (0.25, 1.0), (1.0, 4.0), draws) == (0, 0, 4, 4)
    assert _rectangle(8, 8, (1.0, 1.0), (4.0, 4.0), draws) is None


def test_a_resized_crop_is_that_of_torchvision_and_falls_back_to_the_centre() -> None:
    (image,) = photographs(1, height=10, width=40)
    whole = augmentation(size=8, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), interpolation="bilinear")
    out = whole([image], [0])[0]
    expected = F.resized_crop(image, 0, 15, 10, 10, [8, 8], antialias=True)  # the whole area fits no square
    torch.testing.assert_close(out, expected.float() / 127.5 - 1)


def test_crops_cover_the_shares_that_are_asked_for() -> None:
    """Areas of the crops of a 100×100 image, read off a ramp of columns and rows, are uniform in [0.2, 0.8]."""
    from gspn_dit import rng

    draws = rng.uniform(0, rng.Stream.CROP, range(2000), (ATTEMPTS, 4)).tolist()
    boxes = [_rectangle(100, 100, (0.2, 0.8), (0.75, 4 / 3), each) for each in draws]
    areas = torch.tensor([box[2] * box[3] / 1e4 for box in boxes if box])
    assert len(areas) == 2000
    assert areas.min() > 0.19 and areas.max() < 0.81
    assert abs(areas.mean() - 0.5) < 4 * 0.6 / math.sqrt(12 * 2000) + 0.01  # large odd ones fit less often


def test_jitter_changes_by_factors_near_one() -> None:
    grey = torch.full((3, 12, 12), 100, dtype=torch.uint8)  # contrast and saturation leave one grey alone
    out = augmentation(colour_jitter=0.2)([grey] * 200, range(200))
    values = (out[:, 0, 0, 0] + 1) * 127.5
    assert 77 < values.min() < 85 and 115 < values.max() < 123  # each of three steps rounds


def test_erasing_fills_a_rectangle_with_noise() -> None:
    flat = torch.full((1, 16, 16), 255, dtype=torch.uint8)  # normalised to 1
    out = augmentation(size=16, erasing_probability=0.25)([flat] * 400, range(400))
    erased = [image for image in out if not bool((image == 1).all())]
    assert abs(len(erased) - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    noise = []
    for image in erased:
        rows, columns = torch.nonzero(image[0] != 1, as_tuple=True)
        inside = image[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert bool((inside != 1).all()) and 0.01 < inside.numel() / 256 < 0.36
        noise.append(inside.flatten())
    values = torch.cat(noise)
    assert abs(values.mean()) < 4 / math.sqrt(len(values)) and abs(values.std() - 1) < 0.05


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_grow_with_their_strength(name: str, channels: int) -> None:
    (image,) = photographs(1, channels, 32, 32)
    image = image // 2 + 30  # contrast can grow
    out = [OPERATIONS[name](image, strength, sign) for strength in (0.0, 0.9) for sign in (-1.0, 1.0)]
    assert all(part.shape == image.shape and part.dtype == torch.uint8 for part in out)
    weak, strong = (sum((part.int() - image.int()).abs().sum().item() for part in half) for half in (out[:2], out[2:]))
    grey_has_no_colour = name == "colour" and channels == 1
    assert weak <= strong and (strong > 0 or grey_has_no_colour)


@pytest.mark.parametrize(
    ("name", "strength", "sign", "value", "expected"),
    [
        ("invert", 0.5, 1.0, 40, 215),
        ("posterize", 0.5, 1.0, 0b10111111, 0b10000000),  # 4 - 2 bits stay
        ("solarize", 0.5, 1.0, 200, 55),  # from 128 on
        ("solarize", 0.5, 1.0, 100, 100),
        ("solarize add", 0.5, 1.0, 100, 155),
        ("solarize add", 0.5, 1.0, 130, 130),
        ("brightness", 0.5, 1.0, 100, 145),
        ("brightness", 0.5, -1.0, 100, 55),
        ("brightness", 1.0, -1.0, 100, 10),  # never black
    ],
)  # fmt: skip
def test_values_of_operations(name: str, strength: float, sign: float, value: int, expected: int) -> None:
    image = torch.full((1, 4, 4), value, dtype=torch.uint8)
    assert OPERATIONS[name](image, strength, sign).unique().tolist() == [expected]


def test_translations_move_by_shares_of_the_image() -> None:
    image = torch.zeros(1, 20, 20, dtype=torch.uint8)
    image[0, 10, 10] = 255
    for name, place in (("translate x", (10, 19)), ("translate y", (19, 10))):
        moved = OPERATIONS[name](image, 1.0, 1.0)  # 0.45 of 20
        assert moved[0, place[0], place[1]] == 255 and (moved == 255).sum() == 1


def test_randaugment_draws_two_operations_each_applied_half_of_the_time() -> None:
    """An image is left as it is a quarter of the time, or where its operations happen to change nothing."""
    image = torch.arange(0, 256, dtype=torch.uint8).reshape(1, 16, 16)
    plain = augmentation(size=16)([image], [0])
    out = augmentation(size=16, randaugment_magnitude=9.0)([image] * 600, range(600))
    same = sum(bool(torch.equal(each, plain[0])) for each in out)
    # Autocontrast, equalize and colour do nothing to this one: 12 of 15 operations do.
    assert abs(same / 600 - (1 - 0.5 * 12 / 15) ** 2) < 4 * math.sqrt(0.25 / 600)


def test_settings_out_of_range() -> None:
    for settings, message in (
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is [0.0, 1.0], but must be [low, high] with 0 < low <= high <= 1"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is [2.0, 1.0], but must be [low, high] with 0 < low <= high"),
        ({"crop_padding": -1}, "crop_padding is -1, but must be at least 0"),
        ({"randaugment_magnitude": 11.0}, "randaugment_magnitude is 11.0, but must lie in [0, 10]"),
        ({"randaugment_operations": 0}, "randaugment_operations is 0, but must be at least 1"),
        ({"erasing_probability": 1.5}, "erasing_probability is 1.5, but must lie in [0, 1]"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, but must lie in [0, 1)"),
        ({"mixup": -0.1}, "mixup is -0.1, but must be at least 0"),
        ({"evaluation_crop": 0.0}, "evaluation_crop is 0.0, but must lie in (0, 1]"),
        ({"mean": [0.5, 0.5]}, "mean is [0.5, 0.5], but must hold one number or one per channel"),
        ({"std": [0.0]}, "std is [0.0], but must be above 0"),
    ):
        with pytest.raises(ValueError) as caught:
            ClassificationConfig(**settings)  # type: ignore[arg-type]
        assert str(caught.value) == f"classification.{message}"
    assert dataclasses.replace(ClassificationConfig(), crop_scale=(1.0, 1.0)).crop_scale == (1.0, 1.0)
