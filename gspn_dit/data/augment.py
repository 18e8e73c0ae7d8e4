"""Augmentation of training images by sample number, applied by torchvision's own functions.

What happens to sample n is a function of (seed, n), each augmentation with a stream of its own in `gspn_dit.rng`. So it
is the same in every process, after every restart and in every order, and turning one augmentation off changes no other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gspn_dit import rng
from gspn_dit.config import ClassificationConfig

ATTEMPTS = 10
"""How often a random rectangle is drawn until one fits, as is usual."""
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 10 / 3)
"""Share of the image, and height over width (arXiv 1708.04896, section 3.2)."""
ORDERS = list(itertools.permutations(("brightness", "contrast", "saturation")))


@dataclass(frozen=True)
class Augmentation:
    """Turns training images into inputs of a classifier.

    Args:
        settings: which augmentations.
        size: height and width of what comes out.
        seed: of the run.
        horizontal_flip: mirror half of the images.
    """

    settings: ClassificationConfig
    size: int
    seed: int
    horizontal_flip: bool = False

    def __call__(self, images: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        """Return normalised images, float32 [B, C, size, size], of uint8 images [C, H, W] and their sample numbers."""
        settings, steps = self.settings, self._steps()
        changed = list(images)
        for stream, shape, apply in steps:
            draws = rng.uniform(self.seed, stream, numbers, shape).tolist()
            changed = [apply(image, drawn) for image, drawn in zip(changed, draws, strict=True)]
        batch = normalise(torch.stack(changed), settings)
        return self._erase(batch, numbers) if settings.erasing_probability > 0 else batch

    def _steps(self) -> list[tuple[rng.Stream, tuple[int, ...], Callable[[Tensor, list], Tensor]]]:
        """Return stream, shape of an image's draws, and what is done with them, of each augmentation that is on."""
        settings, streams = self.settings, rng.Stream
        steps: list[tuple[rng.Stream, tuple[int, ...], Callable[[Tensor, list], Tensor]]] = []
        if settings.crop_scale is not None:
            steps.append((streams.CROP, (ATTEMPTS, 4), self._resized_crop))
        else:
            steps.append((streams.CROP, (0,), lambda image, _: central(image, self.size, settings)))
        if settings.crop_padding:
            steps.append((streams.SHIFT, (2,), self._shift))
        if self.horizontal_flip:
            steps.append((streams.FLIP, (1,), lambda image, u: image.flip(-1) if u[0] < 0.5 else image))
        if settings.randaugment_magnitude is not None:
            steps.append((streams.RANDAUGMENT, (settings.randaugment_operations, 4), self._randaugment))
        if settings.colour_jitter > 0:
            steps.append((streams.COLOUR, (4,), self._jitter))
        return steps

    def _resized_crop(self, image: Tensor, draws: list[list[float]]) -> Tensor:
        """Cut out a rectangle of random area and ratio and resize it (arXiv 1409.4842, section 6)."""
        assert self.settings.crop_scale is not None
        height, width = image.shape[-2:]
        box = _rectangle(height, width, self.settings.crop_scale, self.settings.crop_ratio, draws)
        if box is None:  # the largest centred rectangle of an allowed ratio
            low, high = self.settings.crop_ratio
            w, h = min(width, round(height * high)), min(height, round(width / low))
            box = ((height - h) // 2, (width - w) // 2, h, w)
        return F.resized_crop(image, *box, [self.size, self.size], _mode(self.settings), antialias=True)

    def _shift(self, image: Tensor, draws: list[float]) -> Tensor:
        most = self.settings.crop_padding
        top, left = (int(u * (2 * most + 1)) for u in draws)
        return F.pad(image, [most] * 4)[..., top : top + image.shape[-2], left : left + image.shape[-1]]

    def _randaugment(self, image: Tensor, draws: list[list[float]]) -> Tensor:
        """Apply random operations of a strength around one and the same (arXiv 1909.13719)."""
        settings = self.settings
        for which, applied, sign, spread in draws:
            operation = list(OPERATIONS.values())[int(which * len(OPERATIONS))]
            magnitude = float(settings.randaugment_magnitude or 0)
            if settings.randaugment_deviation > 0:
                magnitude = NormalDist(magnitude, settings.randaugment_deviation).inv_cdf(max(spread, 1e-12))
            if applied < 0.5:
                strength = min(max(magnitude, 0.0), 10.0) / 10
                image = operation(image, strength, -1.0 if sign < 0.5 else 1.0)
        return image

    def _jitter(self, image: Tensor, draws: list[float]) -> Tensor:
        jitter = self.settings.colour_jitter
        factors = dict(zip(("brightness", "contrast", "saturation"), draws, strict=False))
        for name in ORDERS[int(draws[3] * len(ORDERS))]:
            image = getattr(F, f"adjust_{name}")(image, 1 + jitter * (2 * factors[name] - 1))
        return image

    def _erase(self, batch: Tensor, numbers: Sequence[int]) -> Tensor:
        """Fill a rectangle of some images with standard normal noise."""
        draws = rng.uniform(self.seed, rng.Stream.ERASING, numbers, (1 + ATTEMPTS, 4)).tolist()
        for image, number, (chosen, *boxes) in zip(batch, numbers, draws, strict=True):
            if chosen[0] >= self.settings.erasing_probability:
                continue
            # The ratio is height over width here.
            ratios = (1 / ERASED_RATIO[1], 1 / ERASED_RATIO[0])
            box = _rectangle(image.shape[-2], image.shape[-1], ERASED_AREA, ratios, boxes)
            if box is not None:
                top, left, height, width = box
                noise = rng.normal(self.seed, rng.Stream.ERASING_NOISE, [number], (image.shape[0], height, width))
                image[:, top : top + height, left : left + width] = noise[0]
        return batch


def _rectangle(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: list[list[float]]
) -> tuple[int, int, int, int] | None:
    """Return top, left, height and width of the first rectangle that fits, None if none does.

    Args:
        height, width: of the image.
        scale: share of the image's area, lowest and highest.
        ratio: width over height, lowest and highest; uniform in its logarithm.
        draws: four numbers in [0, 1) for each attempt: area, ratio, and the place.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, logarithm, top, left in draws:
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        w_over_h = math.exp(low + (high - low) * logarithm)
        w, h = round(math.sqrt(target * w_over_h)), round(math.sqrt(target / w_over_h))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None


def _mode(settings: ClassificationConfig) -> InterpolationMode:
    return InterpolationMode(settings.interpolation)


def central(image: Tensor, size: int, settings: ClassificationConfig) -> Tensor:
    """Return the centred square of an image [C, H, W], resized to `size`, as it is evaluated."""
    short = round(size / settings.evaluation_crop)
    if min(image.shape[-2:]) != short:
        image = F.resize(image, [short], _mode(settings), antialias=True)
    return F.center_crop(image, [size, size])


def normalise(images: Tensor, settings: ClassificationConfig) -> Tensor:
    """Return (pixels / 255 - mean) / std, float32, of uint8 images [B, C, H, W]."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (settings.mean, settings.std))
    return (images.float() / 255 - mean) / std


# -- RandAugment's operations ----------------------------------------------------------------------------------------


def _solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert what is not below a threshold, which may be that of no change, 256."""
    return F.solarize(image, threshold) if threshold < 256 else image


def _solarize_add(image: Tensor, amount: int) -> Tensor:
    """Brighten the darker half of the values."""
    return torch.where(image < 128, (image.int() + amount).clamp(max=255).to(image.dtype), image)


def _affine(
    image: Tensor, angle: float = 0.0, x: float = 0.0, y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0
) -> Tensor:
    """Rotate by degrees about the centre, move by shares of the image, or shear by slopes about the first pixel."""
    height, width = image.shape[-2:]
    sheared = bool(shear_x or shear_y)
    return F.affine(
        image,
        angle=angle,
        translate=[round(x * width), round(y * height)],
        scale=1.0,
        shear=[math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))],
        interpolation=InterpolationMode.BILINEAR,
        fill=[128.0] * image.shape[0],
        center=[0.0, 0.0] if sheared else None,
    )


def _factor(strength: float, sign: float) -> float:
    return max(0.1, 1 + 0.9 * sign * strength)


OPERATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "autocontrast": lambda image, strength, sign: F.autocontrast(image),
    "equalize": lambda image, strength, sign: F.equalize(image),
    "invert": lambda image, strength, sign: F.invert(image),
    "rotate": lambda image, strength, sign: _affine(image, angle=30 * sign * strength),
    "posterize": lambda image, strength, sign: F.posterize(image, 4 - int(4 * strength)),
    "solarize": lambda image, strength, sign: _solarize(image, 256 - int(256 * strength)),
    "solarize add": lambda image, strength, sign: _solarize_add(image, int(110 * strength)),
    "colour": lambda image, strength, sign: F.adjust_saturation(image, _factor(strength, sign)),
    "contrast": lambda image, strength, sign: F.adjust_contrast(image, _factor(strength, sign)),
    "brightness": lambda image, strength, sign: F.adjust_brightness(image, _factor(strength, sign)),
    "sharpness": lambda image, strength, sign: F.adjust_sharpness(image, _factor(strength, sign)),
    "shear x": lambda image, strength, sign: _affine(image, shear_x=0.3 * sign * strength),
    "shear y": lambda image, strength, sign: _affine(image, shear_y=0.3 * sign * strength),
    "translate x": lambda image, strength, sign: _affine(image, x=0.45 * sign * strength),
    "translate y": lambda image, strength, sign: _affine(image, y=0.45 * sign * strength),
}
"""Operations of an image, a strength in [0, 1] and a sign; the stronger, the more an image is changed."""
