"""A token mixer of one's own in DiT's block: an average over rows and columns, with a learned map before and after.

    python examples/add_a_mixer.py gspn_dit.train --model.name DiT-N/2 --model.mixer cross --output_dir runs/cross
    python examples/add_a_mixer.py gspn_dit.sample --checkpoint runs/cross --out cross.png

Any command of the library runs behind this script, which makes the mixer known to it.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass

from torch import Tensor, nn

from gspn_dit.models.mixers import MIXERS, Mixer


@dataclass(frozen=True)
class CrossOptions:
    """Keys of `model.mixer_options`."""

    expansion: int = 1
    """Channels inside, over those outside."""


class CrossMixer(Mixer):
    """Each token gets the mean of its row and the mean of its column."""

    def __init__(self, channels: int, options: CrossOptions) -> None:
        super().__init__()
        self.inside = nn.Linear(channels, options.expansion * channels)
        self.outside = nn.Linear(options.expansion * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inside(tokens)  # [B, H, W, C]
        return self.outside(x + x.mean(1, keepdim=True) + x.mean(2, keepdim=True))

    def multiply_adds(self, height: int, width: int) -> int:
        return height * width * (self.inside.weight.numel() + self.outside.weight.numel())


MIXERS["cross"] = (CrossMixer, CrossOptions)

if __name__ == "__main__":
    sys.argv = sys.argv[1:] or sys.exit("usage: python add_a_mixer.py MODULE ARGUMENTS")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
