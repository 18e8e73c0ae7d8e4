"""Two sets of images that have been opened, compared: the passes over them, every score, and what a report holds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fid.cache import extract_cached
from fid.captions import Texts
from fid.checks import check_pair, check_reconstructions, check_set, is_published_reference, notes_on
from fid.distributed import World
from fid.extraction import Extraction, extract_all
from fid.features import FeatureNet
from fid.labelled import LabelledImages, Reference
from fid.measured import Measured, Target
from fid.report import PUBLISHED_PROTOCOL, published_rows, versions
from fid.scores import (
    Scoring,
    compare_with_held_out,
    nearest_neighbours,
    score_intervals,
    score_names,
    score_titles,
    scores_of,
)
from gspn_dit.protocols import Protocol

REPORT_FORMAT_VERSION = 2
BATCH_SIZE = 256


def small_study(features: str | os.PathLike[str], seed: int = 0, paired: bool = False) -> Protocol:
    """Return the protocol of an evaluation without one: these features, with the settings of a small study."""
    return Protocol("features", str(features), kid_seed=seed, paired=paired)


@dataclass(frozen=True)
class Passes:
    """How the passes over the images are made."""

    batch_size: int = BATCH_SIZE
    device: str = "cpu"
    world: World = field(default_factory=World)
    """This process among those that share the images."""
    cache: str | os.PathLike[str] | None = None
    """Where features of real images are kept."""
    show_progress: bool = False

    def options(self, title: str) -> dict[str, Any]:
        """The arguments of `extract_all` that say so."""
        named = {key: getattr(self, key) for key in ("batch_size", "device", "world", "show_progress")}
        return {**named, "title": title}


Extracted = tuple[list[Extraction], str]


def score(
    samples: LabelledImages,
    reference: Reference,
    net: FeatureNet,
    *,
    protocol: Protocol | None = None,
    others: Sequence[FeatureNet] = (),
    texts: Texts | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """`fid.evaluate` on images that have been opened; writes nothing but what the passes' cache keeps.

    Args:
        protocol: default: the settings of a small study, with `seed`.
        others: further nets, on each of which a Fréchet distance is computed in the same pass.
        texts: what encodes captions; samples have some then.
        options: fields of `Passes`.
    """
    protocol = protocol or small_study(net.source, seed)
    passes = Passes(**options)
    held_out = reference.held_out
    check_set(samples, net, protocol, "samples", "sample images", others)
    check_set(reference.images, net, protocol, "reference", "reference images", others)
    check_pair(samples, reference.images)
    if protocol.paired:
        check_reconstructions(samples, reference.images)
    if held_out is not None:
        check_set(held_out, net, protocol, "held-out images", None)
    nets, cache = [net, *others], None if passes.cache is None else Path(passes.cache)
    # the reference first: what is wrong with it shows before the samples' long pass
    found = extract_cached(reference.images, nets, cache, **passes.options("reference"))
    sets = {"reference": (reference.images, found)}
    if held_out is not None:
        sets["held_out"] = (held_out, extract_cached(held_out, nets, cache, **passes.options("held-out images")))
    found = extract_all(samples, nets, keep_spatial=protocol.intervals, **passes.options("samples"))
    sets["samples"] = (samples, found)
    if not passes.world.is_main:
        return {}
    measured = {name: _measured(images, found, net, protocol) for name, (images, found) in sets.items()}
    return _report(measured, reference, net, others, protocol, passes, texts)


def _measured(images: LabelledImages, found: Extracted, net: FeatureNet, protocol: Protocol) -> Measured:
    (first, *rest), sha256 = found
    return Measured(images, first, tuple(rest), sha256, net.class_names, protocol.order)


def _report(
    measured: dict[str, Measured],
    reference: Reference,
    net: FeatureNet,
    others: Sequence[FeatureNet],
    protocol: Protocol,
    passes: Passes,
    texts: Texts | None,
) -> dict[str, Any]:
    drawn, real, held_out = measured["samples"], measured["reference"], measured.get("held_out")
    notes = notes_on(drawn, held_out, reference, net, protocol)
    if held_out is not None and len(held_out) < protocol.needed(net.feature_dim):
        held_out = None
    subset = min(protocol.kid_subset_size, *(len(part) for part in (drawn, real, held_out) if part is not None))
    names = score_names(net, protocol, len(drawn))
    target = Target.build(real, reference.statistics if not net.score_suffix else {}, net, others)
    of_samples, of_held_out = (
        None if part is None else Scoring(part, target, names, protocol, subset, passes.device, texts)
        for part in (drawn, held_out)
    )
    assert of_samples is not None
    scores, own = scores_of(of_samples), None if of_held_out is None else scores_of(of_held_out)
    comparison = compare_with_held_out(of_samples, scores, of_held_out, own)
    if own is not None and not net.class_names and len(drawn) != own["n"]:
        own.update({names[key]: None for key in ("fd", "sfd") if names[key] in own})
    published = is_published_reference(protocol, reference.images.source, "features" in reference.statistics)
    comparable = protocol.comparable and published and not net.score_suffix
    stated = drawn.images.generation or {}
    rows = published_rows(stated.get("guidance_scale")) if protocol.name == PUBLISHED_PROTOCOL and comparable else []
    return {
        "format_version": REPORT_FORMAT_VERSION,
        "protocol": protocol.name,
        "comparable": comparable,
        "names": names,
        "titles": score_titles(of_samples),
        "scores": scores,
        "intervals": score_intervals(of_samples),
        "held_out": own,
        "comparison": comparison,
        "published": [dataclasses.asdict(row) for row in rows],
        "neighbours": nearest_neighbours(drawn, target),
        "settings": {
            **_described(measured, net, others, protocol, target),
            "kernel_distance": {"subsets": protocol.kid_subsets, "subset_size": subset, "seed": protocol.kid_seed},
            "batch_size": passes.batch_size,
            "device": passes.device,
            "processes": passes.world.size,
            "captions": None if texts is None else texts.source,
            "tf32": False,
            "versions": versions(),
        },
        "notes": notes,
    }


def _described(
    measured: dict[str, Measured], net: FeatureNet, others: Sequence[FeatureNet], protocol: Protocol, target: Target
) -> dict[str, Any]:
    """What was scored, by which nets, under which protocol."""
    drawn, held_out = measured["samples"], measured.get("held_out")
    return {
        "protocol": protocol.knobs(),
        "generation": drawn.images.generation,
        "samples": _describe(drawn),
        "reference": {**_describe(measured["reference"]), "statistics": target.statistics_sha256},
        "held_out": None if held_out is None else _describe(held_out),
        "feature_net": _describe_net(net),
        "other_nets": {other.names["fd"]: _describe_net(other) for other in others},
        "inception_score": {"splits": protocol.inception_splits, "order": drawn.order_name},
        "precision_recall": {"neighbourhood": protocol.neighbourhood},
    }


def _describe(measured: Measured) -> dict[str, Any]:
    height, width, channels = measured.images.pixels.shape[1:]
    return {
        "source": measured.images.source,
        "n": len(measured),
        "height": height,
        "width": width,
        "channels": channels,
        "labelled": measured.images.labels is not None,
        "sha256": measured.sha256,
    }


def _describe_net(net: FeatureNet) -> dict[str, Any]:
    return {
        "source": net.source,
        "data_set": net.score_suffix or "ImageNet",
        "sha256": net.sha256,
        "feature_dim": net.feature_dim,
        "image_size": net.image_size,
        "channels": net.channels,
        "classes": len(net.class_names),
        **net.description,
    }
