"""What the classification backbones are built of: tokens [B, H, W, C] in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.scans import ScanOptions
from gspn_dit.ops.contract import autocast_dtype, compute_dtype

FEED_FORWARD_RATIO = 4
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class BlockOptions:
    """Of `BackboneBlock`; `window` is that of the blocks that are local."""

    proxy_channels: int = 8
    """Width of the proxy that logits, gates and skip are linear maps of."""
    expansion: float = 1.5
    """Width of the scan over that of the block, rounded down."""
    local_kernel: int = 7
    """Side of the depthwise convolution before the scan, odd; 0 leaves it out."""
    weight_groups: int | None = None
    """Groups of channels that share propagation weights (1: all of them, GSPN-2); None for one per channel."""
    window: int = 2
    """Lines after which the scan of a local block restarts."""
    lpu: bool = False
    """Add a depthwise 3×3 convolution of the tokens to them before the mixer and before the feed-forward (GSPN-2)."""
    unit_gates: bool = False
    """Start gates that keep the tokens' scale (`GSPNMixer.initialise`) instead of deviations of 0.02."""
    unit_maps: bool = False
    """Start maps and convolutions that keep the tokens' scale, too; 0.02 is small for narrow blocks."""


class GlobalResponseNorm(nn.Module):
    """γ·(x·n) + β + x, where n is each channel's L2 norm over the image over the mean of those of all channels
    (ConvNeXt V2, arXiv 2301.00808). It starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, H, W, C]."""
        norms = torch.linalg.vector_norm(tokens, dim=(1, 2), keepdim=True, dtype=compute_dtype(tokens.dtype))
        relative = norms / (norms.mean(dim=-1, keepdim=True) + NORM_EPSILON)  # [B, 1, 1, C]
        return tokens * (1 + self.gamma * relative).to(tokens.dtype) + self.beta.to(tokens.dtype)


class Residual(nn.Module):
    """Adds a branch to the tokens, but for samples whose branch stochastic depth drops (arXiv 1603.09382).

    Args:
        rate: probability that a branch is dropped; those that are kept are divided by 1 - rate.
        row: the branch's place in `keep_mask`.
        rows: how many branches the model has.
    """

    def __init__(self, rate: float, row: int, rows: int) -> None:
        super().__init__()
        self.rate, self.row, self.rows = rate, row, rows

    def forward(self, tokens: Tensor, branch: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Return tokens + branch, both [B, H, W, C].

        `keep_mask` is bool [rows, B]. Without one nothing is dropped in evaluation, and training draws from PyTorch's
        generator. Under autocast the stream is float32, so that small branches are not rounded away.
        """
        if autocast_dtype(tokens.device.type) is not None:
            tokens = tokens.float()
        if keep_mask is not None:
            if len(keep_mask) != self.rows:
                raise ValueError(f"keep_mask has {len(keep_mask)} rows, but the model has {self.rows} branches")
            kept = keep_mask[self.row]
        elif self.training and self.rate > 0:
            kept = torch.rand(len(tokens), device=tokens.device) >= self.rate
        else:
            return tokens + branch
        return tokens + branch * (kept.to(branch.dtype) / (1 - self.rate))[:, None, None, None]

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class ConvNorm(nn.Module):
    """A 3×3 convolution with bias, which may halve the grid (rounding up), and a LayerNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.norm = nn.LayerNorm(out_channels, eps=NORM_EPSILON)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, H, W, C] to [B, ⌈H/stride⌉, ⌈W/stride⌉, out_channels]."""
        return self.norm(self.conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvResidual(nn.Module):
    """x + conv(GELU(conv(LayerNorm(x)))) with 3×3 convolutions, for what scans on a fine grid would be costly for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPSILON)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, H, W, C]."""
        branch = self.second(F.gelu(self.first(self.norm(tokens).permute(0, 3, 1, 2))))
        return tokens + branch.permute(0, 2, 3, 1)


class BackboneMixer(nn.Module):
    """The scan of the classification models (arXiv 2501.12381): Linear, depthwise convolution, scan with a skip,
    LayerNorm, global response norm, Linear; the maps have no bias.
    """

    def __init__(self, channels: int, options: BlockOptions, window: int | None) -> None:
        super().__init__()
        width = int(options.expansion * channels)
        kernel = options.local_kernel
        self.in_proj = nn.Linear(channels, width, bias=False)
        self.local_conv = DepthwiseConv(width, kernel, bias=False) if kernel else nn.Identity()
        self.scan = ScanOptions(
            proxy_channels=options.proxy_channels,
            scan_skip=True,
            weight_groups=options.weight_groups,
            scan_window=window,
        ).create(width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.response_norm = GlobalResponseNorm(width)
        self.out_proj = nn.Linear(width, channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        scanned = self.scan(self.local_conv(self.in_proj(tokens)))
        return self.out_proj(self.response_norm(self.norm(scanned)))


class FeedForward(nn.Module):
    """Linear, GELU, Linear, four times as wide in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, FEED_FORWARD_RATIO * channels)
        self.contract = nn.Linear(FEED_FORWARD_RATIO * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(tokens)))


