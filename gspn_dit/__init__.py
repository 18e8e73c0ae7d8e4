"""GSPN-DiT: latent diffusion by class or by text with GSPN in place of self-attention.

The public names below are imported on first use, so that `import gspn_dit` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspn_dit.config import load_config
    from gspn_dit.highres import generate_highres
    from gspn_dit.models import create_model
    from gspn_dit.models.unet import GSPNAdapter
    from gspn_dit.ops import gspn_scan
    from gspn_dit.pipeline import GSPNPipeline

__version__ = "0.1.0"

_HOMES = {
    "GSPNAdapter": "gspn_dit.models.unet",
    "GSPNPipeline": "gspn_dit.pipeline",
    "create_model": "gspn_dit.models",
    "generate_highres": "gspn_dit.highres",
    "gspn_scan": "gspn_dit.ops",
    "load_config": "gspn_dit.config",
}
__all__ = ["GSPNAdapter", "GSPNPipeline", "__version__", "create_model", "generate_highres", "gspn_scan", "load_config"]


if not TYPE_CHECKING:  # for type checkers these names are the imports above, and others are mistakes

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'gspn_dit' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOMES[name]), name)
