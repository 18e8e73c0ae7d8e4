"""What the evaluation's tests share: the digits, the bundled net, NPZ files of samples, and a net of a few features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fid.features import FeatureNet, load_feature_net
from fid.images import Reference, read_reference

TINY = "tiny-of-the-tests"
TINY_DIM = 8


class TinyExtractor(FeatureExtractorBase):
    """Fixed random projections of an image's 4×4 means: 8 features, 5 logits, 6 "spatial" values; needs no weights."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        for layer, width in (("features", TINY_DIM), ("logits", 5), ("spatial", 6)):
            self.register_buffer(layer, torch.randn(48, width, generator=generator))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features", "logits", "spatial")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)
        return tuple(means @ getattr(self, layer) for layer in self.features_list)


def tiny_net(suffix: str = "tiny", layers: tuple[str, ...] = ("features", "logits", "spatial")) -> FeatureNet:
    """The tiny extractor as a net of any image size; with an empty suffix it passes for the published Inception."""
    if TINY not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(TINY, TinyExtractor)
    extractor = create_feature_extractor(TINY, list(layers), cuda=False, verbose=False)
    return FeatureNet(extractor, suffix, "tiny", "0" * 64, None, 3, TINY_DIM, (), {})


def noise_images(count: int, seed: int, size: int = 8, low: int = 0) -> np.ndarray:
    """Images of independent blocks of noise, uint8 [count, size, size, 3]."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(low, 256, (count, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


@pytest.fixture(scope="session")
def net() -> FeatureNet:
    return load_feature_net("digits")


@pytest.fixture(scope="session")
def digits() -> Reference:
    return read_reference("digits", 8)


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what the command line remembers out of the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write `arr_0`, and `arr_1` when given, to an NPZ file and return its path."""

    def write(pixels: np.ndarray, labels: np.ndarray | None = None, name: str = "samples.npz") -> Path:
        arrays = {"arr_0": pixels} if labels is None else {"arr_0": pixels, "arr_1": labels}
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write
