"""Published and small model sizes, and how a name such as "GSPN-XL/2" is read."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Width and depth of a model size; `depth` blocks plus one in the middle."""

    hidden_size: int
    depth: int


GSPN_PRESETS = {
    # For small studies and tests.
    "N": Preset(96, 6),
    "T": Preset(192, 10),
    # The published generative sizes (arXiv 2501.12381).
    "S": Preset(368, 24),
    "B": Preset(900, 30),
    "L": Preset(1200, 56),
    "XL": Preset(1500, 56),
}


def parse_name(name: str) -> tuple[str, int]:
    """Split "GSPN-XL/2" into its size "XL" and patch size 2; raise ValueError for another name."""
    match = re.fullmatch(r"GSPN-([A-Z]+)/(\d+)", name)
    if match is None or match[1] not in GSPN_PRESETS or int(match[2]) < 1:
        sizes = ", ".join(f"GSPN-{size}/2" for size in GSPN_PRESETS)
        raise ValueError(f"unknown model '{name}'; allowed are {sizes}, and other patch sizes such as GSPN-N/1")
    return match[1], int(match[2])
