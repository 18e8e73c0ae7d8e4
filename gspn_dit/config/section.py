"""What every section of a config has in common."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from dataclasses import dataclass

MOST_LINES = 2**31 - 1
"""Of a window: no image has more, and an operator's arguments are 64 bits wide."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_line_count(key: str, value: int | None) -> None:
    """Raise ValueError for a window that no image can have."""
    require(value is None or value <= MOST_LINES, f"{key} is {value}, but must be at most {MOST_LINES:,}")


@dataclass(frozen=True)
class Section:
    """Part of a config: whatever its keys, no number is infinite or NaN, and no text breaks a path or a page."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for spec in dataclasses.fields(self):
            name, given = f"{section}.{spec.name}".removeprefix("."), getattr(self, spec.name)
            given = list(given.values()) if isinstance(given, dict) else given
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(value, float):
                    require(math.isfinite(value), f"{name} is {given}, but must be finite")
                if isinstance(value, str):
                    strange = [letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs")]
                    require(not strange, f"{name} is {given!r}, but must be text without control characters, in UTF-8")
