"""The GSPN generative transformer (arXiv 2501.12381): a U-shaped stack of blocks whose token mixer is the scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models.embeddings import ClassEmbedding, ModulatedOutput, TimestepEmbedding, patchify, unpatchify
from gspn_dit.ops import DIRECTIONS, gspn_scan_from_proxy

PROXY_RATIO = 16


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
        if self.bias is not None:
            mixed = mixed + self.bias[:, None, None]
        return mixed.permute(1, 2, 0).reshape(batch, height, width, channels)


class GSPNMixer(nn.Module):
    """Propagates tokens in four directions; weight logits and gates come from a narrow proxy of the tokens."""

    def __init__(self, channels: int, weight_groups: int | None = None, window: int | None = None) -> None:
        super().__init__()
        groups = channels if weight_groups is None else weight_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"weight_groups {groups} does not divide the {channels} channels")
        proxy_channels = channels // PROXY_RATIO
        if proxy_channels < 1:
            raise ValueError(f"hidden_size {channels} is below the {PROXY_RATIO} channels that the proxy needs")
        self.window = window
        self.to_proxy = nn.Linear(channels, proxy_channels, bias=False)
        self.to_logits = nn.Linear(proxy_channels, len(DIRECTIONS) * 3 * groups, bias=False)
        self.to_input_gate = nn.Linear(proxy_channels, len(DIRECTIONS) * channels, bias=False)
        self.to_output_gate = nn.Linear(proxy_channels, len(DIRECTIONS) * channels, bias=False)
        self.merge_weight = nn.Parameter(torch.ones(len(DIRECTIONS)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, H, W, C] to [B, H, W, C]."""
        return gspn_scan_from_proxy(
            tokens,
            self.to_proxy(tokens),
            self.to_logits.weight,
            self.to_input_gate.weight,
            self.to_output_gate.weight,
            self.merge_weight,
            window=self.window,
        )


class GSPNBlock(nn.Module):
    """Residual branch: norm, local context, scan, and a squared-ReLU gate (v·ReLU(v))."""

    def __init__(self, channels: int, weight_groups: int | None = None, window: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.in_proj = nn.Linear(channels, channels, bias=False)
        self.local_conv = DepthwiseConv(channels, 7, bias=True)
        self.mixer = GSPNMixer(channels, weight_groups, window)
        self.mixer_proj = nn.Linear(channels, channels, bias=False)
        self.gate_conv = DepthwiseConv(channels, 3, bias=False)
        self.out_proj = nn.Linear(channels, channels, bias=False)

    def forward(self, tokens: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        """Map tokens [B, H, W, C]; `branch_scale` [B] is 0 for samples whose branch is dropped."""
        branch = self.local_conv(self.in_proj(self.norm(tokens)))
        branch = self.gate_conv(self.mixer_proj(self.mixer(branch)))
        branch = self.out_proj(branch * F.relu(branch))
        if branch_scale is not None:
            branch = branch * branch_scale[:, None, None, None].to(branch.dtype)
        return tokens + branch


class GSPNTransformer(nn.Module):
    """Class-conditional denoiser: depth/2 encoder blocks, one in the middle, depth/2 decoder blocks with long skips.

    No positional embedding: any height and width that the patch size divides will do.

    Args:
        num_classes: class ids are 0 … num_classes-1; `num_classes` itself means "no class".
        in_channels: channels of the latent.
        out_channels: channels of the prediction; None for `in_channels`.
        hidden_size: width C; at least 16.
        depth: even number of blocks, without the one in the middle.
        patch_size: side of a patch in latent pixels.
        weight_groups: groups of channels that share propagation weights; None for one per channel.
        scan_window: lines after which the scan restarts; None for global propagation.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
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
    ) -> None:
        super().__init__()
        if depth < 2 or depth % 2:
            raise ValueError(f"depth is {depth}, but must be an even number of at least 2")
        self.num_classes, self.patch_size = num_classes, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.timestep_embed = TimestepEmbedding(hidden_size)
        self.class_embed = ClassEmbedding(num_classes, hidden_size)
        self.blocks = nn.ModuleList(GSPNBlock(hidden_size, weight_groups, scan_window) for _ in range(depth + 1))
        self.skips = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in range(depth // 2))
        self.output = ModulatedOutput(hidden_size, patch_size, self.out_channels)
        self.drop_path_rates = [drop_path_rate * layer / depth for layer in range(depth + 1)]
        self._initialise()

    @property
    def null_label(self) -> int:
        """The class id that means "no class"."""
        return self.num_classes

    def _initialise(self) -> None:
        """Xavier for linear maps, small embeddings; branches and the output start near zero."""
        output = set(self.output.modules())
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in output:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, GSPNBlock)
            nn.init.normal_(block.out_proj.weight, std=0.02 / len(self.blocks) ** 0.5)

    def forward(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor, keep_mask: Tensor | None = None
    ) -> Tensor:
        """Predict from noisy latents.

        Args:
            latents: [B, in_channels, H, W].
            timesteps: [B], in [0, 1000].
            class_labels: int64 [B]; `num_classes` means "no class".
            keep_mask: bool [depth + 1, B], False where stochastic depth drops a sample's branch; None keeps all.

        Returns:
            [B, out_channels, H, W].
        """
        conditioning = self.timestep_embed(timesteps) + self.class_embed(class_labels)  # [B, C]
        tokens = self.patch_embed(patchify(latents, self.patch_size)) + conditioning[:, None, None]  # [B, h, w, C]
        scales = self._branch_scales(keep_mask)
        half = len(self.skips)
        encoded: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if layer > half:
                tokens = self.skips[layer - half - 1](torch.cat([tokens, encoded.pop()], dim=-1))
            tokens = block(tokens, scales[layer])
            if layer < half:
                encoded.append(tokens)
        return unpatchify(self.output(tokens, conditioning), self.patch_size)

    def _branch_scales(self, keep_mask: Tensor | None) -> list[Tensor | None]:
        """Return what each block's branch is multiplied by: keep / probability of keeping."""
        if keep_mask is None:
            return [None] * len(self.blocks)
        if keep_mask.shape[0] != len(self.blocks):
            raise ValueError(f"keep_mask has {keep_mask.shape[0]} layers, but the model has {len(self.blocks)} blocks")
        return [mask / (1 - rate) for mask, rate in zip(keep_mask, self.drop_path_rates, strict=True)]
