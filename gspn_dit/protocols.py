"""Named protocols of evaluation, as far as they say how a set is generated; `fid` knows the same names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from gspn_dit.errors import UserError, nearest


@dataclass(frozen=True)
class Protocol:
    """How the set of a named evaluation is generated. The first four cannot be changed without losing the name."""

    num_samples: int | None
    labels: str
    classes: str
    weights: str
    steps: int
    """Unless --steps is given."""
    samplers: tuple[str, ...]
    """The first one that the objective has, unless --sampler is given."""


FIXED = ("num_samples", "labels", "classes", "weights")
PROTOCOLS = {
    # ADM (arXiv 2105.05233) with DiT's sampler (arXiv 2212.09748): what the GSPN table reports.
    "adm-50k": Protocol(50_000, "uniform", "all", "ema", steps=250, samplers=("ddpm",)),
}
WITHOUT_PROTOCOL = Protocol(None, "uniform", "all", "ema", steps=50, samplers=())


def apply_protocol(options: argparse.Namespace) -> None:
    """Fill in what was not given; raises UserError for what contradicts the protocol."""
    protocol = WITHOUT_PROTOCOL
    if options.protocol is not None:
        if options.protocol not in PROTOCOLS:
            raise UserError(
                f"unknown protocol '{options.protocol}'; allowed are {', '.join(PROTOCOLS)}"
                f"{nearest(options.protocol, PROTOCOLS)}"
            )
        protocol = PROTOCOLS[options.protocol]
    for name in FIXED:
        given, fixed = getattr(options, name), getattr(protocol, name)
        if options.protocol is not None and given not in (None, fixed):
            raise UserError(
                f"--{name.replace('_', '-')} {given} contradicts the protocol {options.protocol}, which has {fixed}; "
                "leave one of them out"
            )
        setattr(options, name, fixed if given is None else given)
    options.preferred_samplers = protocol.samplers
    options.steps = protocol.steps if options.steps is None else options.steps
    if options.num_samples is None:
        raise UserError("how many images? give --num-samples N, or --protocol NAME")
