"""Published and smaller model sizes, and how a name such as "GSPN-XL/2" is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Width and depth of a GSPN size; `depth` blocks plus one in the middle."""

    hidden_size: int
    depth: int


@dataclass(frozen=True)
class DiTPreset(Preset):
    """Width, depth and heads of a DiT size."""

    num_heads: int


@dataclass(frozen=True)
class GSPN2Preset(DiTPreset):
    """Width, depth, heads (for blocks that are told to have attention) and channels of the proxy of a GSPN2 size."""

    proxy_channels: int


GSPN_PRESETS = {
    # This project's own: N and T for small studies and tests, S of about 20 million parameters.
    "N": Preset(96, 6),
    "T": Preset(192, 10),
    "S": Preset(368, 24),
    # The published generative sizes (arXiv 2501.12381).
    "B": Preset(900, 30),
    "L": Preset(1200, 56),
    "XL": Preset(1500, 56),
}

DIT_PRESETS = {
    # For small studies: as many parameters as GSPN-N and GSPN-T, without the class table.
    "N": DiTPreset(64, 6, 2),
    "T": DiTPreset(128, 8, 4),
    # The published sizes (arXiv 2212.09748, table 1).
    "S": DiTPreset(384, 12, 6),
    "B": DiTPreset(768, 12, 12),
    "L": DiTPreset(1024, 24, 16),
    "XL": DiTPreset(1152, 28, 16),
}

GSPN2_PRESETS = {
    # This project's own: as many parameters as GSPN of the same size within 2%. Small models gain by a proxy wider than
    # the published sixteenth of their channels; 72 is the widest whose products the CUDA kernels hold in registers.
    "N": GSPN2Preset(64, 6, 2, 16),
    "T": GSPN2Preset(120, 10, 4, 12),
    "S": GSPN2Preset(304, 12, 4, 24),
    "B": GSPN2Preset(816, 12, 12, 48),
    "L": GSPN2Preset(1056, 24, 16, 64),
    "XL": GSPN2Preset(1216, 28, 16, 72),
}
GSPN2_BLOCK: dict[str, Any] = {
    "mixer": "gspn",
    "weight_groups": 4,
    "lpu": True,
    "scan_norm": "layer",
    "channel_skip": True,
    "gate_scale": 0.5,
    "mlp": "swiglu",
    "scan_directions": ("right", "down"),
    "scan_alternate": True,
    "conv_every": 2,
    "positions": True,
}
"""What the blocks of these models have unless they are told otherwise; docs/quality.md says what each is worth."""

PRESETS: dict[str, dict[str, Preset]] = {
    "GSPN": dict(GSPN_PRESETS),
    "GSPN2": dict(GSPN2_PRESETS),
    "DiT": dict(DIT_PRESETS),
}


def preset_options(family: str, size: str) -> dict[str, Any]:
    """Return the options of a preset by name."""
    return {**vars(PRESETS[family][size]), **(GSPN2_BLOCK if family == "GSPN2" else {})}


def parse_name(name: str) -> tuple[str, str, int]:
    """Split "GSPN-XL/2" into its family "GSPN", size "XL" and patch size 2; raise ValueError for another name."""
    match = re.fullmatch(r"(GSPN2?|DiT)-([A-Z]+)/(\d+)", name)
    if match is None or match[2] not in PRESETS[match[1]] or int(match[3]) < 1:
        names = ", ".join(f"{family}-{size}/2" for family, sizes in PRESETS.items() for size in sizes)
        raise ValueError(f"unknown model '{name}'; allowed are {names}, and other patch sizes such as GSPN-N/1")
    return match[1], match[2], int(match[3])
