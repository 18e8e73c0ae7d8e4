"""DiT (arXiv 2212.09748): a stack of adaLN-Zero blocks whose token mixer is attention, or another in its place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.base import DiffusionModel
from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.embeddings import Modulation, modulated_norm, sincos_positions
from gspn_dit.models.mixers import MIXERS, Mixer, option_names, read_options

MLP_RATIO = 4
NORMS, MLPS = ("layer", "rms"), ("gelu", "swiglu")


def mlp_width(channels: int, mlp: str) -> int:
    """Return the hidden width: 4·C, or of SwiGLU, which has three maps, 8/3·C rounded up to a multiple of 8."""
    return MLP_RATIO * channels if mlp == "gelu" else 8 * -(-channels // 3)


class DiTBlock(nn.Module):
    """A mixer and an MLP, each behind a modulated norm and a gate that starts shut (adaLN-Zero).

    With `lpu` a depthwise 3×3 convolution of the tokens is added to them before both branches (CMT's local perception
    unit, arXiv 2107.06263). It starts open and is never dropped: started at zero, a short training ends worse.

    `norm` is "layer" or "rms"; `mlp` is "gelu", or "swiglu" for W₃(SiLU(W₁x) ⊙ W₂x) (arXiv 2002.05202).
    """

    def __init__(
        self,
        channels: int,
        mixer: nn.Module,
        mlp_norm_epsilon: float = 1e-6,
        lpu: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
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
        width = mlp_width(channels, mlp)
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
        num_classes, in_channels, out_channels, hidden_size, patch_size: as in `DiffusionModel`; 4 divides hidden_size.
        depth: number of blocks.
        num_heads: heads of attention; not used by mixers without.
        mixer: one of `MIXERS`.
        grid: rows and columns of patches of a training latent.
        interpolate_positions: squeeze the coordinates of any other grid into the training grid's range.
        positions: add positions to the patches; None for where the mixer needs them, which attention alone does.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        mlp_norm_epsilon: added to the variance in the norm before the MLP (diffusers' default there is 1e-5).
        timestep_endpoint: see `TimestepEmbedding`.
        lpu, norm, mlp: see `DiTBlock`.
        second_time: as in `DiffusionModel`.
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
        second_time: bool = False,
        **mixer_options: Any,
    ) -> None:
        super().__init__(
            num_classes, in_channels, out_channels, hidden_size, patch_size, timestep_endpoint, second_time
        )
        if "num_heads" in option_names(mixer):
            mixer_options["num_heads"] = num_heads
        new_mixer, options = MIXERS[mixer][0], read_options(mixer, mixer_options)
        self.has_positions = new_mixer.needs_positions if positions is None else positions
        if depth < 1:
            raise ValueError(f"depth is {depth}, but must be at least 1")
        if self.has_positions and hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by 4, which the positions need")
        self.mixer, self.grid, self.interpolate_positions = mixer, grid, interpolate_positions
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, new_mixer(hidden_size, options), mlp_norm_epsilon, lpu, norm, mlp)
            for _ in range(depth)
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
        if self.has_positions:
            tokens = tokens + self.positions(*tokens.shape[1:3]).to(self.patch_embed.weight.dtype)
        for block, branch_scale in zip(self.blocks, branch_scales, strict=True):
            tokens = self.run_block(block, tokens, conditioning, branch_scale)
        return tokens

    def positions(self, height: int, width: int) -> Tensor:
        """Return the positions of a grid of patches, float32 [height, width, C]."""
        weight = self.patch_embed.weight
        rows, columns = (torch.arange(size, device=weight.device, dtype=torch.float32) for size in (height, width))
        if self.interpolate_positions:
            rows, columns = rows * (self.grid[0] / height), columns * (self.grid[1] / width)
        return sincos_positions(rows, columns, weight.shape[0])
