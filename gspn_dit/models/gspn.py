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
from gspn_dit.models.mixers import MIXERS, Mixer, block_mixers, option_names
from gspn_dit.models.scans import NORMS, GSPNMixer, ScanOptions
from gspn_dit.ops.recompute import norm_linear, squared_relu_linear

CONDITIONINGS = ("additive", "adaln-zero")
EPSILON = 1e-6
"""Added to the variance in the norms."""


class GSPNBlock(nn.Module):
    """Residual branch: norm, local context, scan, and a squared-ReLU gate (v·ReLU(v)).

    A modulated block (adaLN-Zero) takes the norm's shift and scale, and a gate on the branch that starts shut, from the
    conditioning. The scan, whose width may be another, is followed by a linear map; another mixer ends with its own.

    What is not published, and off: `lpu` adds a depthwise 3×3 convolution of the tokens to them before the branch;
    `norm` "rms" stands in LayerNorm's place; with `mlp_ratio` a token-wise path W₂(v·ReLU(v)), v = W₁·norm(tokens), of
    so many times the width is added to the branch; `gate_norm` norms v before the gate, whose square would otherwise
    amplify what grows with the grid.
    """

    def __init__(
        self,
        channels: int,
        mixer: Mixer | None = None,
        modulated: bool = False,
        lpu: bool = False,
        norm: str = "layer",
        mlp_ratio: float | None = None,
        gate_norm: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"unknown norm '{norm}'; allowed are {', '.join(NORMS)}")
        hidden = 0 if mlp_ratio is None else round(mlp_ratio * channels)
        if mlp_ratio is not None and hidden < 1:
            raise ValueError(f"mlp_ratio {mlp_ratio} leaves an MLP of {channels} channels no width; give a larger one")
        mixer = mixer or ScanOptions().create(channels)
        width = mixer.channels if isinstance(mixer, GSPNMixer) else channels
        self.lpu = DepthwiseConv(channels, 3, bias=False) if lpu else None
        self.modulation = Modulation(channels, 3) if modulated else None
        self.norm = NORMS[norm](channels, eps=EPSILON, elementwise_affine=not modulated)
        self.in_proj = nn.Linear(channels, width, bias=False)
        self.local_conv = DepthwiseConv(width, 7, bias=True)
        self.mixer = mixer
        self.mixer_proj = nn.Linear(width, channels, bias=False) if isinstance(mixer, GSPNMixer) else nn.Identity()
        self.gate_conv = DepthwiseConv(channels, 3, bias=False)
        self.gate_norm = NORMS[norm](channels, eps=EPSILON) if gate_norm else nn.Identity()
        self.out_proj = nn.Linear(channels, channels, bias=False)
        self.expand = nn.Linear(channels, hidden, bias=False) if hidden else None
        self.contract = nn.Linear(hidden, channels, bias=False) if hidden else None

    def forward(self, tokens: Tensor, branch_scale: Tensor | None = None, conditioning: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C]; `branch_scale` [B] is 0 for samples whose branch is dropped.

        Conditioning [B, C] is for a modulated block alone.
        """
        if self.lpu is not None:
            tokens = tokens + self.lpu(tokens)
        shift, scale, gate = (None, None, None) if self.modulation is None else self.modulation(conditioning)
        branch = self.local_conv(self._normed_map(self.in_proj, tokens, shift, scale))
        branch = self.gate_conv(self.mixer_proj(self.mixer(branch)))
        branch = squared_relu_linear(self.gate_norm(branch), self.out_proj.weight)
        if self.expand is not None and self.contract is not None:
            hidden = self._normed_map(self.expand, tokens, shift, scale)
            branch = branch + squared_relu_linear(hidden, self.contract.weight)
        if gate is not None:
            branch = branch * gate
        if branch_scale is not None:
            branch = branch * branch_scale[:, None, None, None].to(branch.dtype)
        return tokens + branch

    def _normed_map(self, linear: nn.Linear, tokens: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """Map the normed tokens without a bias; LayerNorm with weights of its own is recomputed, not kept."""
        norm = self.norm
        if shift is not None and scale is not None:
            return linear(modulated_norm(tokens, shift, scale, EPSILON, rms=isinstance(norm, nn.RMSNorm)))
        if isinstance(norm, nn.LayerNorm):
            return norm_linear(tokens, norm.weight, norm.bias, linear.weight, EPSILON)
        return linear(norm(tokens))


class GSPNTransformer(DiffusionModel):
    """Class-conditional denoiser: depth/2 encoder blocks, one in the middle, depth/2 decoder blocks with long skips.

    No positions unless they are asked for: any height and width that the patch size divides will do.

    Args:
        num_classes, in_channels, out_channels, patch_size, second_time, positions, grid, interpolate_positions,
            stem_conv: as in `DiffusionModel`.
        hidden_size: width C; at least 16.
        depth: even number of blocks, without the one in the middle.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        long_skips: join the output of each encoder block to its mirror in the decoder.
        conditioning: "additive" adds timestep and class to the tokens, once; "adaln-zero" modulates every block.
        mixer: of `MIXERS`; "gspn" is the scan itself, between the maps that the block has.
        num_heads: of a mixer that has heads.
        lpu, norm, mlp_ratio, gate_norm: see `GSPNBlock`.
        attention_every, conv_every, scan_global_every: see `block_mixers`.
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
        lpu: bool = False,
        norm: str = "layer",
        mlp_ratio: float | None = None,
        gate_norm: bool = False,
        positions: bool = False,
        grid: tuple[int, int] = (16, 16),
        interpolate_positions: bool = False,
        stem_conv: bool = False,
        attention_every: int | None = None,
        conv_every: int | None = None,
        scan_global_every: int | None = None,
        **mixer_options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            out_channels,
            hidden_size,
            patch_size,
            second_time=second_time,
            positions=positions,
            grid=grid,
            interpolate_positions=interpolate_positions,
            stem_conv=stem_conv,
        )
        if depth < 2 or depth % 2:
            raise ValueError(f"depth is {depth}, but must be an even number of at least 2")
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"unknown conditioning '{conditioning}'; allowed are {', '.join(CONDITIONINGS)}")
        self.modulated = conditioning == "adaln-zero"
        if "num_heads" in option_names(mixer) or attention_every is not None:
            mixer_options["num_heads"] = num_heads

        def new_mixer(name: str, options: Any) -> Mixer:
            if name == "gspn":
                return options.create(options.width(hidden_size))
            return MIXERS[name][0](hidden_size, options)

        self.mixer = mixer
        self.blocks = nn.ModuleList(
            GSPNBlock(hidden_size, new_mixer(*of_block), self.modulated, lpu, norm, mlp_ratio, gate_norm)
            for of_block in block_mixers(
                mixer, depth + 1, mixer_options, attention_every, conv_every, scan_global_every
            )
        )
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
            for last in (block.out_proj, block.contract):
                if last is not None:
                    nn.init.normal_(last.weight, std=0.02 / len(self.blocks) ** 0.5)

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
