"""Classifier-free guidance (arXiv 2207.12598), limited to an interval of times (arXiv 2404.07724) if wanted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gspn_dit.sampling_options import check_guidance


@dataclass(frozen=True)
class Guidance:
    """How a conditional and an unconditional prediction are combined.

    Raises ValueError where a value is out of range.
    """

    scale: float = 1.0
    """unconditional + scale · (conditional - unconditional); 1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times t (1 is noise, 0 data) at which guidance acts."""
    channels: int | None = None
    """Guide the first channels alone (3 in DiT's published figures); None for all."""

    def __post_init__(self) -> None:
        check_guidance(self.scale, self.interval, self.channels)

    def acts(self, t: float) -> bool:
        """Tell whether the unconditional prediction is needed at time t in [0, 1]."""
        low, high = self.interval
        # Schedulers keep t in float32: an end of the interval that is a time of the grid must still count as inside.
        return self.scale != 1 and low - 1e-6 <= t <= high + 1e-6

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Return the guided prediction, [B, C, H, W]."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.channels is None:
            return guided
        guided[:, self.channels :] = conditional[:, self.channels :]
        return guided
