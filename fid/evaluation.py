"""The evaluation itself: read, check, extract, score, report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fid.cache import extract_cached
from fid.captions import Texts, open_vectors
from fid.checks import (
    check_pair,
    check_reconstructions,
    check_samples,
    check_set,
    is_published_reference,
    notes_on,
)
from fid.distributed import World, connect, local_device
from fid.extraction import Extraction, extract_all
from fid.features import FeatureNet, load_dinov2, load_feature_net, load_inception, resolve_device
from fid.images import (
    LabelledImages,
    Reference,
    read_reference,
    read_samples,
    require_samples,
)
from fid.measured import Measured, Target
from fid.report import PUBLISHED_PROTOCOL, prepare_directory, published_rows, versions, write_report
from fid.scores import (
    Scoring,
    compare_with_held_out,
    nearest_neighbours,
    score_intervals,
    score_names,
    score_titles,
    scores_of,
)
from gspn_dit.errors import UserError
from gspn_dit.protocols import INCEPTION, Protocol, find_protocol

REPORT_FORMAT_VERSION = 2
BATCH_SIZE = 256


@dataclass(frozen=True)
class Settings:
    """How an evaluation is made."""

    protocol: str | None = None
    """A name of `gspn_dit.protocols.PROTOCOLS`; None: the chosen features with the settings of a small study."""
    weights: str | os.PathLike[str] | None = None
    """File of the Inception net, for the protocols that use it; None: torch-fidelity's usual place."""
    allow_unknown_weights: bool = False
    """Take another net than the published one; no score is called FID then."""
    dinov2: str | os.PathLike[str] | None = None
    """Local directory of a DINOv2 model, for FD-DINOv2 as well."""
    clip: str | os.PathLike[str] | None = None
    """Local directory of a CLIP, for the CLIP score and the retrieval of captions; FD is measured on it as well."""
    texts: str | os.PathLike[str] | None = None
    """Captions that `gspn_dit.prepare.encode_text` encoded, for their retrieval by a ridge map; not beside `clip`."""
    held_out: str | os.PathLike[str] | None = None
    """Real images to be scored as if they were samples (the validation split of a set that has one); None: the
    reference's validation split, if any."""
    cache: str | os.PathLike[str] | None = None
    """Directory in which features of real images are kept between evaluations; None: do not."""
    overwrite: bool = False
    """Replace an earlier report."""
    batch_size: int = BATCH_SIZE
    """Images per forward pass."""
    device: str = "cpu"
    """Where the nets run; "cuda" under a launcher is each process's own."""
    also: Sequence[str | os.PathLike[str]] = ()
    """Further feature extractors, on each of which a Fréchet distance is computed in the same pass: as `features`, or
    "inception"."""
    paired: bool = False
    """Without a protocol: sample i is a reconstruction of reference image i, see `Protocol.paired`."""
    seed: int = 0
    """Of the subsets that the kernel distance draws; protocols bring their own."""
    show_progress: bool = False
    """Say what is compared, and show a bar with the time that is left."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch_size}")
        if self.clip is not None and self.texts is not None:
            raise UserError("--clip brings its own vectors of captions; leave --texts out")


def evaluate(
    samples: str | os.PathLike[str],
    reference: str | os.PathLike[str] = "digits",
    features: str | os.PathLike[str] = "digits",
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score generated images against real ones; with `out`, write report.json, report.md, index.html and grid.png.

    Cheap checks come first: the paths, then the feature extractor, the samples' number and size, and the reference.
    Under `accelerate launch` or `torchrun` the processes share the images; the first one alone scores and writes.

    Args:
        samples: a directory of PNGs or an NPZ, see `fid.images.read_samples`.
        reference: real images, see `fid.images.read_reference`.
        features: "digits", a file that `python -m fid.train_features` wrote, or a run of task classification; not used
            with a protocol.
        out: directory of the report, new, empty, or (with `overwrite`) holding an earlier report.
        options: fields of `Settings`.

    Returns:
        The content of report.json: "scores", "held_out", "comparison" and every setting that moved them; {} in the
        other processes of a launch.

    Raises:
        UserError: in one line what was given and what is needed; nothing has been written then.
    """
    settings = Settings(**options)
    if out is not None:
        prepare_directory(out, settings.overwrite)
    protocol = _of_small_study(features, settings.seed, settings.paired)
    if settings.protocol:
        protocol = find_protocol(settings.protocol)
    device = local_device(settings.device)
    resolve_device(device)
    require_samples(samples)
    net = _load_net(protocol, settings)
    others, texts = _load_others(protocol, settings, net)
    drawn = read_samples(samples)
    check_samples(protocol, drawn)
    if texts is not None and drawn.captions is None:
        raise UserError(
            f"the samples ({drawn.source}) have no captions to compare them with; metadata.jsonl beside the PNGs has "
            "them, or leave --clip and --texts out"
        )
    real = _read_real(reference, settings.held_out, net.image_size or drawn.pixels.shape[1])
    if settings.texts is not None and real.images.captions is None:
        raise UserError(
            f"the reference ({real.images.source}) has no captions, which --texts needs to learn what images show; "
            "metadata.jsonl beside its images has them, or leave --texts out"
        )
    if protocol.paired:
        real = dataclasses.replace(real, held_out=None)
    with connect() as world:
        if settings.show_progress and world.is_main:
            _show_sets(drawn, real)
        passes: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "device": device,
            "world": world,
            "cache": settings.cache,
        }
        passes["show_progress"] = settings.show_progress
        report = score(drawn, real, net, protocol=protocol, others=others, texts=texts, **passes)
    if out is not None and report:
        write_report(report, drawn, out, settings.overwrite, net.class_names, real.images)
    return report


