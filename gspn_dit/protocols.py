"""Named protocols: every knob that moves a score, under one name, so that two figures can be told to compare.

`adm-50k` is that of ADM (arXiv 2105.05233) with DiT's sampler (2212.09748): the one the published tables follow.
A protocol has two halves: how a set is generated, and how it is scored.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from gspn_dit.errors import UserError, nearest

INCEPTION = "inception"


@dataclass(frozen=True)
class Generation:
    """How the set of a named evaluation is generated; what is None is free."""

    labels: str = "uniform"
    classes: str = "all"
    weights: str = "ema"
    steps: int = 50
    """Unless --steps is given."""
    samplers: tuple[str, ...] = ()
    """The first one that the objective has, unless --sampler is given."""


@dataclass(frozen=True)
class Protocol:
    """How a set of samples is scored. Two reports compare when all of this, net, reference and count are the same."""

    name: str
    features: str
    """"inception", or the feature extractor's name or file."""
    num_samples: int | None = None
    """How many samples there must be, no more and no fewer; None: any number that the metrics allow."""
    image_size: int | None = None
    """Height and width that the samples must have; None: what the feature extractor reads."""
    num_classes: int | None = None
    reference_file: str | None = None
    """The reference that the published figures were measured against."""
    resize: str = "tensorflow"
    """How images become Inception's 299 pixels: "tensorflow", bilinear as in the published net, or "clean", bicubic
    with antialiasing as in clean-fid (arXiv 2104.11222)."""
    clip: bool = False
    """Whether samples have captions, and CLIP is asked how well they fit."""
    required: tuple[tuple[str, str], ...] = ()
    """What a sample set's `generation.json` must say where it says anything: (key, value) pairs."""
    order: str = "interleaved"
    """Of the samples in the Inception score's splits: "stored", or "interleaved" by class."""
    inception_splits: int = 10
    neighbourhood: int = 3
    """k of precision and recall."""
    kid_subsets: int = 50
    kid_subset_size: int = 300
    """Images of one estimate of the kernel distance, fewer where a set has fewer."""
    kid_seed: int = 0
    full_rank: bool = True
    """Whether fewer samples than feature dimensions + 1 are refused: a Fréchet distance of fewer is mostly bias."""
    comparable: bool = False
    """Whether the scores may stand beside published ones."""
    suffix: str | None = None
    """What names of scores on the published Inception end in; None: nothing where they compare, else the number."""
    paired: bool = False
    """Whether sample i is a reconstruction of reference image i: rFID, PSNR and SSIM are measured then, and no more."""
    intervals: bool = True
    pixel_distances: bool = True
    """Whether the nearest reference image is also searched pixel by pixel."""
    generation: Generation = Generation()

    def needed(self, feature_dim: int) -> int:
        """The fewest images that every metric of the protocol can be computed on."""
        fewest = max(self.inception_splits, self.neighbourhood + 1, 2)
        return max(feature_dim + 1, fewest) if self.full_rank else fewest

    def knobs(self) -> dict[str, Any]:
        """Every setting of the scoring, for the report; the samples say themselves how they were generated."""
        settings = {**dataclasses.asdict(self), "required": dict(self.required)}
        del settings["generation"]
        return settings


ADM_50K = Protocol(
    name="adm-50k",
    features=INCEPTION,
    num_samples=50_000,
    image_size=256,
    num_classes=1000,
    reference_file="VIRTUAL_imagenet256_labeled.npz",
    required=(("weights", "ema"), ("labels", "uniform"), ("uint8", "truncate")),
    order="stored",
    kid_subsets=100,
    kid_subset_size=1000,
    kid_seed=2020,
    comparable=True,
    pixel_distances=False,
    generation=Generation(steps=250, samplers=("ddpm",)),
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ADM_50K,
        dataclasses.replace(ADM_50K, name="adm-50k-512", image_size=512, reference_file="VIRTUAL_imagenet512.npz"),
        dataclasses.replace(
            ADM_50K,
            name="balanced-50k",
            required=(("weights", "ema"), ("labels", "balanced"), ("uint8", "truncate")),
            order="interleaved",
            comparable=False,
            suffix="balanced",
            generation=dataclasses.replace(ADM_50K.generation, labels="balanced"),
        ),
        Protocol(name="reconstruction", features=INCEPTION, full_rank=False, pixel_distances=False, paired=True),
        Protocol(
            name="quick",
            features=INCEPTION,
            order="interleaved",
            kid_subsets=100,
            kid_subset_size=1000,
            kid_seed=2020,
            full_rank=False,
            intervals=False,
            pixel_distances=False,
        ),
        Protocol(
            name="coco-30k",
            features=INCEPTION,
            num_samples=30_000,
            resize="clean",
            clip=True,
            required=(("guidance_scale", "7.5"), ("steps", "25")),
            kid_subsets=100,
            kid_subset_size=1000,
            kid_seed=2020,
            intervals=False,
            pixel_distances=False,
            generation=Generation(steps=25),
        ),
        Protocol(name="digits", features="digits", generation=Generation(labels="balanced")),
    )
}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of that name; raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol '{name}'; allowed are {', '.join(PROTOCOLS)}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def apply_protocol(options: argparse.Namespace) -> None:
    """Fill in what was not given to generation; raises UserError for what contradicts the protocol."""
    name = options.protocol
    protocol = None if name is None else find_protocol(name)
    if protocol is not None and protocol.paired:
        raise UserError(
            f"the protocol {name} scores reconstructions, which python -m gspn_dit.prepare.reconstruct makes; "
            "leave --protocol out"
        )
    generation = Generation() if protocol is None else protocol.generation
    fixed = {"num_samples": protocol and protocol.num_samples}
    fixed |= {key: getattr(generation, key) for key in ("labels", "classes", "weights")}
    for key, value in fixed.items():
        given = getattr(options, key)
        if name is not None and None not in (given, value) and given != value:
            raise UserError(
                f"--{key.replace('_', '-')} {given} contradicts the protocol {name}, which has {value}; "
                "leave one of them out"
            )
        setattr(options, key, value if given is None else given)
    options.steps = generation.steps if options.steps is None else options.steps
    if options.num_samples is None:
        full = ", ".join(key for key, known in PROTOCOLS.items() if known.num_samples)
        raise UserError(f"how many images? give --num-samples N, or a --protocol that says it: {full}")


def preferred_samplers(name: str | None) -> tuple[str, ...]:
    """Return the samplers that a protocol asks for, first choice first; none without a protocol."""
    return () if name is None else find_protocol(name).generation.samplers


def check_model(name: str | None, image_size: int, num_classes: int) -> None:
    """Raise UserError if the model cannot draw what the protocol scores."""
    if name is None:
        return
    protocol = find_protocol(name)
    if protocol.clip:
        raise UserError(f"the protocol {name} is for images of captions: draw them with sample.py --prompts FILE")
    for what, wanted, found in (
        ("images of {} pixels", protocol.image_size, image_size),
        ("{} classes", protocol.num_classes, num_classes),
    ):
        if wanted not in (None, found):
            raise UserError(
                f"the protocol {name} is for {what.format(wanted)}, this model has {what.format(found)}; "
                "--protocol quick takes any"
            )
