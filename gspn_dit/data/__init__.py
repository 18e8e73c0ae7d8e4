"""Labelled images and the batches made of them; the public names are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ImageSet": "gspn_dit.data.images",
    "load_images": "gspn_dit.data.images",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gspn_dit.data' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
