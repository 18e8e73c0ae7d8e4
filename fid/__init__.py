"""Evaluation of generated images: features, metrics and a report; sees files and images, never models.

`python -m fid` on the command line, `fid.evaluate(samples, reference, features, out)` from Python. The public names
are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "FeatureNet": "fid.features",
    "evaluate": "fid.evaluation",
    "load_feature_net": "fid.features",
    "score": "fid.opened",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fid' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
