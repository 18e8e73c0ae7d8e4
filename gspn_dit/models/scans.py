"""The scan as a token mixer: from a narrow proxy of the tokens, with its norms, skips and width."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gspn_dit.models.flops import scan_multiply_adds
from gspn_dit.models.mixer import UNSEEN, ChannelGate, Mixer, maps_multiply_adds
from gspn_dit.ops import DIRECTIONS, gspn_scan_from_proxy
from gspn_dit.ops.contract import direction_codes

PROXY_RATIO = 16
NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
NORM_PLACES = ("before", "after", "directions")
OPPOSITES = {"right": "left", "left": "right", "down": "up", "up": "down"}


@dataclass(frozen=True)
class ScanOptions:
    """Of the scans in `ScanMixer` and in the published GSPN block; the defaults are what is published."""

    proxy_channels: int | None = None
    """Width of the proxy; None for the channels by `proxy_ratio`, rounded down."""
    proxy_ratio: int = PROXY_RATIO
    scan_skip: bool = False
    """Add (a linear map of the proxy) ⊙ tokens to the merged scan."""
    scan_directions: Sequence[str] = dataclasses.field(default=DIRECTIONS, metadata=UNSEEN)
    scan_alternate: bool = dataclasses.field(default=False, metadata=UNSEEN)
    """Every other scan of a model goes in the opposite directions: with two, as right and down, each token reaches all
    others within two blocks, for half of the cost of four."""
    weight_groups: int | None = None
    """Groups of channels that share propagation weights (GSPN-2); None for one per channel."""
    scan_window: int | None = None
    """Lines after which the scan restarts; None for global propagation."""
    scan_expansion: float = 1.0
    """Channels of the scan over those of the model, rounded down: a narrow latent scan (GSPN-2) or a wide one."""
    scan_norm: str | None = None
    """A norm with learned scale at the scan, "layer" or "rms"; None for none."""
    scan_norm_place: str = dataclasses.field(default="after", metadata=UNSEEN)
    """Of its input ("before"), its result ("after"), or each direction's result before they merge ("directions")."""
    channel_gate: bool = False
    """Scale the channels of the result by a `ChannelGate`, as `ConvMixer` does."""
    channel_skip: bool = False
    """Add d ⊙ tokens to the scan, behind its norm: one d for each channel, 1 at the start."""
    gate_scale: float = 1.0
    """By which the first weights of the gates are multiplied; see `GSPNMixer.initialise`."""

    def of_scan(self, number: int) -> ScanOptions:
        """Return those of a model's scan, numbered from 1; raises ValueError for directions that have no opposites."""
        if not self.scan_alternate:
            return self
        direction_codes(self.scan_directions)
        opposite = tuple(OPPOSITES[direction] for direction in self.scan_directions)
        if set(opposite) == set(self.scan_directions):
            directions = ", ".join(self.scan_directions)
            raise ValueError(f"scan_alternate changes nothing for scan_directions {directions}; give right and down")
        return self if number % 2 else dataclasses.replace(self, scan_directions=opposite)

    def width(self, channels: int) -> int:
        """Return the channels of the scan in a model of so many; raises ValueError for none."""
        width = int(self.scan_expansion * channels)
        if width < 1:
            raise ValueError(f"scan_expansion {self.scan_expansion} leaves none of the {channels} channels")
        return width

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
            norm=self.scan_norm,
            norm_place=self.scan_norm_place,
            channel_skip=self.channel_skip,
            channel_gate=self.channel_gate,
            gate_scale=self.gate_scale,
        )


