"""The GSPN generative transformer (arXiv 2501.12381): a U-shaped stack of blocks whose token mixer is the scan.

Other mixers may stand in the scan's place, for comparisons of mixers in this block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.models.base import DiffusionModel
from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.embeddings import Modulation, modulated_norm
from gspn_dit.models.mixers import MIXERS, GSPNMixer, Mixer, ScanOptions, option_names, read_options
from gspn_dit.ops.recompute import norm_linear, squared_relu_linear

CONDITIONINGS = ("additive", "adaln-zero")


class GSPNBlock(nn.Module):
    """Residual branch: norm, local context, scan, and a squared-ReLU gate (v·ReLU(v)).

    A modulated block (adaLN-Zero) takes the norm's shift and scale, and a gate on the branch that starts shut, from the
    conditioning. The scan is followed by a linear map; another mixer ends with its own.
    """

    def __init__(self, channels: int, mixer: Mixer | None = None, modulated: bool = False) -> None:
        super().__init__()
        mixer = mixer or ScanOptions().create(channels)
        self.modulation = Modulation(channels, 3) if modulated else None
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=not modulated)
        self.in_proj = nn.Linear(channels, channels, bias=False)
        self.local_conv = DepthwiseConv(channels, 7, bias=True)
        self.mixer = mixer
        self.mixer_proj = nn.Linear(channels, channels, bias=False) if isinstance(mixer, GSPNMixer) else nn.Identity()
        self.gate_conv = DepthwiseConv(channels, 3, bias=False)
        self.out_proj = nn.Linear(channels, channels, bias=False)

    def forward(self, tokens: Tensor, branch_scale: Tensor | None = None, conditioning: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C]; `branch_scale` [B] is 0 for samples whose branch is dropped.

        Conditioning [B, C] is for a modulated block alone.
        """
        norm, gate = self.norm, None
        if self.modulation is None:
            branch = norm_linear(tokens, norm.weight, norm.bias, self.in_proj.weight, norm.eps)
        else:
            shift, scale, gate = self.modulation(conditioning)
            branch = self.in_proj(modulated_norm(tokens, shift, scale, norm.eps))
        branch = self.local_conv(branch)
        branch = self.gate_conv(self.mixer_proj(self.mixer(branch)))
        branch = squared_relu_linear(branch, self.out_proj.weight)
        if gate is not None:
            branch = branch * gate
        if branch_scale is not None:
            branch = branch * branch_scale[:, None, None, None].to(branch.dtype)
        return tokens + branch


class GSPNTransformer(DiffusionModel):
    """Class-conditional denoiser: depth/2 encoder blocks, one in the middle, depth/2 decoder blocks with long skips.

    No positional embedding: any height and width that the patch size divides will do.

    Args:
        num_classes, in_channels, out_channels, patch_size, second_time: as in `DiffusionModel`.
        hidden_size: width C; at least 16.
        depth: even number of blocks, without the one in the middle.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        long_skips: join the output of each encoder block to its mirror in the decoder.
        conditioning: "additive" adds timestep and class to the tokens, once; "adaln-zero" modulates every block.
        mixer: of `MIXERS`; "gspn" is the scan itself, between the maps that the block has.
        num_heads: of a mixer that has heads.
        mixer_options: the mixer's own, by name.

    Raises:
        ValueError: a value out of range, or an option of another mixer.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        out_channels: int | None = None,
        hidden_size: int = 900,
        depth: int = 30,
        patch_size: int = 2,
        drop_path_rate: float = 0.1,
        long_skips: bool = True,
        conditioning: str = "additive",
        second_time: bool = False,
        mixer: str = "gspn",
        num_heads: int = 6,
        **mixer_options: Any,
    ) -> None:
        super().__init__(num_classes, in_channels, out_channels, hidden_size, patch_size, second_time=second_time)
        if depth < 2 or depth % 2:
            raise ValueError(f"depth is {depth}, but must be an even number of at least 2")
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"unknown conditioning '{conditioning}'; allowed are {', '.join(CONDITIONINGS)}")
        self.modulated = conditioning == "adaln-zero"
        if "num_heads" in option_names(mixer):
            mixer_options["num_heads"] = num_heads
        options = read_options(mixer, mixer_options)

        def new_mixer() -> Mixer:
            return options.create(hidden_size) if mixer == "gspn" else MIXERS[mixer][0](hidden_size, options)

        self.mixer = mixer
        self.blocks = nn.ModuleList(GSPNBlock(hidden_size, new_mixer(), self.modulated) for _ in range(depth + 1))
        skips = depth // 2 if long_skips else 0
        self.skips = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in range(skips))
        self._finish(drop_path_rate)

    def _initialise(self) -> None:
        super()._initialise()
        for block in self.blocks:
            assert isinstance(block, GSPNBlock)
            block.mixer.initialise()
            if self.modulated:
                continue  # the branches start shut
            nn.init.normal_(block.out_proj.weight, std=0.02 / len(self.blocks) ** 0.5)

    def transform(self, tokens: Tensor, conditioning: Tensor, branch_scales: list[Tensor | None]) -> Tensor:
        """Run encoder, middle and decoder blocks; the conditioning joins the tokens before them, or every block."""
        for_blocks = (conditioning,) if self.modulated else ()
        if not self.modulated:
            tokens = tokens + conditioning[:, None, None]
        half = len(self.blocks) // 2
        encoded: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if layer > half and self.skips:
                tokens = self.skips[layer - half - 1](torch.cat([tokens, encoded.pop()], dim=-1))
            tokens = self.run_block(block, tokens, branch_scales[layer], *for_blocks)
            if layer < half:
                encoded.append(tokens)
        return tokens
