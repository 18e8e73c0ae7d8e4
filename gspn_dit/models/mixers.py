"""Token mixers, and the registry of those that a DiT can be built of.

A mixer is a module over tokens [B, H, W, C] that says what it costs, made from a width and its options. To add one,
write both here or anywhere else and enter them:

    MIXERS["mine"] = (MyMixer, MyOptions)

Its options are then options of `create_model` and keys of `model.mixer_options` in a config.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.attention import (
    AttentionMixer,
    AttentionOptions,
    HeadOptions,
    LinearAttentionMixer,
    NeighbourhoodMixer,
    NeighbourhoodOptions,
)
from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.mixer import ChannelGate, Mixer, maps_multiply_adds
from gspn_dit.models.scans import ScanMixer, ScanOptions

# -- convolution -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvOptions:
    """`ConvMixer` has none."""


class ConvMixer(Mixer):
    """A depthwise 3×3 convolution between linear maps, and a `ChannelGate` (DiCo, arXiv 2505.11196)."""

    kind = "convolutions"

    def __init__(self, channels: int, options: ConvOptions) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, channels)
        self.local_conv = DepthwiseConv(channels, 3, bias=True)
        self.channel_gate = ChannelGate(channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        local = F.gelu(self.local_conv(self.in_proj(tokens)), approximate="tanh")
        return self.out_proj(self.channel_gate(local))

    def multiply_adds(self, height: int, width: int) -> int:
        return maps_multiply_adds(self, height * width)


# -- the registry ----------------------------------------------------------------------------------------------------


MIXERS: dict[str, tuple[type[Mixer], type[Any]]] = {
    "attention": (AttentionMixer, AttentionOptions),
    "gspn": (ScanMixer, ScanOptions),
    "conv": (ConvMixer, ConvOptions),
    "linear": (LinearAttentionMixer, HeadOptions),
    "neighbourhood": (NeighbourhoodMixer, NeighbourhoodOptions),
}
"""Mixer, made from a width and its options, and the dataclass of the options, by the name that `mixer` gives it."""


def option_names(mixer: str) -> list[str]:
    """Return the names of a mixer's options; raises ValueError for an unknown mixer."""
    if mixer not in MIXERS:
        raise ValueError(
            f"unknown mixer '{mixer}'; allowed are {', '.join(MIXERS)}; your own is known once its module is imported"
        )
    return [field.name for field in dataclasses.fields(MIXERS[mixer][1])]


def read_options(mixer: str, given: Mapping[str, Any]) -> Any:
    """Return a mixer's options, None standing for the default; raises ValueError for one that is not its own."""
    own = option_names(mixer)
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in sorted(set(chosen) - set(own)):
        owner = next((other for other in MIXERS if name in option_names(other)), None)
        if owner is None:
            raise ValueError(f"unknown option '{name}' of mixer {mixer}; allowed are {', '.join(own) or 'none'}")
        *others, last = option_names(owner)
        names = f"{', '.join(others)} and {last} are options" if others else f"{last} is an option"
        left = "them" if others else "it"
        raise ValueError(f"{names} of {MIXERS[owner][0].kind}; give mixer {owner} or leave {left} out")
    _check_types(MIXERS[mixer][1], chosen)
    return MIXERS[mixer][1](**chosen)


def _check_types(options: type[Any], chosen: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that is no number, text or truth value where one is declared."""
    hints = typing.get_type_hints(options)
    for name, value in chosen.items():
        hint = hints[name]
        declared = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = [kind for kind in declared if kind in (bool, int, float, str)]
        kinds = {int, float} if type(value) is int else {type(value)}  # a whole number is a number
        if plain and len(plain) >= len(declared) - 1 and not kinds & set(plain):
            raise ValueError(f"{name} is {value!r}, but must be of type {' or '.join(kind.__name__ for kind in plain)}")


def block_mixers(
    mixer: str,
    depth: int,
    given: Mapping[str, Any],
    attention_every: int | None = None,
    conv_every: int | None = None,
    scan_global_every: int | None = None,
) -> list[tuple[str, Any]]:
    """Return the mixer's name and options of each of `depth` blocks, from the first.

    Args:
        mixer: of `MIXERS`.
        depth: number of blocks.
        given: options by name; of attention as well, where some blocks have it.
        attention_every: every so many blocks one has attention in the mixer's place, the last of them; None: none has.
        conv_every: the same of convolutions; where both would stand, attention does.
        scan_global_every: every so many blocks the scan of one knows no window, the last of them; None: all have it.

    Raises:
        ValueError: as `read_options`, or a value that no block or every block would follow.
    """
    _check_every(
        mixer, depth, attention_every=attention_every, conv_every=conv_every, scan_global_every=scan_global_every
    )
    if scan_global_every is not None and given.get("scan_window") is None:
        raise ValueError("scan_global_every needs the windows of the other blocks; give scan_window or leave it out")
    others: dict[str, tuple[int, Any]] = {}
    if attention_every is not None:
        attention = {name: given[name] for name in option_names("attention") if name in given}
        given = {name: value for name, value in given.items() if name not in attention or name in option_names(mixer)}
        others["attention"] = attention_every, read_options("attention", attention)
    if conv_every is not None:
        others["conv"] = conv_every, ConvOptions()
    own, scans, found = read_options(mixer, given), 0, list[tuple[str, Any]]()
    for number in range(1, depth + 1):
        other = next((name for name, (every, _) in others.items() if number % every == 0), None)
        options = own if other is None else others[other][1]
        if isinstance(options, ScanOptions):
            scans += 1
            options = options.of_scan(scans)
            if scan_global_every is not None and number % scan_global_every == 0:
                options = dataclasses.replace(options, scan_window=None)
        found.append((other or mixer, options))
    return found


def _check_every(mixer: str, depth: int, **every: int | None) -> None:
    """Raise ValueError for a number that no block or every block would follow, or of the mixer that all have."""
    for name, number in every.items():
        if number is not None and not 2 <= number <= depth:
            raise ValueError(f"{name} is {number}, but must be at least 2 and at most the {depth} blocks of the model")
        if number is not None and name == f"{mixer}_every":
            raise ValueError(f"{name} is for other mixers than {mixer}; leave it out")


def unseen_options() -> dict[str, Any]:
    """Return the defaults of all options that weights of the same shapes depend on."""
    return {
        field.name: field.default
        for _, options in MIXERS.values()
        for field in dataclasses.fields(options)
        if field.metadata.get("unseen")
    }
