"""What is scored: a set of images with what the nets say about it, and the real images that it is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fid.extraction import Extraction
from fid.features import FeatureNet
from fid.intervals import strata_of
from fid.labelled import LabelledImages, interleave
from fid.moments import Gaussian
from gspn_dit.errors import UserError


@dataclass(frozen=True)
class Measured:
    """A set of images with what the nets say about it."""

    images: LabelledImages
    extraction: Extraction
    """Of the first net, in the images' own order."""
    others: tuple[Extraction, ...]
    sha256: str
    net_classes: tuple[str, ...]
    """The first net's classes; () where it has none of the samples'."""
    wanted_order: str
    """"stored" or "interleaved", see `Protocol.order`."""

    def __len__(self) -> int:
        return len(self.extraction.features)

    @cached_property
    def was_sorted(self) -> bool:
        """Whether the set is stored class by class though the protocol takes it as stored."""
        labels = self.images.labels
        return (
            self.wanted_order == "stored"
            and labels is not None
            and labels[0] != labels[-1]
            and bool((np.diff(labels) >= 0).all())
        )

    @property
    def order_name(self) -> str:
        """How the samples are ordered in the Inception score's splits, for the report."""
        if self.wanted_order == "stored" and not self.was_sorted:
            return "as stored, consecutive splits"
        return "interleaved classes, consecutive splits"

    @cached_property
    def order(self) -> np.ndarray:
        """Indices of the images in the order of the splits."""
        stored = self.wanted_order == "stored" and not self.was_sorted
        return interleave(None if stored else self.images.labels, len(self))

    @cached_property
    def features(self) -> Tensor:
        """Features of the first net in the order of the splits."""
        return self.extraction.features[torch.from_numpy(self.order)]

    @cached_property
    def logits(self) -> Tensor | None:
        """Logits of the first net in the order of the splits."""
        logits = self.extraction.logits
        return None if logits is None else logits[torch.from_numpy(self.order)]

    @cached_property
    def strata(self) -> np.ndarray | None:
        """Class ids in the images' own order where each class has as many images, see `strata_of`."""
        return strata_of(self.images.labels)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels as ids of the extractor's classes in image order, matched by name where the set names its own."""
        images = self.images
        if images.labels is None or not self.net_classes:
            return None
        if images.class_names is None:
            return images.labels
        ids = {name: index for index, name in enumerate(self.net_classes)}
        if any(name not in ids for name in images.class_names):
            return None
        return np.array([ids[name] for name in images.class_names], dtype=np.int64)[images.labels]


@dataclass(frozen=True)
class Target:
    """The real images that samples are measured against."""

    real: Measured
    gaussians: dict[str, Gaussian]
    """By layer of the first net."""
    others: dict[str, Gaussian]
    """By the name of the score on the other nets."""
    statistics_sha256: str | None
    """Hash of the statistics that came with the reference and took the place of its own images' moments."""

    @classmethod
    def build(
        cls,
        real: Measured,
        statistics: dict[str, tuple[np.ndarray, np.ndarray]],
        net: FeatureNet,
        others: Sequence[FeatureNet],
    ) -> Target:
        """From the reference's own images, or from statistics of the same net alone where it brings them."""
        own = {layer: Gaussian.fit(moments) for layer, moments in real.extraction.moments.items()}
        gaussians = {} if statistics else own
        digest = hashlib.sha256()
        for layer, (mean, covariance) in sorted(statistics.items()):
            width = len(own[layer].mean) if layer in own else len(mean)
            if len(mean) != width:
                raise UserError(
                    f"the statistics in {real.images.source} are of {len(mean)} {layer} values; "
                    f"the feature extractor gives {width}"
                )
            digest.update(np.ascontiguousarray(mean).data)
            digest.update(np.ascontiguousarray(covariance).data)
            gaussians[layer] = Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))
        other = {
            each.names["fd"]: Gaussian.fit(extraction.moments["features"])
            for each, extraction in zip(others, real.others, strict=True)
        }
        return cls(real, gaussians, other, digest.hexdigest() if statistics else None)
