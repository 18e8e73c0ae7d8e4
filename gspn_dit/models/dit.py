"""DiT (arXiv 2212.09748): a stack of adaLN-Zero blocks whose token mixer is attention, or the scan in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.base import DiffusionModel
from gspn_dit.models.embeddings import Modulation, modulated_norm, sincos_positions
from gspn_dit.models.gspn import GSPNMixer
from gspn_dit.ops import DIRECTIONS

MIXERS = ("attention", "gspn")
MLP_RATIO = 4


class AttentionMixer(nn.Module):
    """Multi-head self-attention over all tokens, by `scaled_dot_product_attention`."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {channels} channels")
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        projected = self.qkv(tokens.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, C/heads]
        mixed = F.scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4))  # [B, heads, N, C/heads]
        return self.proj(mixed.transpose(1, 2).reshape(tokens.shape))


class ScanMixer(nn.Module):
    """What stands in for attention: a linear map, the scan in each direction, a linear map."""

    def __init__(
        self,
        channels: int,
        weight_groups: int | None = None,
        window: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
    ) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, channels)
        self.scan = GSPNMixer(channels, weight_groups, window, directions)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        return self.out_proj(self.scan(self.in_proj(tokens)))


class DiTBlock(nn.Module):
    """A mixer and an MLP, each behind a modulated norm and a gate that starts shut (adaLN-Zero)."""

    def __init__(self, channels: int, mixer: nn.Module, mlp_norm_epsilon: float = 1e-6) -> None:
        super().__init__()
        self.mlp_norm_epsilon = mlp_norm_epsilon
        self.modulation = Modulation(channels, 6)
        self.mixer = mixer
        self.expand = nn.Linear(channels, MLP_RATIO * channels)
        self.contract = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, tokens: Tensor, conditioning: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C] by conditioning [B, C]; `branch_scale` [B] is 0 where both branches are dropped."""
        mix_shift, mix_scale, mix_gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(conditioning)
        if branch_scale is not None:
            kept = branch_scale[:, None, None, None].to(mix_gate.dtype)
            mix_gate, mlp_gate = mix_gate * kept, mlp_gate * kept
        tokens = tokens + mix_gate * self.mixer(modulated_norm(tokens, mix_shift, mix_scale))
        hidden = self.expand(modulated_norm(tokens, mlp_shift, mlp_scale, self.mlp_norm_epsilon))
        return tokens + mlp_gate * self.contract(F.gelu(hidden, approximate="tanh"))


class DiT(DiffusionModel):
    """Class-conditional denoiser of the published DiT architecture.

    With attention, fixed sine and cosine positions are added to the patches; they are computed for the grid that comes,
    so any height and width that the patch size divides will do. Scans know their place from the borders, and have none
    unless `positions` asks for them: where objects sit alike in all images, they shorten the start of a training.

    Args:
        num_classes, in_channels, out_channels, hidden_size, patch_size: as in `DiffusionModel`; 4 divides hidden_size.
        depth: number of blocks.
        num_heads: heads of attention; not used by scans.
        mixer: "attention" or "gspn".
        grid: rows and columns of patches of a training latent.
        interpolate_positions: squeeze the coordinates of any other grid into the training grid's range.
        weight_groups, scan_window, scan_directions: as in `GSPNTransformer`; for mixer "gspn" alone.
        positions: add positions to the patches; None for attention alone.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        mlp_norm_epsilon: added to the variance in the norm before the MLP (diffusers' default there is 1e-5).
        timestep_endpoint: see `TimestepEmbedding`.
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
        weight_groups: int | None = None,
        scan_window: int | None = None,
        drop_path_rate: float = 0.0,
        mlp_norm_epsilon: float = 1e-6,
        timestep_endpoint: bool = False,
        scan_directions: Sequence[str] | None = None,
        positions: bool | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels, out_channels, hidden_size, patch_size, timestep_endpoint)
        self.has_positions = mixer == "attention" if positions is None else positions
        if mixer not in MIXERS:
            raise ValueError(f"unknown mixer '{mixer}'; allowed are {', '.join(MIXERS)}")
        if depth < 1:
            raise ValueError(f"depth is {depth}, but must be at least 1")
        if self.has_positions and hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by 4, which the positions need")
        if mixer == "attention" and (weight_groups, scan_window, scan_directions) != (None, None, None):
            raise ValueError(
                "scan_directions, weight_groups and scan_window are options of scans; give mixer gspn or leave them out"
            )
        self.mixer, self.grid, self.interpolate_positions = mixer, grid, interpolate_positions

        def new_mixer() -> nn.Module:
            if mixer == "attention":
                return AttentionMixer(hidden_size, num_heads)
            directions = DIRECTIONS if scan_directions is None else scan_directions
            return ScanMixer(hidden_size, weight_groups, scan_window, directions)

        self.blocks = nn.ModuleList(DiTBlock(hidden_size, new_mixer(), mlp_norm_epsilon) for _ in range(depth))
        self._finish(drop_path_rate)

    def _initialise(self) -> None:
        super()._initialise()
        for layer in (self.timestep_embed.expand, self.timestep_embed.mix):
            nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, GSPNMixer):
                module.initialise_gates()

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