class BackboneBlock(nn.Module):
    """A mixer and a feed-forward, each behind a LayerNorm and added to the tokens.

    Args:
        channels: width C.
        options: of mixer and block.
        window: lines after which the scan restarts; None for global propagation.
        drop_path_rate: of both branches.
        number, blocks: the block's number in the model, from 0, and how many there are.
    """

    def __init__(
        self,
        channels: int,
        options: BlockOptions,
        window: int | None,
        drop_path_rate: float = 0.0,
        number: int = 0,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.lpu = nn.ModuleList(DepthwiseConv(channels, 3, bias=False) for _ in range(2 if options.lpu else 0))
        self.mixer_norm = nn.LayerNorm(channels, eps=NORM_EPSILON)
        self.mixer = BackboneMixer(channels, options, window)
        self.mixer_residual = Residual(drop_path_rate, 2 * number, 2 * blocks)
        self.mlp_norm = nn.LayerNorm(channels, eps=NORM_EPSILON)
        self.mlp = FeedForward(channels)
        self.mlp_residual = Residual(drop_path_rate, 2 * number + 1, 2 * blocks)

    def forward(self, tokens: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C]; `keep_mask` as in `Residual`."""
        if self.lpu:
            tokens = tokens + self.lpu[0](tokens)
        tokens = self.mixer_residual(tokens, self.mixer(self.mixer_norm(tokens)), keep_mask)
        if self.lpu:
            tokens = tokens + self.lpu[1](tokens)
        return self.mlp_residual(tokens, self.mlp(self.mlp_norm(tokens)), keep_mask)


class Stage(nn.Module):
    """Blocks on one grid, behind a convolution that halves it, but in the first stage."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False
        """Keep the inputs of blocks alone, and recompute each block in the backward pass."""

    def forward(self, tokens: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C]; `keep_mask` as in `Residual`."""
        tokens = self.downsample(tokens)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, keep_mask, use_reentrant=False)
            else:
                tokens = block(tokens, keep_mask)
        return tokens


def initialise(model: nn.Module, unit_maps: bool = False, unit_gates: bool = False) -> None:
    """Draw weights of maps and convolutions from a truncated normal of deviation 0.02; biases start at zero.

    With `unit_maps` the deviation is 1/√n for n inputs to an output; with `unit_gates` the scans' gates are drawn so
    that they keep the tokens' scale.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            deviation = module.weight[0].numel() ** -0.5 if unit_maps else 0.02
            nn.init.trunc_normal_(module.weight, std=deviation, a=-2.0, b=2.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if unit_gates and isinstance(module, BackboneMixer):
            module.scan.initialise()
