"""A token mixer of one's own in DiT's block: an average over rows and columns, with a learned map before and after.

    python examples/add_a_mixer.py --model.name DiT-N/2 --model.mixer cross --output_dir runs/cross

Every command knows the mixer once this module is imported: `multiply_adds` is all that a dry run asks of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import run_cli
from gspn_dit.models.mixers import MIXERS, Mixer
from gspn_dit.training.loop import train


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
    run_cli(lambda: train(parse_train_arguments()), "--resume auto resumes from the last checkpoint")
