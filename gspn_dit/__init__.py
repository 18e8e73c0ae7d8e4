"""GSPN-DiT: class-conditional latent diffusion with GSPN in place of self-attention.

The public names below are imported on first use, so that `import gspn_dit` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GSPNAdapter": "gspn_dit.models.unet",
    "GSPNPipeline": "gspn_dit.pipeline",
    "create_model": "gspn_dit.models",
    "gspn_scan": "gspn_dit.ops",
    "load_config": "gspn_dit.config",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gspn_dit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
