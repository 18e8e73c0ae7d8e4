"""The evaluation itself: read, check, extract, score, report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from fid.features import FeatureNet, Features, extract, load_feature_net, resolve_device
from fid.images import LabelledImages, Reference, interleave, read_reference, read_samples, require_samples
from fid.metrics import (
    IS_SPLITS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBOURHOOD,
    class_agreement,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from fid.report import prepare_directory, versions, write_report
from gspn_dit.errors import UserError

REPORT_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """A set of images in interleaved order, with its features."""

    images: LabelledImages
    features: Features
    labels: np.ndarray | None
    """Ids in the feature net's classes, or None when the set's classes are not the net's."""

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int) -> Features:
        """The features of the first `count` images."""
        return self.features[np.arange(count)]


def evaluate(
    samples: str | os.PathLike[str],
    reference: str | os.PathLike[str] = "digits",
    features: str | os.PathLike[str] = "digits",
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    batch_size: int = 256,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Score generated images against real ones; with `out`, write report.json, report.md, index.html and grid.png.

    Cheap checks come first: the paths, then the net and the reference, and the samples last.

    Args:
        samples: a directory of PNGs or an NPZ, see `fid.images.read_samples`.
        reference: real images, see `fid.images.read_reference`.
        features: "digits", or a file that `python -m fid.train_features` wrote.
        out: directory of the report, new, empty, or (with `overwrite`) holding an earlier report.
        batch_size: images per forward pass.
        device: where the feature net runs.
        seed: of the subsets that the kernel distance draws.

    Returns:
        The content of report.json: "scores", "held_out", "comparison" and every setting that moved them.

    Raises:
        UserError: in one line what was given and what is needed; nothing has been written then.
    """
    if out is not None:
        prepare_directory(out, overwrite)
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    resolve_device(device)
    require_samples(samples)
    net = load_feature_net(features)
    real = read_reference(reference, net.image_size)
    drawn = read_samples(samples)
    report = score(drawn, real, net, batch_size=batch_size, device=device, seed=seed)
    if out is not None:
        write_report(report, drawn, out, overwrite, net.class_names)
    return report


def score(
    samples: LabelledImages,
    reference: Reference,
    net: FeatureNet,
    *,
    batch_size: int = 256,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """`evaluate` on images in memory; writes nothing."""
    _check_fit(samples, net, "samples", "sample images")
    _check_fit(reference.images, net, "reference", "reference images")
    if reference.held_out is not None:
        _check_fit(reference.held_out, net, "held-out images", None)
    sets = [samples, reference.images, *([reference.held_out] if reference.held_out is not None else [])]
    measured = [_measure(images, net, batch_size, device) for images in sets]
    drawn, real = measured[:2]
    held_out = measured[2] if len(measured) > 2 else None
    notes = _notes(drawn, held_out, net)
    if held_out is not None and len(held_out) < _needed(net):
        held_out = None
    subset = min(KID_SUBSET_SIZE, *(len(part) for part in (drawn, real, held_out) if part is not None))
    scores = _scores(drawn, real, net, subset, seed)
    own = None if held_out is None else _scores(held_out, real, net, subset, seed)
    return {
        "format_version": REPORT_FORMAT_VERSION,
        "names": {"fd": f"FD-{net.score_suffix}", "is": f"IS-{net.score_suffix}", "kid": f"KID-{net.score_suffix}"},
        "scores": scores,
        "held_out": own,
        "comparison": _comparison(drawn, real, held_out, scores, own),
        "settings": {
            "samples": _describe(samples),
            "reference": _describe(reference.images),
            "held_out": None if reference.held_out is None else _describe(reference.held_out),
            "feature_net": {
                "source": net.source,
                "data_set": net.score_suffix,
                "sha256": net.sha256,
                "feature_dim": net.feature_dim,
                "image_size": net.image_size,
                "channels": net.channels,
                "classes": len(net.class_names),
                **net.description,
            },
            "inception_score": {"splits": IS_SPLITS, "order": "interleaved classes, consecutive splits"},
            "precision_recall": {"neighbourhood": NEIGHBOURHOOD},
            "kernel_distance": {"subsets": KID_SUBSETS, "subset_size": subset, "seed": seed},
            "batch_size": batch_size,
            "device": device,
            "versions": versions(),
        },
        "notes": notes,
    }


def _needed(net: FeatureNet) -> int:
    return max(net.feature_dim + 1, IS_SPLITS, NEIGHBOURHOOD + 1)


def _check_fit(images: LabelledImages, net: FeatureNet, what: str, counted: str | None) -> None:
    """Refuse images that the net cannot read, or fewer than the metrics need (`counted` names them)."""
    height, width, channels = images.pixels.shape[1:]
    if (height, width, channels) != (net.image_size, net.image_size, net.channels):
        raise UserError(
            f"the {what} ({images.source}) are {height}x{width} with {channels} channel(s); the feature net "
            f"'{net.source}' reads {net.image_size}x{net.image_size} with {net.channels}"
        )
    needed = _needed(net)
    if counted is not None and len(images) < needed:
        raise UserError(
            f"FD-{net.score_suffix} needs at least {needed} {counted} (its {net.feature_dim} features + 1), "
            f"{len(images)} given ({images.source})"
        )
    if images.labels is not None and images.class_names is None and images.labels.max() >= len(net.class_names):
        raise UserError(
            f"the {what} ({images.source}) have the class id {images.labels.max()}; the feature net "
            f"'{net.source}' knows the ids 0 to {len(net.class_names) - 1}"
        )


def _net_labels(images: LabelledImages, net: FeatureNet) -> np.ndarray | None:
    """Labels as ids of the net's classes, matched by name where the set names its classes."""
    if images.labels is None or images.class_names is None:
        return images.labels
    ids = {name: index for index, name in enumerate(net.class_names)}
    if any(name not in ids for name in images.class_names):
        return None
    return np.array([ids[name] for name in images.class_names], dtype=np.int64)[images.labels]


def _measure(images: LabelledImages, net: FeatureNet, batch_size: int, device: str) -> Measured:
    order = interleave(images.labels, len(images))
    labels = _net_labels(images, net)
    ordered = LabelledImages(
        images.pixels[order],
        images.source,
        None if images.labels is None else images.labels[order],
        images.class_names,
    )
    features = extract(net, ordered.pixels, batch_size, device)
    return Measured(ordered, features, None if labels is None else labels[order])


def _scores(images: Measured, real: Measured, net: FeatureNet, subset: int, seed: int) -> dict[str, Any]:
    features, target = images.features.features, real.features.features
    precision, recall = precision_recall(features, target)
    mean, deviation = inception_score(images.features.logits)
    kid_mean, kid_deviation = kernel_distance(features, target, subset, seed=seed)
    nearest = nearest_distances(images.images.pixels, real.images.pixels)
    return {
        f"FD-{net.score_suffix}": frechet_distance(features, target),
        f"IS-{net.score_suffix}": {"mean": mean, "std": deviation},
        f"KID-{net.score_suffix}": {"mean": kid_mean, "std": kid_deviation},
        "precision": precision,
        "recall": recall,
        "class_agreement": None if images.labels is None else class_agreement(images.features.logits, images.labels),
        "nearest_distance": None if nearest is None else float(np.median(nearest)),
        "n": len(images),
    }


def _comparison(
    drawn: Measured,
    real: Measured,
    held_out: Measured | None,
    scores: dict[str, Any],
    own: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """Samples beside held-out real images, at an equal number of each, because the Fréchet distance falls with n."""
    if held_out is None or own is None:
        return None
    count = min(len(drawn), len(held_out))
    target = real.features.features
    of_samples = frechet_distance(drawn.first(count).features, target)
    of_held_out = frechet_distance(held_out.first(count).features, target)
    recall = precision_recall(drawn.first(count).features, target)[1]
    distances = scores["nearest_distance"], own["nearest_distance"]
    return {
        "n": count,
        "fd_samples": of_samples,
        "fd_held_out": of_held_out,
        "fd_ratio_at_equal_n": of_samples / of_held_out if of_held_out > 0 else None,
        "recall_samples": recall,
        "recall_held_out": precision_recall(held_out.first(count).features, target)[1],
        "nearest_distance_ratio": distances[0] / distances[1] if distances[1] else None,
    }


def _notes(drawn: Measured, held_out: Measured | None, net: FeatureNet) -> list[str]:
    notes = [
        f"Scores named …-{net.score_suffix} come from a small net trained on {net.score_suffix}: "
        "they compare with one another, and with no published FID or Inception score."
    ]
    if drawn.images.labels is None:
        notes.append(
            "The samples have no labels: they were scored in file order, and if that order is by class the "
            "Inception score is too low."
        )
    elif drawn.labels is None:
        notes.append("The samples' class names are not the feature net's: class agreement was not measured.")
    if held_out is None:
        notes.append("The reference has no validation split: there are no scores of real images to compare with.")
    elif len(held_out) < _needed(net):
        notes.append(f"{len(held_out)} held-out images are too few to be scored; {_needed(net)} are needed.")
    return notes


def _describe(images: LabelledImages) -> dict[str, Any]:
    height, width, channels = images.pixels.shape[1:]
    return {
        "source": images.source,
        "n": len(images),
        "height": height,
        "width": width,
        "channels": channels,
        "labelled": images.labels is not None,
        "sha256": images.sha256,
    }
