"""Which settings are tried on how many images: a grid, and successive halving (arXiv 1502.07943)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Candidate:
    """How to sample; one point of the grid."""

    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = WHOLE
    ema: float | None = None
    """Relative length of the averaged weights, made from a run's snapshots; None: the checkpoint's own EMA."""
    sampling_shift: float | None = None
    """None: the checkpoint's own."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "guidance_interval": list(self.guidance_interval)}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Candidate:
        """Undo `to_dict`."""
        low, high = found["guidance_interval"]
        return cls(**{**found, "guidance_interval": (low, high)})

    def describe(self) -> str:
        """Return it in a few words, such as "guidance 1.5 in [0, 0.8], EMA 0.05, shift 2"."""
        text = f"guidance {self.guidance_scale:g}"
        if self.guidance_interval != WHOLE:
            text += " in [{:g}, {:g}]".format(*self.guidance_interval)
        text += "" if self.ema is None else f", EMA {self.ema:g}"
        return text + ("" if self.sampling_shift is None else f", shift {self.sampling_shift:g}")


def grid(
    scales: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    lengths: Sequence[float | None],
    shifts: Sequence[float | None],
) -> list[Candidate]:
    """Return every combination once; without guidance (scale 1) its interval says nothing, and stays whole.

    >>> len(grid([1.0, 1.5], [(0.0, 1.0), (0.0, 0.8)], [None], [None]))
    3
    """
    every = (
        Candidate(scale, WHOLE if scale == 1 else interval, length, shift)
        for length, shift, interval, scale in itertools.product(lengths, shifts, intervals, scales)
    )
    return list(dict.fromkeys(every))


@dataclass(frozen=True)
class Rung:
    """A round of the halving: so many candidates are drawn up to so many images."""

    candidates: int
    images: int


def plan(candidates: int, images: int, least: int, factor: int, multiple: int) -> list[Rung]:
    """Return the rounds: from one to the next 1/factor of the candidates is kept, with factor times the images.

    The last round has `images`, and there are as many as leave 2 candidates or more in it and `least` images or more
    in the first. Numbers of images are rounded up to a multiple.

    >>> plan(48, 2048, 65, 4, 64)
    [Rung(candidates=48, images=128), Rung(candidates=12, images=512), Rung(candidates=3, images=2048)]
    """

    def rounded(count: float) -> int:
        return multiple * math.ceil(count / multiple)

    rounds = 1
    while candidates / factor**rounds > 1 and rounded(images / factor**rounds) >= least:
        rounds += 1
    return [
        Rung(math.ceil(candidates / factor**number), rounded(images / factor ** (rounds - 1 - number)))
        for number in range(rounds)
    ]


def survivors(scores: Mapping[int, float], keep: int) -> list[int]:
    """Return the numbers of the candidates of the lowest scores, best first; NaN is worst, of equals the first is kept.

    >>> survivors({0: 2.0, 1: float("nan"), 2: 1.0, 3: 2.0}, 3)
    [2, 0, 3]
    """
    return sorted(scores, key=lambda number: (math.isnan(scores[number]), scores[number], number))[:keep]
