"""From features to figures: the scores of one set, their intervals, and what stands beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.extraction import Extraction
from fid.features import FeatureNet
from fid.images import LabelledImages, interleave
from fid.intervals import bootstrap, jackknife
from fid.metrics import (
    class_agreement,
    inception_scores,
    kernel_distances,
    manifold_membership,
    nearest_distances,
    nearest_features,
)
from fid.moments import Gaussian, Moments
from gspn_dit.errors import UserError
from gspn_dit.protocols import Protocol

NEIGHBOUR_ROWS = 12  # samples that are shown beside their nearest reference images
NEIGHBOURS = 3


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
    def labels(self) -> np.ndarray | None:
        """Labels as ids of the net's classes in the images' own order, matched by name where the set names its own."""
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
        own = {layer: Gaussian.fit(real.extraction.moments(layer)) for layer in real.extraction.groups}
        gaussians = {} if statistics else own
        digest = hashlib.sha256()
        for layer, (mean, covariance) in sorted(statistics.items()):
            width = len(own[layer].mean) if layer in own else len(mean)
            if len(mean) != width:
                raise UserError(
                    f"the statistics in {real.images.source} are of {len(mean)} {layer} values; the net gives {width}"
                )
            digest.update(np.ascontiguousarray(mean).data)
            digest.update(np.ascontiguousarray(covariance).data)
            gaussians[layer] = Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))
        other = {
            each.names["fd"]: Gaussian.fit(extraction.moments())
            for each, extraction in zip(others, real.others, strict=True)
        }
        return cls(real, gaussians, other, digest.hexdigest() if statistics else None)


def score_names(net: FeatureNet, protocol: Protocol, count: int) -> dict[str, str]:
    """What the scores are called; on the published net outside of a comparable protocol their number is in the name."""
    if net.score_suffix or protocol.comparable:
        return net.names
    return {key: f"{name}-{count}" for key, name in net.names.items()}


@dataclass(frozen=True)
class Scores:
    """The scores of one set of images, and the values whose means some of them are."""

    figures: dict[str, Any]
    """By name; means over splits or subsets as {"mean", "std"}."""
    values: dict[str, tuple[np.ndarray, str, int]]
    """By name: the values [m] behind a mean, what they are one of each, and how many of them are independent."""


def scores_of(
    images: Measured, target: Target, names: dict[str, str], protocol: Protocol, subset: int, device: str
) -> Scores:
    """Every score of a set of images against the real ones."""
    found: dict[str, Any] = {}
    values: dict[str, tuple[np.ndarray, str, int]] = {}
    for key, layer in (("fd", "features"), ("sfd", "spatial")):
        if layer in images.extraction.groups and layer in target.gaussians:
            drawn = Gaussian.fit(images.extraction.moments(layer))
            found[names[key]] = target.gaussians[layer].frechet_distance(drawn)
    if images.logits is not None:
        splits = inception_scores(images.logits, protocol.inception_splits)
        values[names["is"]] = splits, "consecutive splits", len(splits)
    real = target.real.features
    estimates = kernel_distances(images.features, real, subset, protocol.kid_subsets, protocol.kid_seed)
    disjoint = max(1, min(len(estimates), len(images) // subset))  # the subsets themselves overlap
    values[names["kid"]] = estimates, f"subsets, {disjoint} at a time", disjoint
    found |= {name: {"mean": float(part.mean()), "std": float(part.std())} for name, (part, *_) in values.items()}
    realistic, covered = manifold_membership(images.features, real, protocol.neighbourhood, device)
    values["precision"] = realistic, "samples", len(realistic)
    values["recall"] = covered, "reference images", len(covered)
    found |= {"precision": float(realistic.mean()), "recall": float(covered.mean())}
    for (name, gaussian), extraction in zip(target.others.items(), images.others, strict=True):
        found[name] = gaussian.frechet_distance(Gaussian.fit(extraction.moments()))
    if images.net_classes and images.extraction.logits is not None:
        labels = images.labels
        found["class_agreement"] = None if labels is None else class_agreement(images.extraction.logits, labels)
    if protocol.pixel_distances:
        nearest = _pixel_distances(images.images, target.real.images)
        found["nearest_distance"] = None if nearest is None else float(np.median(nearest))
    return Scores({**found, "n": len(images)}, values)


def _pixel_distances(images: LabelledImages, real: LabelledImages) -> np.ndarray | None:
    if not isinstance(images.pixels, np.ndarray) or not isinstance(real.pixels, np.ndarray):
        return None
    return nearest_distances(images.pixels, real.pixels)


def score_intervals(
    images: Measured, target: Target, scores: Scores, names: dict[str, str], protocol: Protocol
) -> dict[str, dict[str, float | str]]:
    """The 95 % interval of every score that has one, by name; {} where the protocol wants none."""
    if not protocol.intervals:
        return {}
    found = {}
    for key, layer in (("fd", "features"), ("sfd", "spatial")):
        if names[key] in scores.figures:
            name = names[key]
            found[name] = jackknife(images.extraction.groups[layer], target.gaussians[layer], scores.figures[name])
    for (name, gaussian), extraction in zip(target.others.items(), images.others, strict=True):
        found[name] = jackknife(extraction.groups["features"], gaussian, scores.figures[name])
    return found | {name: bootstrap(*values) for name, values in scores.values.items()}


def compare_with_held_out(
    drawn: Measured,
    held_out: Measured | None,
    target: Target,
    scores: Scores,
    own: Scores | None,
    names: dict[str, str],
    protocol: Protocol,
) -> dict[str, Any] | None:
    """Samples beside held-out real images, at an equal number of each, because the Fréchet distance falls with n."""
    if held_out is None or own is None:
        return None
    count = min(len(drawn), len(held_out))
    (of_samples, recall), (of_held_out, own_recall) = (
        _distance_and_recall(images, whole, count, target, names["fd"], protocol)
        for images, whole in ((drawn, scores), (held_out, own))
    )
    distances = scores.figures.get("nearest_distance"), own.figures.get("nearest_distance")
    return {
        "n": count,
        "fd_samples": of_samples,
        "fd_held_out": of_held_out,
        "fd_ratio_at_equal_n": of_samples / of_held_out if of_held_out > 0 else None,
        "recall_samples": recall,
        "recall_held_out": own_recall,
        "nearest_distance_ratio": distances[0] / distances[1] if distances[0] is not None and distances[1] else None,
    }


def _distance_and_recall(
    images: Measured, scores: Scores, count: int, target: Target, name: str, protocol: Protocol
) -> tuple[float, float]:
    """Fréchet distance and recall of the first `count` images in the order of the splits."""
    if count == len(images):
        return scores.figures[name], scores.figures["recall"]
    part = images.features[:count]
    distance = target.gaussians["features"].frechet_distance(Gaussian.fit(Moments.of(part)))
    _, covered = manifold_membership(part, target.real.features, protocol.neighbourhood)
    return distance, float(covered.mean())


def nearest_neighbours(images: Measured, target: Target) -> list[dict[str, Any]]:
    """The reference images nearest in feature space to the first image of each of the first classes.

    Returns:
        One row per shown sample: its index in its set, its label, and the reference's indices and distances.
    """
    labels = images.images.labels
    if labels is None:
        chosen = np.arange(min(NEIGHBOUR_ROWS, len(images)))
    else:
        chosen = np.sort(np.unique(labels, return_index=True)[1][:NEIGHBOUR_ROWS])
    count = min(NEIGHBOURS, len(target.real))
    indices, distances = nearest_features(
        images.extraction.features[torch.from_numpy(chosen)], target.real.extraction.features, count
    )
    return [
        {
            "sample": int(sample),
            "label": None if labels is None else int(labels[sample]),
            "nearest": nearest.tolist(),
            "distance": [round(float(value), 6) for value in distance],
        }
        for sample, nearest, distance in zip(chosen, indices, distances, strict=True)
    ]
