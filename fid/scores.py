"""From features to figures: the metrics, each with its interval, and what stands beside them.

A metric is one entry of `METRICS`: the reports take its name, title, figure and interval from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid import intervals
from fid.captions import Texts
from fid.features import FeatureNet
from fid.intervals import Interval
from fid.labelled import LabelledImages
from fid.measured import Measured, Target
from fid.metrics import (
    class_agreement,
    half_sample_recalls,
    inception_scores,
    kernel_distances,
    manifold_membership,
    nearest_distances,
    nearest_features,
)
from fid.moments import Gaussian, Moments
from fid.reconstruction import WINDOW, pairs, psnr, ssim
from fid.retrieval import CaptionMap, retrieved
from gspn_dit.protocols import Protocol

NEIGHBOUR_ROWS = 12  # samples that are shown beside their nearest reference images
NEIGHBOURS = 3


@dataclass(frozen=True)
class Scoring:
    """A set of images, the real ones, and everything else that a metric may look at."""

    images: Measured
    target: Target
    names: dict[str, str]
    """What the scores of metrics that are named after the feature extractor are called, see `score_names`."""
    protocol: Protocol
    subset: int
    """Images of one estimate of the kernel distance."""
    device: str = "cpu"
    texts: Texts | None = None
    """What encodes captions, for the metrics of captioned images."""

    @property
    def captioned(self) -> bool:
        """Whether images can be compared with captions."""
        by_clip = self.texts is not None and self.texts.net is not None
        return self.texts is not None and bool(
            self.images.images.captions and (by_clip or self.target.real.images.captions)
        )

    @cached_property
    def shown(self) -> tuple[Tensor, Tensor]:
        """Vectors of the images and of their captions, [n, width] each, in the images' own order."""
        assert self.texts is not None and self.images.images.captions is not None, "asked where `captioned`"
        vectors = self.texts.encode(self.images.images.captions)
        if self.texts.net is not None:
            return self.images.others[self.texts.net].features, vectors
        real = self.target.real
        assert real.images.captions is not None
        fitted = CaptionMap.fit(real.extraction.features, self.texts.encode(real.images.captions))
        return fitted(self.images.extraction.features), vectors

    @cached_property
    def retrieved(self) -> np.ndarray:
        """Whether each image's own caption is the nearest of all."""
        assert self.images.images.captions is not None
        return retrieved(*self.shown, self.images.images.captions)

    @cached_property
    def fits(self) -> np.ndarray:
        """The cosine of each image's vector and its caption's."""
        images, captions = self.shown
        return (images * captions).sum(dim=1).numpy()

    @cached_property
    def membership(self) -> tuple[np.ndarray, np.ndarray]:
        """Which images lie in the real manifold, and which real ones in theirs, in their own orders."""
        features, real = self.images.extraction.features, self.target.real.features
        return manifold_membership(features, real, self.protocol.neighbourhood, self.device)

    @cached_property
    def inception_scores(self) -> np.ndarray:
        """Of every consecutive split."""
        assert self.images.logits is not None, "asked of nets with logits alone"
        return inception_scores(self.images.logits, self.protocol.inception_splits)

    @cached_property
    def kernel_distances(self) -> np.ndarray:
        """Of every pair of subsets."""
        knobs = self.protocol.kid_subsets, self.protocol.kid_seed
        return kernel_distances(self.images.features, self.target.real.features, self.subset, *knobs)

    @cached_property
    def reconstruction(self) -> tuple[np.ndarray, np.ndarray]:
        """PSNR and SSIM of every image and its original."""
        found = [(psnr(*pair), ssim(*pair)) for pair in pairs(self.images.images, self.target.real.images)]
        ratios, similarities = zip(*found, strict=True)
        return np.concatenate(ratios), np.concatenate(similarities)

    def has(self, layer: str) -> bool:
        """Tell whether both sides have moments of a layer."""
        return layer in self.images.extraction.moments and layer in self.target.gaussians

    def distance(self, layer: str) -> float:
        """The Fréchet distance of a layer of the first net."""
        return self.target.gaussians[layer].frechet_distance(Gaussian.fit(self.images.extraction.moments[layer]))

    def distance_interval(self, rows: Tensor | None, layer: str) -> Interval | None:
        """The interval of that distance from a layer's rows, or None where they were not kept."""
        if rows is None:
            return None
        return intervals.frechet(rows, self.target.gaussians[layer], self.distance(layer), self.images.strata)


