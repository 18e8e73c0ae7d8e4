"""The keys of task classification: what is done to training images and labels, and how images are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.config.section import Section, require


@dataclass(frozen=True)
class ClassificationConfig(Section):
    """Task classification alone; every augmentation is a function of the sample number, and off by default."""

    crop_scale: tuple[float, float] | None = None
    """Share of the image that a random crop covers, lowest and highest; it is resized to data.image_size (random
    resized crop, arXiv 1409.4842). null: none."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop, lowest and highest."""
    crop_padding: int = 0
    """Pixels by which images are then shifted at most in either direction; what is uncovered becomes black."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of whatever is resized."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are multiplied by factors within this of 1, in random order."""
    randaugment_magnitude: float | None = None
    """Strength of RandAugment's operations, 0 to 10 (arXiv 1909.13719); null: none."""
    randaugment_deviation: float = 0.0
    """Standard deviation of that strength."""
    randaugment_operations: int = 2
    """How many are drawn for an image; each is applied with probability 1/2."""
    erasing_probability: float = 0.0
    """Of filling a random rectangle with noise (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Both parameters of the Beta distribution of mixing weights (arXiv 1710.09412); 0: no mixup."""
    cutmix: float = 0.0
    """The same of CutMix, whose weight is a rectangle's share of the image (arXiv 1905.04899); 0: none."""
    cutmix_probability: float = 0.5
    """Of CutMix where both are on."""
    label_smoothing: float = 0.0
    """Share of a label that all classes get (arXiv 1512.00567)."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Subtracted from pixels in 0…1; one number, or one per channel."""
    std: list[float] = field(default_factory=lambda: [0.5])
    """By which they are divided then."""
    evaluation_crop: float = 1.0
    """Side of the centred square that is evaluated, over the image's short side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "crop_ratio"):
            pair, most = getattr(self, name), 1.0 if name == "crop_scale" else float("inf")
            allowed = f"[low, high] with 0 < low <= high{' <= 1' if name == 'crop_scale' else ''}"
            fits = pair is None or 0 < pair[0] <= pair[1] <= most
            require(fits, f"classification.{name} is {list(pair or ())}, but must be {allowed}")
        for name in ("crop_padding", "randaugment_deviation", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"classification.{name} is {getattr(self, name)}, but must be at least 0")
        count = self.randaugment_operations
        require(count >= 1, f"classification.randaugment_operations is {count}, but must be at least 1")
        strength = self.randaugment_magnitude
        require(
            strength is None or 0 <= strength <= 10,
            f"classification.randaugment_magnitude is {strength}, but must lie in [0, 10]",
        )
        for name in ("colour_jitter", "erasing_probability", "cutmix_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"classification.{name} is {value}, but must lie in [0, 1]")
        require(
            0 <= self.label_smoothing < 1,
            f"classification.label_smoothing is {self.label_smoothing}, but must lie in [0, 1)",
        )
        require(
            0 < self.evaluation_crop <= 1,
            f"classification.evaluation_crop is {self.evaluation_crop}, but must lie in (0, 1]",
        )
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(
                len(values) in (1, 3), f"classification.{name} is {values}, but must hold one number or one per channel"
            )
        require(min(self.std) > 0, f"classification.std is {self.std}, but must be above 0")

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0
