"""What the evaluation's tests share: the digits, the bundled net, and NPZ files of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fid.features import FeatureNet, load_feature_net
from fid.images import Reference, read_reference


@pytest.fixture(scope="session")
def net() -> FeatureNet:
    return load_feature_net("digits")


@pytest.fixture(scope="session")
def digits() -> Reference:
    return read_reference("digits", 8)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write `arr_0`, and `arr_1` when given, to an NPZ file and return its path."""

    def write(pixels: np.ndarray, labels: np.ndarray | None = None, name: str = "samples.npz") -> Path:
        arrays = {"arr_0": pixels} if labels is None else {"arr_0": pixels, "arr_1": labels}
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write
