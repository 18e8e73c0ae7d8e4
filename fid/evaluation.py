"""The evaluation itself: find, open and check what is asked for, have it compared, and write the report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fid.captions import Texts, open_vectors
from fid.checks import check_samples
from fid.distributed import connect, local_device
from fid.features import FeatureNet, load_dinov2, load_feature_net, load_inception, resolve_device
from fid.images import read_reference, read_samples, require_samples
from fid.labelled import LabelledImages, Reference
from fid.opened import BATCH_SIZE, score, small_study
from fid.report import prepare_directory, write_report
from gspn_dit.errors import UserError
from gspn_dit.protocols import INCEPTION, Protocol, find_protocol


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
    protocol = small_study(features, settings.seed, settings.paired)
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