class GSPNMixer(Mixer):
    """Propagates tokens in each direction; weight logits and gates come from a narrow proxy of the tokens.

    The weights of a propagation sum to 1, so that its state grows with the number of lines; a norm after the scan keeps
    the result of one scale on any grid.

    Args:
        channels: width C.
        weight_groups: groups of channels that share propagation weights; None for one per channel.
        window: lines after which the scan restarts; None for global propagation.
        directions: of `DIRECTIONS`.
        proxy_channels: width of the proxy; None for channels // proxy_ratio.
        proxy_ratio: see `proxy_channels`.
        skip: add (a linear map of the proxy) ⊙ tokens to the result; it passes a norm after the scan, too.
        norm, norm_place, channel_skip, channel_gate, gate_scale: see `ScanOptions`.

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
        norm: str | None = None,
        norm_place: str = "after",
        channel_skip: bool = False,
        channel_gate: bool = False,
        gate_scale: float = 1.0,
    ) -> None:
        super().__init__()
        count = len(direction_codes(directions))
        groups = channels if weight_groups is None else weight_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"weight_groups {groups} does not divide the {channels} channels")
        _check_norm(norm, norm_place)
        if gate_scale <= 0:
            raise ValueError(f"gate_scale is {gate_scale}, but must be above 0")
        proxy = _proxy_width(channels, proxy_channels, proxy_ratio)
        self.channels, self.window, self.directions, self.gate_scale = channels, window, tuple(directions), gate_scale
        self.to_proxy = nn.Linear(channels, proxy, bias=False)
        self.to_logits = nn.Linear(proxy, count * 3 * groups, bias=False)
        self.to_input_gate = nn.Linear(proxy, count * channels, bias=False)
        self.to_output_gate = nn.Linear(proxy, count * channels, bias=False)
        self.to_skip = nn.Linear(proxy, channels, bias=False) if skip else None
        self.merge_weight = nn.Parameter(torch.ones(count))
        norms = 0 if norm is None else count if norm_place == "directions" else 1
        self.norm_place = None if norm is None else norm_place
        self.norms = nn.ModuleList(NORMS[norm or "layer"](channels, eps=1e-6) for _ in range(norms))
        self.channel_skip = nn.Parameter(torch.ones(channels)) if channel_skip else None
        self.channel_gate = ChannelGate(channels) if channel_gate else None

    def initialise(self) -> None:
        """Draw gates that keep the tokens' scale: with deviation σ, a sum of u·λ·x over D directions has D·σ⁴ of x's.

        Smaller gates, such as those of Xavier's rule for maps that widen, start a mixer nearly shut and learn slower.
        """
        for gate in (self.to_input_gate, self.to_output_gate):
            deviation = self.gate_scale * len(self.directions) ** -0.25 / gate.in_features**0.5
            nn.init.normal_(gate.weight, std=deviation)
        if self.to_skip is not None:
            nn.init.normal_(self.to_skip.weight, std=self.to_skip.in_features**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        if self.norm_place == "before":
            tokens = self.norms[0](tokens)
        mixed = scanned = self._scan_apart(tokens) if self.norm_place == "directions" else self._scan(tokens)
        if self.norm_place == "after":
            mixed = self.norms[0](mixed)
        if self.channel_skip is not None:
            mixed = mixed + self.channel_skip * tokens
        if self.channel_gate is not None:
            mixed = self.channel_gate(mixed)
        return mixed.to(scanned.dtype)  # autocast's, which norms and parameters need not have

    def _scan(self, tokens: Tensor) -> Tensor:
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

    def _scan_apart(self, tokens: Tensor) -> Tensor:
        """Scan in each direction by itself, and merge what their norms leave."""
        proxy, one = self.to_proxy(tokens), torch.ones_like(self.merge_weight[:1])
        maps = (self.to_logits, self.to_input_gate, self.to_output_gate)
        own = zip(*(part.weight.chunk(len(self.directions)) for part in maps), strict=True)  # of each direction
        merged = torch.zeros_like(tokens) if self.to_skip is None else self.to_skip(proxy) * tokens
        for direction, weights, norm, share in zip(self.directions, own, self.norms, self.merge_weight, strict=True):
            logits, input_gate, output_gate = weights
            scanned = gspn_scan_from_proxy(
                tokens, proxy, logits, input_gate, output_gate, one, directions=[direction], window=self.window
            )
            merged = merged + share * norm(scanned)
        return merged.to(scanned.dtype)

    def scan_multiply_adds(self, height: int, width: int) -> int:
        """Return the scan's share of `multiply_adds`."""
        return scan_multiply_adds(height * width, self.channels, len(self.directions))

    def multiply_adds(self, height: int, width: int) -> int:
        tokens = height * width
        skips = tokens * self.channels * ((self.to_skip is not None) + (self.channel_skip is not None))
        return maps_multiply_adds(self, tokens) + self.scan_multiply_adds(height, width) + skips

    def working_elements(self, height: int, width: int) -> int:
        maps = (self.to_logits, self.to_input_gate, self.to_output_gate)
        calls = len(self.directions) if self.norm_place == "directions" else 1
        return 2 * height * width * sum(part.out_features for part in maps) // calls  # with their gradients


def _check_norm(norm: str | None, place: str) -> None:
    if norm is not None and norm not in NORMS:
        raise ValueError(f"unknown scan_norm '{norm}'; allowed are {', '.join(NORMS)}")
    if place not in NORM_PLACES:
        raise ValueError(f"unknown scan_norm_place '{place}'; allowed are {', '.join(NORM_PLACES)}")
    if norm is None and place != "after":
        raise ValueError(f"scan_norm_place is {place}, but there is no norm; give scan_norm layer or rms")


def _proxy_width(channels: int, proxy_channels: int | None, ratio: int) -> int:
    if ratio < 1:
        raise ValueError(f"proxy_ratio is {ratio}, but must be at least 1")
    if proxy_channels is None:
        if ratio > channels:
            raise ValueError(f"hidden_size {channels} is below the {ratio} channels that the proxy needs")
        proxy_channels = channels // ratio
    if proxy_channels < 1:
        raise ValueError(f"proxy_channels is {proxy_channels}, but must be at least 1")
    return proxy_channels


class ScanMixer(Mixer):
    """What stands in for attention: a linear map, the scan in each direction, a linear map."""

    kind = "scans"

    def __init__(self, channels: int, options: ScanOptions) -> None:
        super().__init__()
        width = options.width(channels)
        self.in_proj = nn.Linear(channels, width)
        self.scan = options.create(width)
        self.out_proj = nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        return self.out_proj(self.scan(self.in_proj(tokens)))

    def multiply_adds(self, height: int, width: int) -> int:
        return maps_multiply_adds(self, height * width) + self.scan.multiply_adds(height, width)
