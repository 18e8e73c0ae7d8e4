"""Published figures to stand beside one's own: FID, sFID, IS, precision and recall of 50,000 ImageNet 256×256 samples.

From the tables of DiT (arXiv 2212.09748) and GSPN (2501.12381). None has been reproduced by this project yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedRow:
    """One line of a paper's table, all under the protocol adm-50k."""

    model: str
    parameters: str
    steps: str
    guidance_scale: float
    fid: float
    sfid: float
    inception_score: float
    precision: float
    recall: float


ROWS = (
    PublishedRow("DiT-XL/2", "675M", "400K", 1.0, 20.05, 6.87, 64.74, 0.621, 0.609),
    PublishedRow("GSPN-B/2", "137M", "400K", 1.0, 28.70, 6.87, 50.12, 0.585, 0.609),
    PublishedRow("GSPN-L/2", "443M", "400K", 1.0, 17.25, 8.78, 77.37, 0.657, 0.417),
    PublishedRow("GSPN-XL/2", "690M", "400K", 1.0, 15.26, 6.51, 85.99, 0.670, 0.670),
    PublishedRow("DiT-XL/2", "675M", "7M", 1.5, 2.27, 4.60, 278.2, 0.83, 0.57),
)
PROTOCOL = "adm-50k"


def published_rows(guidance_scale: Any = None) -> list[PublishedRow]:
    """The rows with that guidance scale, or all where it is unknown or nobody published with it."""
    same = [row for row in ROWS if row.guidance_scale == guidance_scale]
    return same or list(ROWS)
