"""The scans that stand in for one self-attention of a diffusers UNet (arXiv 2501.12381).

The published layers are "pure" (logits and gates from a proxy of the tokens) or keep queries, keys and values ("qkv").
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from gspn_dit.models.scans import GSPNMixer
from gspn_dit.ops import gspn_scan_from_proxy

PROXY_RATIOS = {"pure": 8, "qkv": 32}
"""Published width of the tokens over that of the proxy, by variant."""
GRID = "gspn_grid"
"""Key of `cross_attention_kwargs` in which height and width travel from a transformer to its blocks."""


class GSPNSelfAttention(nn.Module):
    """The stand-in for a self-attention over a grid of tokens: scans in four directions, merged, then a linear map.

    Args:
        channels: width C.
        variant: "pure" takes logits and gates from a proxy of the tokens x and scans x. "qkv" keeps the linear maps to
            q, k and v: logits and input gate come from the proxy of x + k, output gate and skip from that of x + q,
            and x + v is scanned.
        window: lines after which the scan restarts (4 in the published weights); None for global propagation.
        proxy_ratio: C over the width of the proxy.
        skip: add a linear map of the proxy times what is scanned.
        weight_groups: groups of channels that share propagation weights; None for one per channel.

    Raises:
        ValueError: a value out of range, or one that does not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "pure",
        window: int | None = None,
        proxy_ratio: int = PROXY_RATIOS["pure"],
        skip: bool = True,
        weight_groups: int | None = None,
    ) -> None:
        super().__init__()
        if proxy_ratio < 1 or channels % proxy_ratio:
            raise ValueError(f"proxy_ratio {proxy_ratio} does not divide the {channels} channels of a layer")
        self.to_qkv = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in "qkv" if variant == "qkv")
        self.mixer = GSPNMixer(channels, weight_groups, window, proxy_ratio=proxy_ratio, skip=skip)
        self.to_out = nn.Linear(channels, channels)
        self.mixer.initialise()

    def start_from(self, attention: Attention) -> None:
        """Copy what an attention has as well: the output map, and those to q, k and v; missing biases are zero."""
        maps = [attention.to_q, attention.to_k, attention.to_v][: len(self.to_qkv)]
        others: list[Any] = [*maps, attention.to_out[0]]
        for own, other in zip([*self.to_qkv, self.to_out], others, strict=True):
            assert isinstance(own, nn.Linear)
            with torch.no_grad():
                own.weight.copy_(other.weight)
                if own.bias is not None:
                    own.bias.zero_() if other.bias is None else own.bias.copy_(other.bias)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gspn_grid: tuple[int, int] | None = None,
        **_: Any,
    ) -> Tensor:
        """Mix tokens [B, N, C] of a grid (height, width) to [B, N, C]; what else an attention takes is ignored.

        Raises:
            ValueError: a mask, which scans cannot follow, or no grid, or one of another number of tokens.
        """
        if attention_mask is not None:
            raise ValueError("GSPN layers take no attention_mask; leave it out, or unmount the adapter")
        if gspn_grid is None or gspn_grid[0] * gspn_grid[1] != hidden_states.shape[1]:
            raise ValueError(
                f"a GSPN layer got {hidden_states.shape[1]} tokens and the grid {gspn_grid}; it must be called by the "
                "UNet that it was mounted on"
            )
        return self.to_out(self._scan(hidden_states.unflatten(1, gspn_grid)).flatten(1, 2))

    def _scan(self, tokens: Tensor) -> Tensor:
        """Propagate tokens [B, H, W, C]."""
        mixer = self.mixer
        if not self.to_qkv:
            return mixer(tokens)
        query, key, value = (linear(tokens) for linear in self.to_qkv)
        proxy = torch.cat([mixer.to_proxy(tokens + key), mixer.to_proxy(tokens + query)], dim=-1)
        width = proxy.shape[-1] // 2
        # The operator reads one proxy, so a map is zero on the half that is not its own. That doubles the products of
        # the maps (C/16 instead of C/32 a channel), which is far less than writing 20 logits and gates to memory.
        of_key, of_query = (0, width), (width, 0)
        return gspn_scan_from_proxy(
            tokens + value,
            proxy,
            F.pad(mixer.to_logits.weight, of_key),
            F.pad(mixer.to_input_gate.weight, of_key),
            F.pad(mixer.to_output_gate.weight, of_query),
            mixer.merge_weight,
            None if mixer.to_skip is None else F.pad(mixer.to_skip.weight, of_query),
            directions=mixer.directions,
            window=mixer.window,
        )

    # Loaders (IP-Adapter, `set_attn_processor`) count a processor for every attention; this one has no effect.
    def get_processor(self, *_: Any, **__: Any) -> AttnProcessor2_0:
        return AttnProcessor2_0()

    def set_processor(self, *_: Any, **__: Any) -> None:
        pass
