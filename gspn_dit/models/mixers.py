"""Token mixers, and the registry of those that a DiT can be built of.

A mixer is a module over tokens [B, H, W, C] that says what it costs, made from a width and its options. To add one,
write both here or anywhere else and enter them:

    MIXERS["mine"] = (MyMixer, MyOptions)

Its options are then options of `create_model` and keys of `model.mixer_options` in a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
from gspn_dit.models.flops import scan_multiply_adds
from gspn_dit.models.mixer import UNSEEN, Mixer, maps_multiply_adds
from gspn_dit.ops import DIRECTIONS, gspn_scan_from_proxy
from gspn_dit.ops.contract import direction_codes

PROXY_RATIO = 16

# -- scans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanOptions:
    """Of the scans in `ScanMixer` and in the published GSPN block."""

    proxy_channels: int | None = None
    """Width of the proxy; None for the channels by `proxy_ratio`, rounded down."""
    proxy_ratio: int = PROXY_RATIO
    scan_skip: bool = False
    """Add (a linear map of the proxy) ⊙ tokens to the merged scan."""
    scan_directions: Sequence[str] = dataclasses.field(default=DIRECTIONS, metadata=UNSEEN)
    weight_groups: int | None = None
    """Groups of channels that share propagation weights (GSPN-2); None for one per channel."""
    scan_window: int | None = None
    """Lines after which the scan restarts; None for global propagation."""

    def create(self, channels: int) -> GSPNMixer:
        """Return the scan of so many channels; raises ValueError for an option out of range."""
        return GSPNMixer(
            channels,
            self.weight_groups,
            self.scan_window,
            self.scan_directions,
            proxy_channels=self.proxy_channels,
            proxy_ratio=self.proxy_ratio,
            skip=self.scan_skip,
        )


class GSPNMixer(Mixer):
    """Propagates tokens in each direction; weight logits and gates come from a narrow proxy of the tokens.

    Args:
        channels: width C.
        weight_groups: groups of channels that share propagation weights; None for one per channel.
        window: lines after which the scan restarts; None for global propagation.
        directions: of `DIRECTIONS`.
        proxy_channels: width of the proxy; None for channels // proxy_ratio.
        proxy_ratio: see `proxy_channels`.
        skip: add (a linear map of the proxy) ⊙ tokens to the result.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        channels: int,
        weight_groups: int | None = None,
        window: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
        *,
        proxy_channels: int | None = None,
        proxy_ratio: int = PROXY_RATIO,
        skip: bool = False,
    ) -> None:
        super().__init__()
        count = len(direction_codes(directions))
        groups = channels if weight_groups is None else weight_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"weight_groups {groups} does not divide the {channels} channels")
        if proxy_ratio < 1:
            raise ValueError(f"proxy_ratio is {proxy_ratio}, but must be at least 1")
        if proxy_channels is None:
            if proxy_ratio > channels:
                raise ValueError(f"hidden_size {channels} is below the {proxy_ratio} channels that the proxy needs")
            proxy_channels = channels // proxy_ratio
        if proxy_channels < 1:
            raise ValueError(f"proxy_channels is {proxy_channels}, but must be at least 1")
        self.window, self.directions = window, tuple(directions)
        self.to_proxy = nn.Linear(channels, proxy_channels, bias=False)
        self.to_logits = nn.Linear(proxy_channels, count * 3 * groups, bias=False)
        self.to_input_gate = nn.Linear(proxy_channels, count * channels, bias=False)
        self.to_output_gate = nn.Linear(proxy_channels, count * channels, bias=False)
        self.to_skip = nn.Linear(proxy_channels, channels, bias=False) if skip else None
        self.merge_weight = nn.Parameter(torch.ones(count))

    def initialise(self) -> None:
        """Draw gates that keep the tokens' scale: with deviation σ, a sum of u·λ·x over D directions has D·σ⁴ of x's.

        Smaller gates, such as those of Xavier's rule for maps that widen, start a mixer nearly shut and learn slower.
        """
        for gate in (self.to_input_gate, self.to_output_gate):
            nn.init.normal_(gate.weight, std=len(self.directions) ** -0.25 / gate.in_features**0.5)
        if self.to_skip is not None:
            nn.init.normal_(self.to_skip.weight, std=self.to_skip.in_features**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        return gspn_scan_from_proxy(
            tokens,
            self.to_proxy(tokens),
            self.to_logits.weight,
            self.to_input_gate.weight,
            self.to_output_gate.weight,
            self.merge_weight,
            None if self.to_skip is None else self.to_skip.weight,
            directions=self.directions,
            window=self.window,
        )

    def scan_multiply_adds(self, height: int, width: int) -> int:
        """Return the scan's share of `multiply_adds`."""
        return scan_multiply_adds(height * width, self.to_proxy.in_features, len(self.directions))

    def multiply_adds(self, height: int, width: int) -> int:
        tokens = height * width
        skip = 0 if self.to_skip is None else tokens * self.to_skip.out_features
        return maps_multiply_adds(self, tokens) + self.scan_multiply_adds(height, width) + skip

    def working_elements(self, height: int, width: int) -> int:
        maps = (self.to_logits, self.to_input_gate, self.to_output_gate)
        return 2 * height * width * sum(part.out_features for part in maps)  # with their gradients


class ScanMixer(Mixer):
    """What stands in for attention: a linear map, the scan in each direction, a linear map."""

    kind = "scans"

    def __init__(self, channels: int, options: ScanOptions) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, channels)
        self.scan = options.create(channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        return self.out_proj(self.scan(self.in_proj(tokens)))

    def multiply_adds(self, height: int, width: int) -> int:
        return maps_multiply_adds(self, height * width) + self.scan.multiply_adds(height, width)


# -- convolution -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvOptions:
    """`ConvMixer` has none."""


class ConvMixer(Mixer):
    """A depthwise 3×3 convolution between linear maps, and compact channel attention (DiCo, arXiv 2505.11196): each
    channel is scaled by the sigmoid of a linear map of the channels' means over the image.
    """

    kind = "convolutions"

    def __init__(self, channels: int, options: ConvOptions) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, channels)
        self.local_conv = DepthwiseConv(channels, 3, bias=True)
        self.channel_gate = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        local = F.gelu(self.local_conv(self.in_proj(tokens)), approximate="tanh")
        gate = torch.sigmoid(self.channel_gate(local.mean((1, 2), keepdim=True)))  # [B, 1, 1, C]
        return self.out_proj(local * gate)

    def multiply_adds(self, height: int, width: int) -> int:
        once = self.channel_gate.weight.numel()  # on the image's means, not on every token
        return maps_multiply_adds(self, height * width) - (height * width - 1) * once


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
            f"unknown mixer '{mixer}'; allowed are {', '.join(MIXERS)}, and what an imported module enters"
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
    return MIXERS[mixer][1](**chosen)


def unseen_options() -> dict[str, Any]:
    """Return the defaults of all options that weights of the same shapes depend on."""
    return {
        field.name: field.default
        for _, options in MIXERS.values()
        for field in dataclasses.fields(options)
        if field.metadata.get("unseen")
    }
