"""DiT (arXiv 2212.09748): a stack of adaLN-Zero blocks whose token mixer is attention, or another in its place."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.base import DiffusionModel
from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.embeddings import Modulation, modulated_norm
from gspn_dit.models.mixers import MIXERS, Mixer, block_mixers, option_names

MLP_RATIO = 4
NORMS, MLPS = ("layer", "rms"), ("gelu", "swiglu")


def mlp_width(channels: int, mlp: str, ratio: float = MLP_RATIO) -> int:
    """Return the hidden width, ratio·C; of SwiGLU, which has three maps, 2/3 of it rounded up to a multiple of 8.

    Raises ValueError for a ratio that leaves no channel.
    """
    width = round(ratio * channels) if mlp == "gelu" else 8 * math.ceil(ratio * channels / 12)
    if width < 1:
        raise ValueError(f"mlp_ratio {ratio} leaves an MLP of {channels} channels no width; give a larger one")
    return width


class DiTBlock(nn.Module):
    """A mixer and an MLP, each behind a modulated norm and a gate that starts shut (adaLN-Zero).

    With `lpu` a depthwise 3×3 convolution of the tokens is added to them before both branches (CMT's local perception
    unit, arXiv 2107.06263). It starts open and is never dropped: started at zero, a short training ends worse.

    `norm` is "layer" or "rms"; `mlp` is "gelu", or "swiglu" for W₃(SiLU(W₁x) ⊙ W₂x) (arXiv 2002.05202); `mlp_ratio` is
    its width over the block's, see `mlp_width`.
    """

    def __init__(
        self,
        channels: int,
        mixer: nn.Module,
        mlp_norm_epsilon: float = 1e-6,
        lpu: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        mlp_ratio: float = MLP_RATIO,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("norm", norm, NORMS), ("mlp", mlp, MLPS)):
            if value not in allowed:
                raise ValueError(f"unknown {name} '{value}'; allowed are {', '.join(allowed)}")
        self.rms, self.gated = norm == "rms", mlp == "swiglu"
        self.lpu = DepthwiseConv(channels, 3, bias=False) if lpu else None
        self.mlp_norm_epsilon = mlp_norm_epsilon
        self.modulation = Modulation(channels, 6)
        self.mixer = mixer
        width = mlp_width(channels, mlp, mlp_ratio)
        self.expand = nn.Linear(channels, 2 * width if self.gated else width)  # gate, then value
        self.contract = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, conditioning: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C] by conditioning [B, C]; `branch_scale` [B] is 0 where both branches are dropped."""
        mix_shift, mix_scale, mix_gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(conditioning)
        if branch_scale is not None:
            kept = branch_scale[:, None, None, None].to(mix_gate.dtype)
            mix_gate, mlp_gate = mix_gate * kept, mlp_gate * kept
        if self.lpu is not None:
            tokens = tokens + self.lpu(tokens)
        tokens = tokens + mix_gate * self.mixer(modulated_norm(tokens, mix_shift, mix_scale, rms=self.rms))
        hidden = self.expand(modulated_norm(tokens, mlp_shift, mlp_scale, self.mlp_norm_epsilon, self.rms))
        return tokens + mlp_gate * self.contract(self._activate(hidden))

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(hidden, approximate="tanh")
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value


class DiT(DiffusionModel):
    """Class-conditional denoiser of the published DiT architecture.

    With attention, fixed sine and cosine positions are added to the patches; they are computed for the grid that comes,
    so any height and width that the patch size divides will do. Other mixers have none unless `positions` asks for
    them: scans know their place from the borders, but where objects sit alike in all images, positions shorten the
    start of a training.

    Args:
        num_classes, in_channels, out_channels, hidden_size, patch_size: as in `DiffusionModel`.
        depth: number of blocks.
        num_heads: heads of attention; not used by mixers without.
        mixer: one of `MIXERS`.
        attention_every, conv_every, scan_global_every: see `block_mixers`.
        grid, interpolate_positions, stem_conv, second_time: as in `DiffusionModel`.
        positions: add positions to the patches; None for where the mixer needs them, which attention alone does.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        mlp_norm_epsilon: added to the variance in the norm before the MLP (diffusers' default there is 1e-5).
        timestep_endpoint: see `TimestepEmbedding`.
        lpu, norm, mlp, mlp_ratio: see `DiTBlock`.
        mixer_options: the mixer's own, by name.

    Raises:
        ValueError: a value out of range, or an option of another mixer.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        out_channels: int | None = None,
        hidden_size: int = 384,
        depth: int = 12,
        patch_size: int = 2,
        num_heads: int = 6,
        mixer: str = "attention",
        grid: tuple[int, int] = (16, 16),
        interpolate_positions: bool = False,
        drop_path_rate: float = 0.0,
        mlp_norm_epsilon: float = 1e-6,
        timestep_endpoint: bool = False,
        positions: bool | None = None,
        lpu: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        mlp_ratio: float = MLP_RATIO,
        second_time: bool = False,
        stem_conv: bool = False,
        attention_every: int | None = None,
        conv_every: int | None = None,
        scan_global_every: int | None = None,
        **mixer_options: Any,
    ) -> None:
        if "num_heads" in option_names(mixer) or attention_every is not None:
            mixer_options["num_heads"] = num_heads
        super().__init__(
            num_classes,
            in_channels,
            out_channels,
            hidden_size,
            patch_size,
            timestep_endpoint,
            second_time,
            positions=MIXERS[mixer][0].needs_positions if positions is None else positions,
            grid=grid,
            interpolate_positions=interpolate_positions,
            stem_conv=stem_conv,
        )
        if depth < 1:
            raise ValueError(f"depth is {depth}, but must be at least 1")
        self.mixer = mixer
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, MIXERS[name][0](hidden_size, options), mlp_norm_epsilon, lpu, norm, mlp, mlp_ratio)
            for name, options in block_mixers(
                mixer, depth, mixer_options, attention_every, conv_every, scan_global_every
            )
        )
        self._finish(drop_path_rate)

    def _initialise(self) -> None:
        super()._initialise()
        for layer in (self.timestep_embed.expand, self.timestep_embed.mix):
            nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Mixer):
                module.initialise()

    def transform(self, tokens: Tensor, conditioning: Tensor, branch_scales: list[Tensor | None]) -> Tensor:
        for block, branch_scale in zip(self.blocks, branch_scales, strict=True):
            tokens = self.run_block(block, tokens, conditioning, branch_scale)
        return tokens