@dataclass(frozen=True)
class Metric:
    """A score: how it is computed, how far it would move with other samples, and what tables call it."""

    compute: Callable[[Scoring], Any]
    """A float, {"mean", "std"} of splits or subsets, or None where it would not be worth the time."""
    interval: Callable[[Scoring], Interval | None] | None = None
    """Its 95 % interval, None where it has none."""
    title: str = ""
    """"" where its name will do."""
    applies: Callable[[Scoring], bool] = lambda _: True
    """Whether a set has it at all."""


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())}


def _recall_interval(scoring: Scoring) -> Interval:
    features, halves = (
        scoring.images.extraction.features,
        intervals.half_samples(len(scoring.images), scoring.images.strata),
    )
    replicas = half_sample_recalls(
        features, scoring.target.real.features, halves, scoring.protocol.neighbourhood, scoring.device
    )
    return intervals.delete_half(float(scoring.membership[1].mean()), replicas)


def _kernel_interval(scoring: Scoring) -> Interval:
    estimates = scoring.kernel_distances
    disjoint = max(1, min(len(estimates), len(scoring.images) // scoring.subset))  # the subsets themselves overlap
    return intervals.bootstrap(estimates, f"subsets, {disjoint} at a time", disjoint)


def _class_agreement(scoring: Scoring) -> float | None:
    logits, labels = scoring.images.extraction.logits, scoring.images.labels
    return None if labels is None or logits is None else class_agreement(logits, labels)


def _draws(scoring: Scoring) -> bool:
    """Tell whether the images are samples, and no reconstructions."""
    return not scoring.protocol.paired


def _nearest_distance(scoring: Scoring) -> float | None:
    nearest = _pixel_distances(scoring.images.images, scoring.target.real.images)
    return None if nearest is None else float(np.median(nearest))


METRICS: dict[str, Metric] = {
    "fd": Metric(
        lambda scoring: scoring.distance("features"),
        lambda scoring: scoring.distance_interval(scoring.images.extraction.features, "features"),
    ),
    "sfd": Metric(
        lambda scoring: scoring.distance("spatial"),
        lambda scoring: scoring.distance_interval(scoring.images.extraction.spatial, "spatial"),
        applies=lambda scoring: scoring.has("spatial"),
    ),
    "psnr": Metric(
        lambda scoring: float(scoring.reconstruction[0].mean()),
        lambda scoring: intervals.mean(scoring.reconstruction[0], greatest=math.inf),
        title="PSNR (dB), mean of the images",
        applies=lambda scoring: scoring.protocol.paired,
    ),
    "ssim": Metric(
        lambda scoring: float(scoring.reconstruction[1].mean()),
        lambda scoring: intervals.mean(scoring.reconstruction[1]),
        title="SSIM, mean of the images",
        applies=lambda scoring: scoring.protocol.paired and min(scoring.images.images.pixels.shape[1:3]) >= WINDOW,
    ),
    "is": Metric(
        lambda scoring: _spread(scoring.inception_scores),
        lambda scoring: intervals.student(scoring.inception_scores, "consecutive splits"),
        applies=lambda scoring: scoring.images.logits is not None and _draws(scoring),
    ),
    "kid": Metric(lambda scoring: _spread(scoring.kernel_distances), _kernel_interval, applies=_draws),
    "precision": Metric(
        lambda scoring: float(scoring.membership[0].mean()),
        lambda scoring: intervals.mean(scoring.membership[0], scoring.images.strata),
        applies=_draws,
    ),
    "recall": Metric(lambda scoring: float(scoring.membership[1].mean()), _recall_interval, applies=_draws),
    "retrieval": Metric(
        lambda scoring: float(scoring.retrieved.mean()),
        lambda scoring: intervals.mean(scoring.retrieved, scoring.images.strata),
        title="caption retrieval R@1",
        applies=lambda scoring: scoring.captioned,
    ),
    "clip": Metric(
        lambda scoring: float(scoring.fits.mean()),
        lambda scoring: intervals.mean(scoring.fits, scoring.images.strata),
        title="CLIP score",
        applies=lambda scoring: scoring.captioned and scoring.texts is not None and scoring.texts.net is not None,
    ),
    "class_agreement": Metric(
        _class_agreement,
        title="class agreement",
        applies=lambda scoring: bool(scoring.images.net_classes) and scoring.images.logits is not None,
    ),
    "nearest_distance": Metric(
        _nearest_distance,
        title="median distance to nearest reference image",
        applies=lambda scoring: scoring.protocol.pixel_distances and _draws(scoring),
    ),
}
"""By key: `FeatureNet.names` calls some of them after the feature extractor; the others' key is their name."""


def score_names(net: FeatureNet, protocol: Protocol, count: int) -> dict[str, str]:
    """What the scores are called; on the published net outside of a comparable protocol its name says so.

    An "r" is in front of distances of reconstructions to their originals.
    """
    suffix = protocol.suffix if protocol.suffix is not None else "" if protocol.comparable else str(count)
    ending = f"-{suffix}" if suffix and not net.score_suffix else ""
    beginning = {"fd": "r", "sfd": "r"} if protocol.paired else {}
    return {key: f"{beginning.get(key, '')}{name}{ending}" for key, name in net.names.items()}


def scores_of(scoring: Scoring) -> dict[str, Any]:
    """Every score of a set of images against the real ones, by name, and their number "n"."""
    found = {scoring.names.get(key, key): metric.compute(scoring) for key, metric in _applicable(scoring)}
    for (name, gaussian), extraction in zip(scoring.target.others.items(), scoring.images.others, strict=True):
        found[name] = gaussian.frechet_distance(Gaussian.fit(extraction.moments["features"]))
    return {**found, "n": len(scoring.images)}


def score_intervals(scoring: Scoring) -> dict[str, Interval]:
    """The 95 % interval of every score that has one, by name; {} where the protocol wants none."""
    if not scoring.protocol.intervals:
        return {}
    found = {
        scoring.names.get(key, key): metric.interval(scoring)
        for key, metric in _applicable(scoring)
        if metric.interval is not None
    }
    for (name, gaussian), extraction in zip(scoring.target.others.items(), scoring.images.others, strict=True):
        distance = gaussian.frechet_distance(Gaussian.fit(extraction.moments["features"]))
        found[name] = intervals.frechet(extraction.features, gaussian, distance, scoring.images.strata)
    return {name: interval for name, interval in found.items() if interval is not None}


def score_titles(scoring: Scoring) -> dict[str, str]:
    """What tables call the scores, by name, where that is not their name."""
    return {scoring.names.get(key, key): metric.title for key, metric in _applicable(scoring) if metric.title}


def _applicable(scoring: Scoring) -> list[tuple[str, Metric]]:
    return [(key, metric) for key, metric in METRICS.items() if metric.applies(scoring)]


def _pixel_distances(images: LabelledImages, real: LabelledImages) -> np.ndarray | None:
    if not isinstance(images.pixels, np.ndarray) or not isinstance(real.pixels, np.ndarray):
        return None
    return nearest_distances(images.pixels, real.pixels)


def compare_with_held_out(
    drawn: Scoring, scores: dict[str, Any], held_out: Scoring | None, own: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Samples beside held-out real images, at an equal number of each, because the Fréchet distance falls with n."""
    if held_out is None or own is None:
        return None
    count = min(len(drawn.images), len(held_out.images))
    of_samples, recall = _distance_and_recall(drawn, scores, count)
    of_held_out, own_recall = _distance_and_recall(held_out, own, count)
    distances = scores.get("nearest_distance"), own.get("nearest_distance")
    return {
        "n": count,
        "fd_samples": of_samples,
        "fd_held_out": of_held_out,
        "fd_ratio_at_equal_n": of_samples / of_held_out if of_held_out > 0 else None,
        "recall_samples": recall,
        "recall_held_out": own_recall,
        "nearest_distance_ratio": distances[0] / distances[1] if distances[0] is not None and distances[1] else None,
    }


def _distance_and_recall(scoring: Scoring, scores: dict[str, Any], count: int) -> tuple[float, float]:
    """Fréchet distance and recall of the first `count` images in the order of the splits."""
    if count == len(scoring.images):
        return scores[scoring.names["fd"]], scores["recall"]
    part = scoring.images.features[:count]
    distance = scoring.target.gaussians["features"].frechet_distance(Gaussian.fit(Moments.of(part)))
    _, covered = manifold_membership(part, scoring.target.real.features, scoring.protocol.neighbourhood)
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
