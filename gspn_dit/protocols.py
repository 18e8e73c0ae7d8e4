"""Named protocols of evaluation, as far as they say how a set is generated; `fid` knows the same names."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from gspn_dit.errors import UserError, nearest


@dataclass(frozen=True)
class Protocol:
    """How the set of a named evaluation is generated; what is None is free."""

    num_samples: int | None = None
    labels: str = "uniform"
    classes: str = "all"
    weights: str = "ema"
    steps: int = 50
    """Unless --steps is given."""
    samplers: tuple[str, ...] = ()
    """The first one that the objective has, unless --sampler is given."""
    image_size: int | None = None
    """What the model must draw."""
    num_classes: int | None = None


FIXED = ("num_samples", "labels", "classes", "weights")
"""What cannot be changed without losing the protocol's name."""

# ADM (arXiv 2105.05233) with DiT's sampler (arXiv 2212.09748): what the GSPN table reports.
ADM_50K = Protocol(50_000, steps=250, samplers=("ddpm",), image_size=256, num_classes=1000)
PROTOCOLS = {
    "adm-50k": ADM_50K,
    "adm-50k-512": dataclasses.replace(ADM_50K, image_size=512),
    "quick": Protocol(steps=50),
    "digits": Protocol(labels="balanced", steps=50),
}


def apply_protocol(options: argparse.Namespace) -> None:
    """Fill in what was not given; raises UserError for what contradicts the protocol."""
    name, protocol = options.protocol, find_protocol(options.protocol)
    for key in FIXED:
        given, fixed = getattr(options, key), getattr(protocol, key)
        if name is not None and None not in (given, fixed) and given != fixed:
            raise UserError(
                f"--{key.replace('_', '-')} {given} contradicts the protocol {name}, which has {fixed}; "
                "leave one of them out"
            )
        setattr(options, key, fixed if given is None else given)
    options.steps = protocol.steps if options.steps is None else options.steps
    if options.num_samples is None:
        full = ", ".join(key for key, known in PROTOCOLS.items() if known.num_samples)
        raise UserError(f"how many images? give --num-samples N, or a --protocol that says it: {full}")


def find_protocol(name: str | None) -> Protocol:
    """Return the protocol of that name, or one that leaves everything free; raises UserError for an unknown name."""
    if name is None:
        return Protocol()
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol '{name}'; allowed are {', '.join(PROTOCOLS)}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def check_model(name: str | None, image_size: int, num_classes: int) -> None:
    """Raise UserError if the model cannot draw what the protocol scores."""
    protocol = find_protocol(name)
    for what, wanted, found in (
        ("images of {} pixels", protocol.image_size, image_size),
        ("{} classes", protocol.num_classes, num_classes),
    ):
        if wanted not in (None, found):
            raise UserError(
                f"the protocol {name} is for {what.format(wanted)}, this model has {what.format(found)}; "
                "--protocol quick takes any"
            )
