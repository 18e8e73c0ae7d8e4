"""Named protocols: every knob that moves a score, under one name, so that two figures can be told to compare.

`adm-50k` is that of ADM (arXiv 2105.05233) and DiT (2212.09748): the one the published tables follow.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import UserError, nearest

if TYPE_CHECKING:
    from fid.images import LabelledImages

INCEPTION = "inception"
UINT8 = "clamp(127.5 x + 128, 0, 255), truncated"


@dataclass(frozen=True)
class Protocol:
    """How a set of samples is scored. Two reports compare when all of this, net, reference and count are the same."""

    name: str
    features: str
    """"inception", or the feature net's name or file."""
    num_samples: int | None = None
    """How many samples there must be, no more and no fewer; None: any number that the metrics allow."""
    image_size: int | None = None
    """Height and width that the samples must have; None: what the net reads."""
    num_classes: int | None = None
    reference_file: str | None = None
    """The reference that the published figures were measured against."""
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
    intervals: bool = True
    pixel_distances: bool = True
    """Whether the nearest reference image is also searched pixel by pixel."""

    def needed(self, feature_dim: int) -> int:
        """The fewest images that every metric of the protocol can be computed on."""
        fewest = max(self.inception_splits, self.neighbourhood + 1, 2)
        return max(feature_dim + 1, fewest) if self.full_rank else fewest

    def knobs(self) -> dict[str, Any]:
        """Every setting, for the report."""
        return {**dataclasses.asdict(self), "required": dict(self.required)}


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
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ADM_50K,
        dataclasses.replace(ADM_50K, name="adm-50k-512", image_size=512, reference_file="VIRTUAL_imagenet512.npz"),
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
        Protocol(name="digits", features="digits"),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name."""
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise UserError(f"no protocol '{name}'; allowed are {known}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def check_samples(protocol: Protocol, samples: LabelledImages) -> None:
    """Refuse samples that the protocol's name would misdescribe; cheap, before anything is computed."""
    height, width, channels = samples.pixels.shape[1:]
    if protocol.num_samples is not None and len(samples) != protocol.num_samples:
        raise UserError(
            f"protocol {protocol.name} needs {protocol.num_samples:,} samples, {samples.source} has {len(samples):,}; "
            "--protocol quick scores any number, under other names"
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
    for key, value in protocol.required:
        if key in stated and not str(stated[key]).startswith(value):
            raise UserError(
                f"protocol {protocol.name} needs samples with {key} '{value}'; those at {samples.source} were "
                f"generated with '{stated[key]}'"
            )


def is_published_reference(protocol: Protocol, source: str, statistics: bool) -> bool:
    """Whether a reference is, by its name and content, the one of the published figures."""
    return statistics and protocol.reference_file is not None and Path(source).name == protocol.reference_file