def _of_small_study(features: str | os.PathLike[str], seed: int = 0, paired: bool = False) -> Protocol:
    return Protocol("features", str(features), kid_seed=seed, paired=paired)


def _load_further(net: FeatureNet, settings: Settings) -> list[FeatureNet]:
    """Load the further nets, each under a name of its own; raises UserError."""
    found: list[FeatureNet] = []
    for source in settings.also:
        other = load_inception(settings.weights) if str(source) == INCEPTION else load_feature_net(source)
        if not other.score_suffix:  # FID is what a protocol calls it
            other = dataclasses.replace(other, score_suffix="inception")
        found.append(other)
    if settings.dinov2 is not None:
        found.append(load_dinov2(settings.dinov2))
    taken = {net.sha256}
    for place, other in enumerate(found):
        if other.sha256 in taken:
            raise UserError(f"--also {other.source}: the same feature extractor is there already; leave it out")
        names = {each.score_suffix for each in (net, *found[:place])}
        if other.score_suffix in names:
            found[place] = dataclasses.replace(other, score_suffix=f"{other.score_suffix}-{other.sha256[:6]}")
        taken.add(other.sha256)
    return found


def _read_real(reference: str | os.PathLike[str], held_out: str | os.PathLike[str] | None, size: int) -> Reference:
    """Read the reference, with held-out images of its own or from another place."""
    real = read_reference(reference, size)
    if held_out is None:
        return real
    found = read_reference(held_out, size)
    return dataclasses.replace(real, held_out=found.held_out or found.images)


def _show_sets(samples: LabelledImages, reference: Reference) -> None:
    """Print what is compared before the long pass."""
    for what, images in (("samples", samples), ("reference", reference.images), ("held out", reference.held_out)):
        if images is not None:
            print(f"{what:<10}{images.describe()}", flush=True)


def _load_others(protocol: Protocol, settings: Settings, net: FeatureNet) -> tuple[list[FeatureNet], Texts | None]:
    """Return the nets beside the first one, and what encodes captions."""
    others = _load_further(net, settings)
    if settings.texts is not None:
        return others, open_vectors(settings.texts)
    if settings.clip is None and not protocol.clip:
        return others, None
    from fid.clip import PUBLISHED, load_clip

    if settings.clip is None:
        raise UserError(
            f"protocol {protocol.name} needs --clip DIR: {PUBLISHED} of Hugging Face with its tokenizer, in a directory"
        )
    net, texts = load_clip(settings.clip)
    return [*others, net], dataclasses.replace(texts, net=len(others))


def _load_net(protocol: Protocol, settings: Settings) -> FeatureNet:
    if protocol.features == INCEPTION:
        return load_inception(settings.weights, settings.allow_unknown_weights, protocol.resize)
    asked = settings.weights is not None and INCEPTION not in map(str, settings.also)
    if asked or settings.allow_unknown_weights:
        raise UserError(
            f"--weights and --allow-unknown-weights are for the Inception net; protocol {protocol.name} uses "
            f"'{protocol.features}'"
        )
    return load_feature_net(protocol.features)


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
    """`evaluate` on images that have been opened; writes nothing but what the passes' cache keeps.

    Args:
        protocol: default: the settings of a small study, with `seed`.
        others: further nets, on each of which a Fréchet distance is computed in the same pass.
        texts: what encodes captions; samples have some then.
        options: fields of `Passes`.
    """
    protocol = protocol or _of_small_study(net.source, seed)
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
