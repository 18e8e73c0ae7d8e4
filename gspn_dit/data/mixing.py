"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) by sample number.

Sample n is mixed with sample n ^ 1, its neighbour in the shuffled order, with a weight of its own: so the mixture is a
function of (seed, n), whatever the batch, the process or the restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit import rng
from gspn_dit.config import ClassificationConfig


def partner(number: int) -> int:
    """Return the sample that is mixed into a sample."""
    return number ^ 1


def mix(
    settings: ClassificationConfig, seed: int, numbers: Sequence[int], images: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix images with their partners.

    Args:
        settings: `mixup`, `cutmix`, `cutmix_probability`.
        seed: of the run.
        numbers: sample numbers, [B].
        images: [B, C, H, W].
        others: the partners' images, [B, C, H, W].

    Returns:
        The mixtures, and the weight of the images' own labels, float32 [B]; the partners' labels get the rest.
    """
    from scipy.special import betaincinv

    draws = rng.uniform(seed, rng.Stream.MIXING, numbers, (4,))  # which, how much, and where the rectangle is
    chance = settings.cutmix_probability if settings.mixup > 0 else 1.0
    rectangles = draws[:, 0] < (chance if settings.cutmix > 0 else 0.0)
    both = torch.where(rectangles, settings.cutmix, settings.mixup)
    weight = torch.from_numpy(betaincinv(both.numpy(), both.numpy(), draws[:, 1].numpy()))  # Beta, by its inverse
    mixed = torch.lerp(others, images, weight.to(images.dtype)[:, None, None, None])
    height, width = images.shape[-2:]
    for row in rectangles.nonzero().flatten().tolist():
        top, bottom, left, right = _rectangle(height, width, 1 - weight[row].item(), draws[row, 2:].tolist())
        mixed[row] = images[row]
        mixed[row, :, top:bottom, left:right] = others[row, :, top:bottom, left:right]
        weight[row] = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, weight.float()


def _rectangle(height: int, width: int, share: float, centre: list[float]) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of a rectangle of the image's ratio about a centre; what is outside is cut."""
    h, w = (round(side * share**0.5) for side in (height, width))
    y, x = int(centre[0] * height), int(centre[1] * width)
    return max(0, y - h // 2), min(height, y - h // 2 + h), max(0, x - w // 2), min(width, x - w // 2 + w)


def soft_labels(labels: Tensor, other_labels: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Return weight · own label + (1 - weight) · partner's, float32 [B, K], of labels int64 [B]."""
    own, other = (F.one_hot(part, num_classes).float() for part in (labels, other_labels))
    return torch.lerp(other, own, weight[:, None])
