"""Mixup and CutMix by sample number: partners, weights and rectangles."""

from __future__ import annotations

import math

import pytest
import torch

from gspn_dit.config import ClassificationConfig
from gspn_dit.data.mixing import mix, partner, soft_labels


def planes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of ones and their partners of zeros: a mixture shows its weights."""
    return torch.ones(count, 2, 16, 16), torch.zeros(count, 2, 16, 16)


def test_partners_are_mutual_neighbours() -> None:
    assert [partner(number) for number in (0, 1, 6, 7, 2**40)] == [1, 0, 7, 6, 2**40 + 1]


def test_mixup_weighs_images_as_it_weighs_their_labels() -> None:
    mixed, weight = mix(ClassificationConfig(mixup=0.8), 0, range(4000), *planes(4000))
    assert torch.allclose(mixed, weight[:, None, None, None].expand_as(mixed), atol=1e-6)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2·0.8 + 1)).
    variance = 1 / (4 * 2.6)
    assert abs(weight.mean() - 0.5) < 4 * math.sqrt(variance / 4000)
    assert weight.var().item() == pytest.approx(variance, rel=0.05)
    assert torch.equal(
        soft_labels(torch.tensor([1]), torch.tensor([2]), torch.tensor([0.25]), 4), torch.tensor([[0, 0.25, 0.75, 0]])
    )


def test_cutmix_weighs_labels_by_the_rectangle_that_is_left() -> None:
    mixed, weight = mix(ClassificationConfig(cutmix=1.0), 0, range(2000), *planes(2000))
    assert set(mixed.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), weight)
    for image in mixed[:50, 0]:
        rows, columns = torch.nonzero(image == 0, as_tuple=True)
        if len(rows):
            inside = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert not inside.any()  # one rectangle
    # Before its overhang is cut off, a rectangle has 1 - λ of the image, λ uniform: half of it in the mean.
    assert 0.5 < weight.mean() < 0.75


def test_each_sample_chooses_between_the_two() -> None:
    settings = ClassificationConfig(mixup=0.8, cutmix=1.0, cutmix_probability=0.3)
    mixed, _ = mix(settings, 0, range(1000), *planes(1000))
    cut = sum(set(image.unique().tolist()) <= {0.0, 1.0} for image in mixed)
    assert abs(cut - 300) < 4 * math.sqrt(1000 * 0.3 * 0.7)


def test_a_mixture_is_a_function_of_seed_and_number_alone() -> None:
    settings = ClassificationConfig(mixup=0.8, cutmix=1.0)
    images, others = torch.rand(6, 3, 8, 8), torch.rand(6, 3, 8, 8)
    numbers = [3, 0, 9, 2**40, 17, 4]
    mixed, weight = mix(settings, 7, numbers, images, others)
    for row, number in enumerate(numbers):
        alone, own = mix(settings, 7, [number], images[row : row + 1], others[row : row + 1])
        assert torch.equal(alone[0], mixed[row]) and own[0] == weight[row]
    assert not torch.equal(mix(settings, 8, numbers, images, others)[1], weight)
