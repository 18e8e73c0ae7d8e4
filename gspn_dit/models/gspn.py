"""The GSPN generative transformer (arXiv 2501.12381): a U-shaped stack of blocks whose token mixer is the scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.base import DiffusionModel
from gspn_dit.models.embeddings import Modulation, modulated_norm
from gspn_dit.ops import DIRECTIONS, gspn_scan_from_proxy
from gspn_dit.ops.contract import direction_codes
from gspn_dit.ops.recompute import norm_linear, squared_relu_linear

PROXY_RATIO = 16
CONDITIONINGS = ("additive", "adaln-zero")


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is made contiguous: a batched product takes a strided one matrix by matrix."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution over channels-last tokens [B, H, W, C] of the same size."""

    def __init__(self, channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)
        # The layout its gradient has over channels-last tokens; another one makes DDP copy and warn.
        self.to(memory_format=torch.channels_last)

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        if height * width <= self.weight[0].numel():
            return self._as_matrices(tokens)
        return super().forward(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _as_matrices(self, tokens: Tensor) -> Tensor:
        """Convolve a grid of no more positions than the kernel has taps by one matrix per channel.

        That is no more work, and the convolution's weight gradient is far slower on grids that small.
        """
        batch, height, width, channels = tokens.shape
        size, reach = self.kernel_size[0], self.kernel_size[0] // 2
        rows, columns = (torch.arange(n, device=tokens.device) for n in (height, width))
        down = (rows[:, None] - rows + reach)[:, None, :, None]  # [from row, 1, to row, 1]
        right = (columns[:, None] - columns + reach)[None, :, None, :]
        inside = (down >= 0) & (down < size) & (right >= 0) & (right < size)
        taps = torch.where(inside, down * size + right, size**2).flatten(2).flatten(0, 1)  # [positions, positions]
        matrices = F.pad(self.weight.flatten(1), (0, 1))[:, taps]  # [C, from, to]
        mixed = tokens.flatten(1, 2).permute(2, 0, 1).contiguous() @ matrices.contiguous()  # [C, B, positions]
        mixed = _ContiguousGradient.apply(mixed)
        if self.bias is not None:
            mixed = mixed + self.bias[:, None, None]
        return mixed.permute(1, 2, 0).reshape(batch, height, width, channels)


class GSPNMixer(nn.Module):
    """Propagates tokens in each direction; weight logits and gates come from a narrow proxy of the tokens."""

    def __init__(
        self,
        channels: int,
        weight_groups: int | None = None,
        window: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
    ) -> None:
        super().__init__()
        count = len(direction_codes(directions))
        groups = channels if weight_groups is None else weight_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"weight_groups {groups} does not divide the {channels} channels")
        proxy_channels = channels // PROXY_RATIO
        if proxy_channels < 1:
            raise ValueError(f"hidden_size {channels} is below the {PROXY_RATIO} channels that the proxy needs")
        self.window, self.directions = window, tuple(directions)
        self.to_proxy = nn.Linear(channels, proxy_channels, bias=False)
        self.to_logits = nn.Linear(proxy_channels, count * 3 * groups, bias=False)
        self.to_input_gate = nn.Linear(proxy_channels, count * channels, bias=False)
        self.to_output_gate = nn.Linear(proxy_channels, count * channels, bias=False)
        self.merge_weight = nn.Parameter(torch.ones(count))

    def initialise_gates(self) -> None:
        """Draw gates that keep the tokens' scale: with deviation σ, a sum of u·λ·x over D directions has D·σ⁴ of x's.

        Smaller gates, such as those of Xavier's rule for maps that widen, start a mixer nearly shut and learn slower.
        """
        for gate in (self.to_input_gate, self.to_output_gate):
            nn.init.normal_(gate.weight, std=len(self.directions) ** -0.25 / gate.in_features**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        return gspn_scan_from_proxy(
            tokens,
            self.to_proxy(tokens),
            self.to_logits.weight,
            self.to_input_gate.weight,
            self.to_output_gate.weight,
            self.merge_weight,
            directions=self.directions,
            window=self.window,
        )


class GSPNBlock(nn.Module):
    """Residual branch: norm, local context, scan, and a squared-ReLU gate (v·ReLU(v)).

    A modulated block (adaLN-Zero) takes the norm's shift and scale, and a gate on the branch that starts shut, from the
    conditioning.
    """

    def __init__(
        self,
        channels: int,
        weight_groups: int | None = None,
        window: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = Modulation(channels, 3) if modulated else None
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=not modulated)
        self.in_proj = nn.Linear(channels, channels, bias=False)
        self.local_conv = DepthwiseConv(channels, 7, bias=True)
        self.mixer = GSPNMixer(channels, weight_groups, window, directions)
        self.mixer_proj = nn.Linear(channels, channels, bias=False)
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
        num_classes, in_channels, out_channels, patch_size: as in `DiffusionModel`.
        hidden_size: width C; at least 16.
        depth: even number of blocks, without the one in the middle.
        weight_groups: groups of channels that share propagation weights; None for one per channel.
        scan_window: lines after which the scan restarts; None for global propagation.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        scan_directions: directions of propagation, of `DIRECTIONS`.
        long_skips: join the output of each encoder block to its mirror in the decoder.
        conditioning: "additive" adds timestep and class to the tokens, once; "adaln-zero" modulates every block.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        out_channels: int | None = None,
        hidden_size: int = 900,
        depth: int = 30,
        patch_size: int = 2,
        weight_groups: int | None = None,
        scan_window: int | None = None,
        drop_path_rate: float = 0.1,
        scan_directions: Sequence[str] = DIRECTIONS,
        long_skips: bool = True,
        conditioning: str = "additive",
    ) -> None:
        super().__init__(num_classes, in_channels, out_channels, hidden_size, patch_size)
        if depth < 2 or depth % 2:
            raise ValueError(f"depth is {depth}, but must be an even number of at least 2")
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"unknown conditioning '{conditioning}'; allowed are {', '.join(CONDITIONINGS)}")
        self.modulated = conditioning == "adaln-zero"
        self.blocks = nn.ModuleList(
            GSPNBlock(hidden_size, weight_groups, scan_window, scan_directions, self.modulated)
            for _ in range(depth + 1)
        )
        skips = depth // 2 if long_skips else 0
        self.skips = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in range(skips))
        self._finish(drop_path_rate)

    def _initialise(self) -> None:
        super()._initialise()
        for block in self.blocks:
            assert isinstance(block, GSPNBlock)
            block.mixer.initialise_gates()
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
