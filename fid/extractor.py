"""What the feature extractors of this package have in common as torch-fidelity extractors."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class LayeredExtractor(FeatureExtractorBase):
    """An eager extractor of named layers: "features", and "logits" for the Inception score where it has them."""

    layers: ClassVar[tuple[str, ...]]

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return cls.layers

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" and "logits" in cls.layers else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError("this extractor is not compiled")
